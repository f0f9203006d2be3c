"""``fuse_head(trainer)`` computes the loss and gradients of ``AsyncGRPOTrainer`` in the fused head.

TRL's own ``compute_loss`` still runs. It gets a stand-in for the model, which passes the loss's inputs on to the
model's forward. There ``linear_grpo_loss`` computes the gradients, and returns detached log-probs and entropies. So the
loss that TRL returns, and all that it logs, are TRL's own; our wrapper gives that loss the kernel's gradients. The
load-balancing loss of a mixture of experts keeps TRL's graph.

Two kinds of micro-batches take log-probs with a graph (``linear_logprob``) instead, and TRL's loss with its gradients:

* all, if TRL's loss isn't the one that the kernel computes. The first call compares the derivatives of both, on
  log-probs made for it.
* those whose samples share many trained tokens. A position with k tokens of the loss is k rows of
  ``linear_grpo_loss``, but one row of ``linear_logprob``.

Both call the same collectives, so ranks may differ.

Shapes: N tokens of the loss on this rank, S positions of its row.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import DistributedType, is_peft_model

from grpo_kernels.head.token_losses import TokenLoss, token_losses

from .async_metrics import COUNTS, unlogged
from .attachment import ATTACHED
from .compat import TRL_HAS_HEAD, ChangedTRL
from .head.forward import HeadCall, LogProbsOutput
from .head.packed_row import PackedRowHead
from .head.patch import add_fused_head
from .head.settings import read_settings
from .unshared_rows import Batch

logger = logging.getLogger(__name__)

FUSED = "_fused_head"  # attribute of a trainer
NEEDED = (*COUNTS, "_metrics", "epsilon_low", "epsilon_high", "temperature", "aux_loss_enabled")
COLUMNS = {"shift_labels", "token_index", "segment_id", "advantages", "old_log_probs", "global_n_tokens"}
MADE_UP = 60  # tokens of the comparison


def fuse_head(trainer: Any) -> Callable[[], None]:
    """Fuses the LM head of TRL's ``AsyncGRPOTrainer`` with its loss. Returns a function that undoes it.

    Training and its log stay as they were, up to rounding::

        trainer = AsyncGRPOTrainer(model=..., reward_funcs=..., args=args, train_dataset=...)
        fuse_head(trainer)
        trainer.train()

    Call it before ``attach``, which then also records the gradient of the LM head.

    Args:
        trainer: TRL's, or a subclass with TRL's ``compute_loss``.

    Raises:
        ValueError: the trainer is another one, is fused already, has a recorder, runs DeepSpeed, or has another
            ``compute_loss``.
        ChangedTRL: the installed TRL lacks what this module uses.
    """
    kind = type(trainer).__name__
    if not hasattr(trainer, "rollout_queue"):
        raise ValueError(
            f"fuse_head works with TRL's AsyncGRPOTrainer, not with {kind}; for GRPOTrainer, CurvatureGRPOTrainer does"
        )
    if hasattr(trainer, FUSED):
        raise ValueError("the head of this trainer is fused already")
    if hasattr(trainer, ATTACHED):
        raise ValueError("a recorder is attached to this trainer: call fuse_head before attach")
    if not str(getattr(trainer.compute_loss, "__module__", None)).startswith("trl."):
        raise ValueError(f"fuse_head computes the gradients of TRL's loss, and {kind} has its own compute_loss")
    if trainer.accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError("fuse_head doesn't work with DeepSpeed: use FSDP2 or DDP")
    if missing := [name for name in NEEDED if not hasattr(trainer, name)]:
        raise ChangedTRL(f"{kind} has no {missing[0]}")
    trainer._set_signature_columns_if_needed()
    if not TRL_HAS_HEAD or (missing := sorted(COLUMNS - set(trainer._signature_columns))):
        raise ChangedTRL(f"{kind} has no {missing[0] if TRL_HAS_HEAD else 'head'}")
    return FusedAsync(trainer).undo


class FusedAsync:
    """The fused head at work in ``AsyncGRPOTrainer``.

    Attributes:
        head: of the model. ``attach`` sets its ``head_sketch``.
    """

    def __init__(self, trainer: Any) -> None:
        model = trainer.model.get_base_model() if is_peft_model(trainer.model) else trainer.model
        fixed = trainer.temperature  # TRL's head keeps the one that the trainer was built with
        self.trainer, self._model = trainer, model
        self.head = PackedRowHead(read_settings(model, temperature=lambda: fixed), entropy=True)
        self._same_loss: bool | None = None
        self._compute = trainer.compute_loss
        self._remove_head = add_fused_head(model, self.head)
        trainer.compute_loss = self._compute_loss
        setattr(trainer, FUSED, self)

    def undo(self) -> None:
        """Restores the trainer's loss and the model's head; nothing happens if it did already.

        Raises ``ValueError`` while a recorder is attached.
        """
        if getattr(self.trainer, FUSED, None) is not self:
            return
        if hasattr(self.trainer, ATTACHED):
            raise ValueError("a recorder is attached to this trainer: call its detach() first")
        del self.trainer.compute_loss
        delattr(self.trainer, FUSED)
        self._remove_head()

    def _compute_loss(self, model: Any, inputs: Batch, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Returns TRL's loss of this rank's row, with its gradients."""
        if self._same_loss is None:
            self._same_loss = self._compare(inputs)
        n_tokens, n_labels = (int((inputs[name] >= 0).sum()) for name in ("token_index", "shift_labels"))
        if not self._same_loss or n_tokens > n_labels * tokens_a_position(self._model):
            return self._compute(model, inputs, *args, **kwargs)
        stand_in = StandIn(model, self._head_call(inputs))
        loss = self._compute(stand_in, inputs, *args, **kwargs)
        return WithGradientOf.apply(loss, stand_in.output.grpo_loss)

    def _head_call(self, inputs: Batch) -> HeadCall:
        """Returns the arguments of ``linear_grpo_loss`` for this rank's row."""
        chosen = inputs["token_index"] >= 0
        dtype = torch.promote_types(self.trainer.model.dtype, torch.float32)
        n_sequences = int(inputs["segment_id"].max()) + 1
        loss_inputs = {
            "sequence_N": inputs["segment_id"][chosen],
            "advantages": None,
            "advantages_N": inputs["advantages"][chosen],
            "old_logprobs_N": inputs["old_log_probs"][chosen],
            "weights_B": inputs["advantages"].new_full((n_sequences,), self._token_weight(inputs), dtype=dtype),
            "epsilon": self.trainer.epsilon_low,
            "epsilon_high": self.trainer.epsilon_high,
        }
        return HeadCall(loss_inputs, position_N=inputs["token_index"][chosen])

    def _token_weight(self, inputs: Batch) -> float:
        """Returns by what TRL's loss multiplies each token's; engines average gradients over ranks."""
        trainer = self.trainer
        tokens_a_rank = max(float(inputs["global_n_tokens"][0]) / trainer.accelerator.num_processes, 1.0)
        return 1.0 / (tokens_a_rank * trainer.current_gradient_accumulation_steps)

    def _compare(self, inputs: Batch) -> bool:
        """Returns whether TRL's loss has the derivatives by log-probs that the kernel's has; logs if it doesn't.

        The tokens are made up. Their ratios are within the clip range and on both sides of it, with advantages of both
        signs and 0, and some share a position. TRL's collectives run, on all ranks alike.
        """
        made_up, ratio_N = make_up(inputs)
        answer = Answer(int(inputs["attention_mask"].sum()), ratio_N.device)
        with torch.enable_grad(), unlogged(self.trainer):
            loss = self._compute(answer, made_up)
            found, by_entropy = torch.autograd.grad(loss, (answer.logprobs_1S, answer.entropies_1S), allow_unused=True)
        options = TokenLoss(epsilon_low=self.trainer.epsilon_low, epsilon_high=self.trainer.epsilon_high)
        own_N = token_losses(ratio_N.log(), made_up["advantages"][0], torch.zeros_like(ratio_N), None, None, options)
        by_logprob_N = own_N.coefficient * self._token_weight(inputs)
        expected_1S = torch.zeros_like(answer.logprobs_1S).index_add(1, made_up["token_index"][0], by_logprob_N[None])
        error = torch.inf if found is None else (found - expected_1S).abs().max() / expected_1S.abs().max()
        same = bool(error < 1e-3) and (by_entropy is None or not by_entropy.any())
        if not same and self.trainer.accelerator.is_main_process:
            logger.warning(
                "The loss of the installed TRL isn't the one that linear_grpo_loss computes: this run uses "
                "linear_logprob, with TRL's loss and its gradients."
            )
        return same


def tokens_a_position(model: Any) -> float:
    """Returns up to how many tokens a labelled position ``linear_grpo_loss`` is at least as fast as ``linear_logprob``.

    By products per row: 6 and 8 with a trainable head, 4 and 4 with a frozen one.
    """
    trainable = any(parameter.requires_grad for parameter in model.get_output_embeddings().parameters())
    return 4 / 3 if trainable else 1.0


def make_up(inputs: Batch) -> tuple[Batch, torch.Tensor]:
    """Returns the row with other tokens of the loss, and their ratios (N,) if every log-prob is -1."""
    n_positions = int(inputs["attention_mask"].sum())
    number_N = torch.arange(MADE_UP, device=inputs["token_index"].device)
    ratio_N = torch.linspace(0.05, 3.0, MADE_UP, device=number_N.device)
    tokens = {
        "token_index": number_N % min(n_positions, MADE_UP // 2),
        "old_log_probs": -1 - ratio_N.log(),
        "advantages": (number_N % 3 - 1) * 0.7,
        "segment_id": number_N % 4,
    }
    return {**inputs, **{name: value_N[None].to(inputs[name].dtype) for name, value_N in tokens.items()}}, ratio_N


class StandIn:
    """Takes the model's place in TRL's ``compute_loss``: passes ``call`` on to its forward, and keeps the output."""

    def __init__(self, model: Any, call: HeadCall) -> None:
        self._model, self._call = model, call
        self.output: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.output = self._model(*args, head_call=self._call, **kwargs)
        return self.output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class Answer:
    """Takes the model's place in TRL's ``compute_loss``: every log-prob (1, S) is -1, and the entropies are 0."""

    def __init__(self, n_positions: int, device: torch.device) -> None:
        self.logprobs_1S = torch.full((1, n_positions), -1.0, device=device, requires_grad=True)
        self.entropies_1S = torch.zeros((1, n_positions), device=device, requires_grad=True)

    def __call__(self, *args: Any, **kwargs: Any) -> LogProbsOutput:
        return LogProbsOutput(self.logprobs_1S, self.entropies_1S, self.logprobs_1S.new_zeros(()))


class WithGradientOf(torch.autograd.Function):
    """Returns the first loss; both losses get its gradient. If its value isn't finite, the second one gets NaN."""

    @staticmethod
    def forward(ctx, value, source):
        ctx.save_for_backward(value)
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        (value,) = ctx.saved_tensors
        return gradient, gradient + 0 * value
