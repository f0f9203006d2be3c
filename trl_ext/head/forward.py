"""The model's LM head becomes ours: hidden states of live completion tokens go straight to log-probs, or to the loss.

TRL calls ``model(..., labels=..., fused_lm_head=True)`` and gets log-probs instead of logits. ``FusedHead`` answers
that call with ``grpo_kernels.linear_logprob``, on the tokens that have a label; with ``head_call=HeadCall(...)`` it
answers with ``linear_grpo_loss``. Both run inside the model's forward, so that the hooks of DDP, FSDP2 and ZeRO around
it fire. Any other call goes to the forward that was there, so generation is unchanged.

Shapes: B sequences, C columns of prompt and completion, N tokens with a label, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map_only
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.utils import ModelOutput

from grpo_kernels import linear_grpo_loss, linear_logprob
from grpo_kernels.head.products import HeadSketch
from grpo_kernels.interference.layer_taps import opened
from trl_ext.compat import FusedCausalLMOutput
from trl_ext.sharing.packed_rows import PackedRows, pack

from .settings import HeadSettings, backbone
from .weights import gathered_head

# (head module, hidden_NH, sequence_N) -> what the kernels take as ``head_sketch``
HeadSketches = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor], HeadSketch | None]


@dataclass(frozen=True)
class HeadCall:
    """What a forward is to return beyond TRL's log-probs.

    ``loss_inputs``: arguments of ``linear_grpo_loss`` by name, ``sequence_N`` among them; None: log-probs are wanted.
    ``prompt_width``: the rows' first columns are prompts, and each different prompt runs once; None: every row by
    itself.
    """

    loss_inputs: dict[str, Any] | None = None
    prompt_width: int | None = None


@dataclass
class FusedGRPOOutput(ModelOutput):
    """What a forward with ``grpo_inputs`` returns: the fields of ``grpo_kernels.GRPOLoss``, and the MoE loss.

    Nothing is called ``loss``: AdaLora's wrapper adds its own penalty to what is, which TRL's loss goes without.
    """

    grpo_loss: torch.Tensor | None = None
    policy_loss: torch.Tensor | None = None
    entropies: torch.Tensor | None = None
    ratio: torch.Tensor | None = None
    kl: torch.Tensor | None = None
    advantages: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None


class FusedHead:
    """A patched model's forward where log-probs or the loss are wanted.

    ``entropy``: whether log-probs come with entropies. ``head_sketch``: see ``HeadSketches``.
    """

    def __init__(self, settings: HeadSettings, *, entropy: bool, head_sketch: HeadSketches = lambda *_: None) -> None:
        self.settings, self.entropy, self.head_sketch = settings, entropy, head_sketch

    def __deepcopy__(self, memo: Any) -> None:
        """A copy of a model in training (an average of weights, say) is a model without our head."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def __call__(self, model: Any, args: Any, labels_BC: torch.Tensor, call: HeadCall, kwargs: dict[str, Any]):
        """``model``'s forward of ``args`` and ``kwargs``, up to log-probs or the loss of the tokens with a label."""
        kwargs["use_cache"] = False
        packed = None if call.prompt_width is None else pack_inputs(kwargs, call.prompt_width)
        outputs = backbone(model)(*args, **kwargs)
        labels_BC = labels_BC[:, 1:].to(outputs.last_hidden_state.device)  # a token is told by what stands before it
        mask_BC = labels_BC != -100
        hidden_NH = hidden_of_tokens(outputs.last_hidden_state, mask_BC, packed)
        aux_loss = expert_loss(outputs, kwargs, self.settings)
        if call.loss_inputs is None:
            logprobs_N, entropies_N = self._log_probs(model, hidden_NH, labels_BC[mask_BC], mask_BC.nonzero()[:, 0])
            return FusedCausalLMOutput(
                log_probs=spread(logprobs_N, mask_BC),
                entropy=spread(entropies_N, mask_BC),
                label_mask=mask_BC,
                aux_loss=aux_loss,
            )
        return self._loss(model, hidden_NH, labels_BC[mask_BC], call.loss_inputs, aux_loss)

    def _log_probs(
        self, model: Any, hidden_NH: torch.Tensor, targets_N: torch.Tensor, sequence_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        with self._projection(model, hidden_NH, keep=True) as (hidden_NH, weight, options):
            options["head_sketch"] = self._sketch(model, hidden_NH, sequence_N)
            found = linear_logprob(hidden_NH, weight, targets_N.to(weight.device), entropy=self.entropy, **options)
        return found if self.entropy else (found, None)

    def _loss(
        self,
        model: Any,
        hidden_NH: torch.Tensor,
        targets_N: torch.Tensor,
        loss_inputs: dict[str, Any],
        aux_loss: torch.Tensor | None,
    ) -> FusedGRPOOutput:
        with self._projection(model, hidden_NH, keep=False) as (hidden_NH, weight, options):
            inputs = tree_map_only(torch.Tensor, lambda tensor: tensor.to(weight.device), loss_inputs)
            options["head_sketch"] = self._sketch(model, hidden_NH, inputs["sequence_N"])
            found = linear_grpo_loss(hidden_NH, weight, targets_N.to(weight.device), **inputs, **options)
        return FusedGRPOOutput(
            grpo_loss=found.loss,
            policy_loss=found.policy_loss,
            entropies=found.entropies,
            ratio=found.ratio,
            kl=found.kl,
            advantages=found.advantages,
            aux_loss=aux_loss,
        )

    def _sketch(self, model: Any, hidden_NH: torch.Tensor, sequence_N: torch.Tensor) -> HeadSketch | None:
        return self.head_sketch(opened(model.get_output_embeddings()), hidden_NH, sequence_N)

    @contextmanager
    def _projection(
        self, model: Any, hidden_NH: torch.Tensor, *, keep: bool
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, dict[str, Any]]]:
        """Hidden states on the head's device, its weight, and the kernels' options. ``keep``: see ``gathered_head``."""
        settings = self.settings
        autocast: Any = nullcontext()
        if settings.cast_to_fp32:
            hidden_NH = hidden_NH.float()
            autocast = torch.autocast(hidden_NH.device.type, enabled=False)
        with autocast, gathered_head(model.get_output_embeddings(), hidden_NH, keep=keep) as (weight, bias, low_rank):
            options = {
                "bias": bias,
                "low_rank": low_rank,
                "temperature": settings.temperature,
                "logit_scale": settings.logit_scale,
                "softcap": settings.softcap,
            }
            # with the model split over devices the backbone can end on another one than the head's
            yield hidden_NH.to(weight.device), weight, options


def pack_inputs(kwargs: dict[str, Any], prompt_width: int) -> PackedRows:
    """Replaces the padded rows in ``kwargs`` by packed ones, each prompt once."""
    input_ids_BC, mask_BC = kwargs.pop("input_ids"), kwargs.pop("attention_mask")
    packed = pack(input_ids_BC, mask_BC, prompt_width)
    kwargs |= packed.inputs(input_ids_BC)
    return packed


def hidden_of_tokens(hidden: torch.Tensor, mask_BC: torch.Tensor, packed: PackedRows | None) -> torch.Tensor:
    """(N, H) hidden states before the masked tokens. ``hidden``: (B, C, H), or (1, S, H) of packed rows."""
    if packed is None:
        return hidden[:, :-1][mask_BC]
    return hidden[0, packed.packed_BC[:, :-1][mask_BC]]


def expert_loss(outputs: Any, kwargs: dict[str, Any], settings: HeadSettings) -> torch.Tensor | None:
    """The auxiliary loss of a mixture of experts, 0-d; None where the call doesn't ask for it."""
    if not kwargs.get("output_router_logits"):
        return None
    routed = getattr(outputs, "router_logits", None)
    if not routed:  # configured without experts, as Doge may be
        return outputs.last_hidden_state.new_zeros(())
    return load_balancing_loss_func(
        routed, settings.n_experts, settings.experts_per_token, kwargs.get("attention_mask")
    )


def spread(values_N: torch.Tensor | None, mask_BC: torch.Tensor) -> torch.Tensor | None:
    """(B, C) values at the masked places, 0 elsewhere."""
    if values_N is None:
        return None
    # masked_scatter keeps the graph where no token is live, so that backward has a zero to give
    return values_N.new_zeros(mask_BC.shape).masked_scatter(mask_BC.to(values_N.device), values_N)
