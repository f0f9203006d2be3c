"""Replaces the model's LM head: it turns hidden states of labelled tokens into log-probs or the loss, without logits.

TRL calls ``model(..., labels=..., fused_lm_head=True)`` and expects log-probs. ``FusedHead`` computes them by
``grpo_kernels.linear_logprob``, for the tokens that have a label. If the call has ``head_call=HeadCall(loss_inputs)``,
it computes the loss by ``linear_grpo_loss``. Both run inside the model's forward, so that the hooks of DDP, FSDP2 and
ZeRO run. Any other call, such as generation's, runs the original forward.

Shapes: B sequences, C columns of prompt and completion, N tokens with a label, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map_only
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.utils import ModelOutput

from grpo_kernels import GRPOLoss, linear_grpo_loss, linear_logprob
from grpo_kernels.head.products import HeadSketch
from grpo_kernels.interference.layer_taps import active_module
from trl_ext.schema import TOKEN_TYPES
from trl_ext.sharing.packed_rows import PackedRows, pack

from .settings import HeadSettings, backbone
from .weights import gathered_head

# (head module, hidden_NH, sequence_N) -> the kernels' argument ``head_sketch``
HeadSketches = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor], HeadSketch | None]


@dataclass(frozen=True)
class HeadCall:
    """Selects what a forward computes.

    Attributes:
        loss_inputs: arguments of ``linear_grpo_loss`` by name, including ``sequence_N``; None: log-probs only.
        prompt_width: number of prompt columns at the start of the rows, if each different prompt shall run once; None:
            every row runs by itself.
        position_N: the position of each of the loss's tokens, for ``PackedRowHead`` only.
    """

    loss_inputs: Mapping[str, Any] | None = None
    prompt_width: int | None = None
    position_N: torch.Tensor | None = None


@dataclass
class LogProbsOutput(ModelOutput):
    """The output of a forward that computes log-probs, with the names that TRL reads: (B, C - 1), 0 without a label.

    ``grpo_loss``: of ``PackedRowHead`` only; the log-probs and entropies are detached then.
    """

    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    grpo_loss: torch.Tensor | None = None


@dataclass
class FusedGRPOOutput(ModelOutput):
    """The output of a forward that computes the loss: fields of ``grpo_kernels.GRPOLoss``, and the MoE loss.

    No field has the name ``loss``, because AdaLora's wrapper would add its own penalty to it, which TRL's loss lacks.
    """

    grpo_loss: torch.Tensor | None = None
    policy_loss: torch.Tensor | None = None
    entropies: torch.Tensor | None = None
    ratio: torch.Tensor | None = None
    kl: torch.Tensor | None = None
    advantages: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None


class FusedHead:
    """Runs a patched model's forward up to log-probs or the loss.

    ``entropy``: whether to return entropies with log-probs. ``head_sketch``: see ``HeadSketches``. ``size_of``: see
    ``pack``.
    """

    labels_name = "labels"  # the argument that the head takes

    def __init__(
        self,
        settings: HeadSettings,
        *,
        entropy: bool,
        head_sketch: HeadSketches = lambda *_: None,
        size_of: Callable[[int], int] = lambda n: n,
    ) -> None:
        self.settings, self.entropy, self.head_sketch, self.size_of = settings, entropy, head_sketch, size_of

    def __deepcopy__(self, memo: Any) -> None:
        """Returns None: a copy of a model made in training, such as an average of weights, doesn't have our head."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles as None, like a deep copy."""
        return type(None), ()

    def __call__(self, model: Any, args: Any, labels_BC: torch.Tensor, call: HeadCall, kwargs: dict[str, Any]):
        """Runs the backbone on ``args`` and ``kwargs``, and computes log-probs or the loss of the labelled tokens."""
        kwargs["use_cache"] = False
        packed = None if call.prompt_width is None else pack_inputs(kwargs, call.prompt_width, self.size_of)
        outputs = backbone(model)(*args, **kwargs)
        labels_BC = labels_BC[:, 1:].to(outputs.last_hidden_state.device)  # position i predicts token i + 1
        mask_BC = labels_BC != -100
        place_N = mask_BC.nonzero(as_tuple=True)
        targets_N = labels_BC[place_N]
        hidden_NH = hidden_of_tokens(outputs.last_hidden_state, place_N, packed)
        aux_loss = expert_loss(outputs, kwargs, self.settings)
        if call.loss_inputs is None:
            logprobs_N, entropies_N = self._log_probs(model, hidden_NH, targets_N, place_N[0])
            return LogProbsOutput(
                log_probs=spread(logprobs_N, mask_BC),
                entropy=spread(entropies_N, mask_BC),
                aux_loss=aux_loss,
            )
        found = self._loss(model, hidden_NH, targets_N, call.loss_inputs)
        return FusedGRPOOutput(
            grpo_loss=found.loss,
            policy_loss=found.policy_loss,
            entropies=found.entropies,
            ratio=found.ratio,
            kl=found.kl,
            advantages=found.advantages,
            aux_loss=aux_loss,
        )

    def _log_probs(
        self, model: Any, hidden_NH: torch.Tensor, targets_N: torch.Tensor, sequence_N: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        with self._projection(model, hidden_NH, keep=True) as (hidden_NH, weight, options):
            options["head_sketch"] = self._sketch(model, hidden_NH, sequence_N)
            found: Any = linear_logprob(hidden_NH, weight, targets_N.to(weight.device), entropy=self.entropy, **options)
        return found if self.entropy else (found, None)

    def _loss(
        self, model: Any, hidden_NH: torch.Tensor, targets_N: torch.Tensor, loss_inputs: Mapping[str, Any]
    ) -> GRPOLoss:
        with self._projection(model, hidden_NH, keep=False) as (hidden_NH, weight, options):
            inputs = tree_map_only(torch.Tensor, lambda tensor: tensor.to(weight.device), loss_inputs)
            options["head_sketch"] = self._sketch(model, hidden_NH, inputs["sequence_N"])
            return linear_grpo_loss(hidden_NH, weight, targets_N.to(weight.device), **inputs, **options)

    def _sketch(self, model: Any, hidden_NH: torch.Tensor, sequence_N: torch.Tensor | None) -> HeadSketch | None:
        if sequence_N is None:
            return None
        return self.head_sketch(active_module(model.get_output_embeddings()), hidden_NH, sequence_N)

    @contextmanager
    def _projection(
        self, model: Any, hidden_NH: torch.Tensor, *, keep: bool
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, dict[str, Any]]]:
        """Yields hidden states on the head's device, its weight, and the kernels' options.

        ``keep``: see ``gathered_head``.
        """
        settings = self.settings
        autocast: Any = nullcontext()
        if settings.cast_to_fp32:
            hidden_NH = hidden_NH.float()
            autocast = torch.autocast(hidden_NH.device.type, enabled=False)
        with autocast, gathered_head(model.get_output_embeddings(), hidden_NH, keep=keep) as (weight, bias, low_rank):
            options = {
                "bias": bias,
                "low_rank": low_rank,
                "temperature": settings.temperature(),
                "logit_scale": settings.logit_scale,
                "softcap": settings.softcap,
            }
            # if the model is split over devices, the backbone's last layer may be on another device than the head
            yield hidden_NH.to(weight.device), weight, options


def score_as_trl(
    autocast: Callable[[], AbstractContextManager[Any]],
    model: Any,
    input_ids_BC: torch.Tensor,
    attention_mask_BC: torch.Tensor,
    width: int,
    batch_size: int | None = None,
    compute_entropy: bool = False,
    compute_aux_loss: bool = False,
    **inputs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None] | None:
    """Returns what ``GRPOTrainer._get_per_token_logps_and_entropies`` does, from our head; None with images.

    For TRL before 1.15, which computes log-probs from the model's logits.

    Returns:
        log-probs (B, T) and entropies (B, T) of the last ``width`` = T tokens of the rows, and the MoE loss (0-d); the
        latter two are None unless asked for.
    """
    given = {name: value for name, value in inputs.items() if value is not None}
    if not given.keys() <= set(TOKEN_TYPES):
        return None
    labels_BC = input_ids_BC.masked_fill(attention_mask_BC == 0, -100)
    labels_BC[:, :-width] = -100
    found = []
    for start in range(0, len(input_ids_BC), batch_size or len(input_ids_BC)):
        rows = slice(start, start + (batch_size or len(input_ids_BC)))
        with autocast():
            output = model(
                input_ids=input_ids_BC[rows],
                attention_mask=attention_mask_BC[rows],
                labels=labels_BC[rows],
                fused_lm_head=True,
                **({"output_router_logits": True} if compute_aux_loss else {}),
                **{name: value[rows] for name, value in given.items()},
            )
        found.append(output)
    return (
        torch.cat([output.log_probs[:, -width:] for output in found]),
        torch.cat([output.entropy[:, -width:] for output in found]) if compute_entropy else None,
        torch.stack([output.aux_loss for output in found]).mean() if compute_aux_loss else None,
    )


def pack_inputs(kwargs: dict[str, Any], prompt_width: int, size_of: Callable[[int], int]) -> PackedRows:
    """Replaces the padded rows in ``kwargs`` by packed ones, with each prompt once; returns their layout."""
    input_ids_BC, mask_BC = kwargs.pop("input_ids"), kwargs.pop("attention_mask")
    packed = pack(input_ids_BC, mask_BC, prompt_width, size_of)
    kwargs |= packed.inputs(input_ids_BC)
    return packed


def hidden_of_tokens(
    hidden: torch.Tensor, place_N: tuple[torch.Tensor, ...], packed: PackedRows | None
) -> torch.Tensor:
    """Returns the hidden states (N, H) that predict the tokens of these rows and columns, shifted by one column.

    ``hidden``: (B, C, H), or (1, S, H) of packed rows.
    """
    if packed is None:
        return hidden[:, :-1][place_N]
    return hidden[0, packed.packed_BC[:, :-1][place_N]]


def expert_loss(outputs: Any, kwargs: Mapping[str, Any], settings: HeadSettings) -> torch.Tensor | None:
    """Returns the load-balancing loss (0-d) of a mixture of experts; None if the call doesn't request it."""
    if not kwargs.get("output_router_logits"):
        return None
    routed = getattr(outputs, "router_logits", None)
    if not routed:  # the model is configured without experts, as Doge may be
        return outputs.last_hidden_state.new_zeros(())
    return load_balancing_loss_func(
        routed, settings.n_experts, settings.experts_per_token, kwargs.get("attention_mask")
    )


def spread(values_N: torch.Tensor | None, mask_BC: torch.Tensor) -> torch.Tensor | None:
    """Returns (B, C): the values at the masked positions, 0 elsewhere."""
    if values_N is None:
        return None
    # masked_scatter keeps the graph also if no token is live; backward then returns zeros
    return values_N.new_zeros(mask_BC.shape).masked_scatter(mask_BC.to(values_N.device), values_N)
