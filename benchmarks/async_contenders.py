"""One packed row of TRL's ``AsyncGRPOTrainer``: its own ``compute_loss`` with TRL's head, and with ours.

The model has no layers: hidden states are the embeddings of the row's tokens. Their gradient is computed but not the
embeddings' own. TRL scores every position on a CPU, and the labelled ones alone on a GPU; ``TRL, labelled`` does the
latter on any device. The loss, its metrics and the waits for them are in every contender.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import head_contenders as heads
import torch
from accelerate import Accelerator
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl.experimental.async_grpo import AsyncGRPOTrainer
from trl.trainer import utils

from trl_ext import fuse_head, fused_async
from trl_ext.async_metrics import COUNTS

VOCABULARY, POSITIONS, LABELLED = 32768, 2000, 0.6
SAMPLES = 16


def make_trainer(shape: str, vocabulary: int, *, frozen: bool, device: str) -> Any:
    """A trainer with the attributes that ``compute_loss`` reads."""
    hidden = heads.SHAPES[shape][0]
    sizes = {"hidden_size": hidden, "num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 1}
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=vocabulary, num_hidden_layers=0, tie_word_embeddings=False, **sizes)
    model = Qwen2ForCausalLM(config).to(device)
    torch.nn.init.normal_(model.lm_head.weight, std=0.001)  # log-probs are near -log V, and few tokens clipped
    model.requires_grad_(False)
    model.lm_head.requires_grad_(not frozen)
    model.enable_input_require_grads()
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    trainer = object.__new__(AsyncGRPOTrainer)
    trainer.model, trainer.accelerator = model, Accelerator(cpu=device == "cpu")
    trainer.epsilon_low = trainer.epsilon_high = 0.2
    trainer.temperature, trainer.aux_loss_enabled, trainer.rollout_queue = 1.0, False, None
    trainer.current_gradient_accumulation_steps, trainer._signature_columns = 1, None
    trainer._metrics = {"train": defaultdict(list)}
    trainer.args, trainer.is_fsdp_enabled = SimpleNamespace(), False
    for name in (*COUNTS, "_step_forward_s"):
        setattr(trainer, name, 0.0)
    return trainer


def make_inputs(
    vocabulary: int, *, tokens_a_position: float = 1.0, positions: int = POSITIONS, device: str = "cpu"
) -> dict[str, torch.Tensor]:
    """A row in which the last positions are trained; the first of those serve two tokens if positions are shared."""
    n_labelled = int(LABELLED * positions)
    n_tokens = int(n_labelled * tokens_a_position)
    ids = torch.randint(vocabulary, (positions,))
    labels = ids.roll(-1)
    labels[: positions - n_labelled] = -100
    index = torch.arange(n_tokens) % n_labelled + positions - n_labelled
    row = {
        "input_ids": ids,
        "position_ids": torch.arange(positions),
        "attention_mask": torch.ones(positions, dtype=torch.long),
        "shift_labels": labels,
        "token_index": index,
        "old_log_probs": torch.full((n_tokens,), -float(torch.tensor(vocabulary).log())) + 0.1 * torch.randn(n_tokens),
        "advantages": torch.randn(n_tokens),
        "segment_id": torch.arange(n_tokens) * SAMPLES // n_tokens,
        "tree_kv_index": torch.arange(positions),
        "tree_cu_seqlens_q": torch.tensor([0, positions], dtype=torch.int32),
        "tree_cu_seqlens_k": torch.tensor([0, positions], dtype=torch.int32),
        "tree_max_seqlens": torch.tensor([positions, positions]),
        "global_n_tokens": torch.tensor(float(n_tokens)),
        "global_n_forward_tokens": torch.tensor(float(positions)),
        "mean_seq_len": torch.tensor(float(positions // SAMPLES)),
    }
    return {name: value[None].to(device) for name, value in row.items()}


def always(model: Any) -> float:
    return torch.inf


def never(model: Any) -> float:
    return 0.0


def backward(contender: str, trainer: Any, inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
    """A call that leaves the contender's gradient of the head in ``.grad``.

    ``ours`` chooses its kernel by the row; ``ours, loss kernel`` and ``ours, log-prob kernel`` don't.
    """
    kernels = {"ours": fused_async.tokens_a_position, "ours, loss kernel": always, "ours, log-prob kernel": never}
    before = fused_async.tokens_a_position, utils._use_triton

    def call() -> None:
        trainer.model.zero_grad()
        undo = None
        if contender in kernels:
            fused_async.tokens_a_position = kernels[contender]
            undo = fuse_head(trainer)
            trainer._fused_head._same_loss = True  # the comparison with TRL's loss is once per run
        elif contender == "TRL, labelled":
            utils._use_triton = lambda device: True
        try:
            trainer.compute_loss(trainer.model, inputs).backward()
        finally:
            fused_async.tokens_a_position, utils._use_triton = before
            if undo is not None:
                undo()

    return call


def peak(contender: str, shape: str, frozen: bool) -> int:
    """Peak bytes of a contender beyond its inputs and the head's gradient, to be measured in a fresh process."""
    from head_memory import peak_beyond_now

    device = "cuda" if torch.cuda.is_available() else "cpu"
    small = make_trainer("tiny", 64, frozen=frozen, device=device)
    backward(contender, small, make_inputs(64, positions=32, device=device))()  # libraries
    trainer = make_trainer(shape, VOCABULARY, frozen=frozen, device=device)
    returned = 0 if frozen else trainer.model.lm_head.weight.nbytes
    return peak_beyond_now(backward(contender, trainer, make_inputs(VOCABULARY, device=device))) - returned
