"""What the policies of the mixture and of the calculator share: a tokenizer of digits, and an optimizer with Muon."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from trl_ext.tasks.small_policy import CHAT_TEMPLATE, LEARNING_RATE, train_tokenizer

MUON_LEARNING_RATE = 5e-3


def digit_tokenizer(
    texts: Sequence[str], vocab_size: int, chat_template: str = CHAT_TEMPLATE, special: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE on ``texts`` whose digits are single tokens. ``special`` adds special tokens."""
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return train_tokenizer(texts, split, vocab_size=vocab_size, chat_template=chat_template, special=special)


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum of 0.95 and weight decay of 0.1: ``torch.optim.Muon``'s "match_rms_adamw".

    That one's Newton-Schulz iterations are in bfloat16, which CPUs without its instructions emulate: a step took two
    seconds there, and takes 0.1 in float32.
    """

    def __init__(self, matrices: Sequence[torch.Tensor], lr: float) -> None:
        super().__init__(matrices, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                momentum = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix)).lerp_(matrix.grad, 0.05)
                direction = orthogonalized(matrix.grad.lerp(momentum, 0.95))
                matrix.mul_(1 - 0.1 * group["lr"])
                matrix.add_(direction, alpha=-0.2 * group["lr"] * max(matrix.shape) ** 0.5)


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """Returns about U V^T of the singular value decomposition U S V^T, by five Newton-Schulz iterations.

    Their coefficients are those of Keller Jordan's Muon (2024), which leave singular values between 0.7 and 1.2.
    """
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide


class WarmUpOptimizer:
    """Muon for a model's matrices and AdamW for its embeddings and norms.

    Both learning rates rise linearly over 30 steps, and fall linearly until step ``steps``.
    """

    def __init__(self, model: LlamaForCausalLM, steps: int) -> None:
        self.model = model
        matrices = [one for one in model.model.layers.parameters() if one.ndim == 2]
        others = [one for one in model.parameters() if all(one is not matrix for matrix in matrices)]
        self.optimizers = [
            Muon(matrices, MUON_LEARNING_RATE),
            torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.1),
        ]
        self.rates = [
            torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: min((step + 1) / 30, 1.0) * max(1 - (step + 1) / steps, 0.05)
            )
            for optimizer in self.optimizers
        ]

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            rate.step()
