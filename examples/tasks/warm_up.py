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


class WarmUpOptimizer:
    """Muon for a model's matrices and AdamW for its embeddings and norms.

    Both learning rates rise linearly over 30 steps, and fall linearly until step ``steps``.
    """

    def __init__(self, model: LlamaForCausalLM, steps: int) -> None:
        self.model = model
        matrices = [one for one in model.model.layers.parameters() if one.ndim == 2]
        others = [one for one in model.parameters() if all(one is not matrix for matrix in matrices)]
        self.optimizers = [
            torch.optim.Muon(matrices, lr=MUON_LEARNING_RATE, adjust_lr_fn="match_rms_adamw"),
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
