"""The model's LM head becomes ours: hidden states of live completion tokens go straight to log-probs, or to the loss.

TRL calls ``model(..., labels=..., fused_lm_head=True)`` and gets log-probs instead of logits. ``FusedHead``
answers that call with ``grpo_kernels.linear_logprob``, on live tokens only, and with ``grpo_inputs=...`` with
``linear_grpo_loss``. Both run inside the model's forward, so that the hooks of DDP, FSDP2 and ZeRO around it fire; any
other call goes to the forward that was there, so generation is unchanged.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate.utils import DistributedType, is_peft_model
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.distributed.tensor import DTensor, Partial
from torch.nn.utils.rnn import pad_sequence
from torch.utils._pytree import tree_map_only
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.utils import ModelOutput

from grpo_kernels import linear_grpo_loss, linear_logprob
from grpo_kernels.head.products import HeadSketch
from grpo_kernels.interference.layer_taps import opened
from trl_ext.loss.packed_rows import pack
from trl_ext.loss.shared_prompts import SharedPrompts
from trl_ext.trl_surface import (
    FusedCausalLMOutput,
    RunSettings,
    forward_without_trl_head,
    maybe_gather_lm_head_ctx,
)


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


@dataclass(frozen=True)
class HeadSettings:
    """How logits come from hidden states: ``softcap * tanh(logit_scale * y / softcap) / temperature``, y the product.

    ``softcap`` None: no cap. ``cast_to_fp32``: TRL's ``cast_lm_head_to_fp32``. ``n_experts``, ``experts_per_token``: of
    a mixture of experts, for its auxiliary loss.
    """

    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None
    cast_to_fp32: bool = False
    n_experts: int | None = None
    experts_per_token: int | None = None


class CompletionMask:
    """Which completion tokens are worth a projection, where TRL's labels don't tell: not tool output.

    Between ``keep`` and ``forget`` that is known of the sequences just generated, within ``given`` of a batch. TRL may
    send the rows of a call in several parts, one after the other; each takes its own.
    """

    def __init__(self) -> None:
        self._known_BT: torch.Tensor | None = None
        self._mask_BT: torch.Tensor | None = None  # of the call that is going on
        self._taken = 0

    def keep(self, completion_ids: list[list[int]], tool_mask: list[list[int]] | None, device: Any) -> None:
        """What TRL's ``_generate`` returned, by row."""
        self._known_BT = None
        if tool_mask is not None and len(tool_mask) == len(completion_ids):
            rows = [torch.tensor(row, device=device) for row in tool_mask]
            self._known_BT = pad_sequence(rows, batch_first=True, padding_value=1)

    def forget(self) -> None:
        """The rows aren't those any more."""
        self._known_BT = None

    @contextmanager
    def given(self, mask_BT: torch.Tensor | None) -> Iterator[None]:
        """The mask of the rows that are scored within, or None where none has tool output."""
        self._known_BT = mask_BT
        try:
            yield
        finally:
            self._known_BT = None

    @contextmanager
    def of(self, n_rows: int, width: int) -> Iterator[None]:
        """A call that scores ``n_rows`` rows of ``width`` completion positions."""
        mask_BT = self._known_BT
        if mask_BT is not None:
            if len(mask_BT) != n_rows or mask_BT.shape[1] > width:
                mask_BT = None
            elif mask_BT.shape[1] < width:  # pad_to_multiple_of
                mask_BT = torch.nn.functional.pad(mask_BT, (0, width - mask_BT.shape[1]), value=1)
        self._mask_BT, self._taken = mask_BT, 0
        try:
            yield
        finally:
            self._mask_BT = None

    def apply(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels (B', S) of the next part of the batch, -100 where the mask is 0."""
        if self._mask_BT is None:
            return labels
        mask_BT = self._mask_BT[self._taken : self._taken + len(labels)]
        self._taken += len(labels)
        labels = labels.clone()
        labels[:, -mask_BT.shape[1] :].masked_fill_(mask_BT == 0, -100)
        return labels


# names under which models' configurations keep a factor on the logits, in the order in which the first that is set
# counts; TRL reads the same in ``add_fused_lm_head``
LOGIT_FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
LOGIT_DIVISOR = "logits_scaling"
MULTIPLIES_BY_ITS_DIVISOR = ("hyperclovax",)


def read_settings(model: torch.nn.Module, *, temperature: float = 1.0, cast_to_fp32: bool = False) -> HeadSettings:
    """From the model's configuration. ``ValueError``: the model has no output embeddings, or no backbone apart."""
    if model.get_output_embeddings() is None:  # type: ignore[operator]
        raise ValueError(f"{type(model).__name__} has no output embeddings: it can't give log-probs")
    backbone(model)
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    factors = [getattr(config, name, None) for name in LOGIT_FACTORS]
    logit_scale = next((float(factor) for factor in factors if factor is not None), None)
    divisor = getattr(config, LOGIT_DIVISOR, None)
    if logit_scale is None and divisor is not None:
        logit_scale = float(divisor) if config.model_type in MULTIPLIES_BY_ITS_DIVISOR else 1.0 / divisor
    return HeadSettings(
        temperature=temperature,
        logit_scale=1.0 if logit_scale is None else logit_scale,
        softcap=getattr(config, "final_logit_softcapping", None),
        cast_to_fp32=cast_to_fp32,
        n_experts=getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None),
        experts_per_token=getattr(config, "num_experts_per_tok", None),
    )


def backbone(model: Any) -> Any:
    """The model without its head. Raises ``ValueError`` where it can't be told apart."""
    base = model.base_model
    if base is model:  # Llama 4's text model has another prefix than its backbone's name
        base = getattr(model, "model", None)
    if base is None:
        raise ValueError(f"{type(model).__name__} has no backbone apart from its head: use fused_loss=False")
    return base


def fused_heads(
    run: RunSettings,
    model: Any,
    ref_model: Any,
    completion_mask: CompletionMask,
    shared_prompts: SharedPrompts,
    head_sketch: Callable[[torch.nn.Module, torch.Tensor, torch.Tensor], HeadSketch | None],
) -> list[Callable[[], Callable[[], None]]]:
    """The patches (``model_patches.py``) that give the policy our head, with or without adapters around it, and TRL's
    ``ref_model`` where there is one.

    Raises ``ValueError`` for a model without output embeddings, or an adapter on them that isn't plain LoRA.
    """
    base = model.get_base_model() if is_peft_model(model) else model
    settings = read_settings(base, temperature=run.temperature, cast_to_fp32=run.cast_lm_head_to_fp32)
    head = base.get_output_embeddings()
    if isinstance(head, BaseTunerLayer):
        if settings.cast_to_fp32:
            raise ValueError("cast_lm_head_to_fp32=True can't be used with an adapter on lm_head")
        head_adapter(head, torch.zeros(1, head.get_base_layer().in_features, device=model.device))  # refuses
    of_policy = FusedHead(settings, completion_mask, shared_prompts, entropy=True, head_sketch=head_sketch)
    zero = run.accelerator.distributed_type == DistributedType.DEEPSPEED
    patches = [lambda: add_fused_head(base, of_policy)]
    if zero:
        patches.append(lambda: register_head_with_zero3(model, base))
    if ref_model is not None:
        reference = run.accelerator.unwrap_model(ref_model)
        of_reference = FusedHead(settings, completion_mask, shared_prompts, entropy=False)
        if zero:
            patches.append(lambda: register_head_with_zero3(reference, reference))
        patches.append(lambda: add_fused_head(reference, of_reference))
    return patches


def register_head_with_zero3(outermost: torch.nn.Module, model: Any) -> Callable[[], None]:
    """ZeRO-3 gathers a module's parameters before its forward and its backward. The head's forward isn't called, so its
    parameters are registered with the outermost module, before the first forward, in which ZeRO-3 records what it
    gathers when. Returns what undoes it."""

    def register(module: torch.nn.Module, args: Any) -> None:
        import deepspeed

        for parameter in model.get_output_embeddings().parameters():
            if hasattr(parameter, "ds_id"):
                deepspeed.zero.register_external_parameter(module, parameter)

    return outermost.register_forward_pre_hook(register, prepend=True).remove


HEAD = "_curvature_grpo_head"  # of a model, while a trainer uses it


class FusedHead:
    """What a patched forward does where it is called for log-probs or the loss, as the module's docstring says.

    ``shared_prompts`` says, or ``shared_prompt_width`` of the call, whether prompts run once.
    ``head_sketch`` (head, hidden_NH, sequence_N) gives what the kernels take under that name.
    """

    def __init__(
        self,
        settings: HeadSettings,
        completion_mask: CompletionMask,
        shared_prompts: SharedPrompts | None = None,
        *,
        entropy: bool,
        head_sketch: Callable[[torch.nn.Module, torch.Tensor, torch.Tensor], HeadSketch | None] = lambda *_: None,
    ) -> None:
        self.settings, self.completion_mask, self.shared_prompts = settings, completion_mask, shared_prompts
        self.entropy, self.head_sketch = entropy, head_sketch

    def __deepcopy__(self, memo: Any) -> None:
        """A copy of a model in training (an average of weights, say) is a model without our head."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def __call__(self, model: Any, args: Any, labels: Any, grpo_inputs: Any, shared_prompt_width: Any, kwargs: Any):
        """``model``'s forward of ``args`` and ``kwargs``, up to log-probs, or with ``grpo_inputs`` to the loss."""
        settings = self.settings
        kwargs["use_cache"] = False
        if shared_prompt_width is None and self.shared_prompts is not None:
            shared_prompt_width = self.shared_prompts.width
        packed = None
        if shared_prompt_width is not None:
            input_ids, mask_BC = kwargs.pop("input_ids"), kwargs.pop("attention_mask")
            packed = pack(input_ids, mask_BC, shared_prompt_width)
            kwargs |= packed.inputs(input_ids)
        outputs = backbone(model)(*args, **kwargs)
        hidden = outputs.last_hidden_state
        if grpo_inputs is None:
            labels = self.completion_mask.apply(labels)
        labels = labels[:, 1:].to(hidden.device)
        mask = labels != -100
        aux_loss = None
        if kwargs.get("output_router_logits"):
            routed, mask_RT = getattr(outputs, "router_logits", None), kwargs.get("attention_mask")
            aux_loss = hidden.new_zeros(())  # configured without experts, as Doge may be
            if routed:
                aux_loss = load_balancing_loss_func(routed, settings.n_experts, settings.experts_per_token, mask_RT)
        # a token is told by what stands before it
        hidden_NH = hidden[:, :-1][mask] if packed is None else hidden[0, packed.packed_BC[:, :-1][mask]]
        targets_N = labels[mask]
        head = model.get_output_embeddings()
        autocast: Any = nullcontext()
        if settings.cast_to_fp32:
            hidden_NH = hidden_NH.float()
            autocast = torch.autocast(hidden.device.type, enabled=False)
        with autocast, gathered_head(head, hidden_NH, keep=grpo_inputs is None) as (weight, bias, low_rank):
            # with the model split over devices the backbone can end on another one than the head's
            hidden_NH, targets_N = hidden_NH.to(weight.device), targets_N.to(weight.device)
            options: dict[str, Any] = {
                "bias": bias,
                "low_rank": low_rank,
                "temperature": settings.temperature,
                "logit_scale": settings.logit_scale,
                "softcap": settings.softcap,
            }
            if grpo_inputs is not None:
                grpo_inputs = tree_map_only(torch.Tensor, lambda tensor: tensor.to(weight.device), grpo_inputs)
                options["head_sketch"] = self.head_sketch(opened(head), hidden_NH, grpo_inputs["sequence_N"])
                out = linear_grpo_loss(hidden_NH, weight, targets_N, **grpo_inputs, **options)
                return FusedGRPOOutput(
                    grpo_loss=out.loss,
                    policy_loss=out.policy_loss,
                    entropies=out.entropies,
                    ratio=out.ratio,
                    kl=out.kl,
                    advantages=out.advantages,
                    aux_loss=aux_loss,
                )
            options["head_sketch"] = self.head_sketch(opened(head), hidden_NH, mask.nonzero()[:, 0])
            out = linear_logprob(hidden_NH, weight, targets_N, entropy=self.entropy, **options)
        logprobs_N, entropies_N = out if self.entropy else (out, None)

        def spread(values_N):
            # masked_scatter keeps the graph where no token is live, so that backward has a zero to give
            if values_N is None:
                return None
            return values_N.new_zeros(mask.shape).masked_scatter(mask.to(values_N.device), values_N)

        return FusedCausalLMOutput(
            log_probs=spread(logprobs_N), entropy=spread(entropies_N), label_mask=mask, aux_loss=aux_loss
        )


def add_fused_head(model: torch.nn.Module, head: FusedHead) -> Callable[[], None]:
    """Gives ``model``, without an adapter's wrapper around it, this head until the returned function is called, which
    gives it back the head of another trainer that is using it too."""
    remove_forward, before = add_forward(model), getattr(model, HEAD, None)
    setattr(model, HEAD, head)

    def undo() -> None:
        delattr(model, HEAD)
        if before is not None:
            setattr(model, HEAD, before)
        remove_forward()

    return undo


def add_forward(model: torch.nn.Module) -> Callable[[], None]:
    """Replaces ``model.forward`` by one that uses the model's head; without a head it calls the previous forward.

    Returns what undoes it. A wrapper that was put around it meanwhile (accelerate's, for autocast) stays with it.
    """
    before = vars(model).get("forward")
    function = getattr(before, "__func__", None)
    while function is not None:
        if HEAD in vars(function):
            return lambda: None
        function = getattr(function, "__wrapped__", None)
    ours = _forward_with_head(model)
    model.forward = ours  # type: ignore[method-assign]

    def undo() -> None:
        if vars(model).get("forward") is not ours:
            return
        del model.forward
        if before is not None:
            model.forward = before  # type: ignore[method-assign]

    return undo


def _forward_with_head(model: Any) -> Any:
    """A forward that uses the model's ``HEAD`` if it is set, and else calls the previous forward."""
    there = forward_without_trl_head(model)
    bound = getattr(there, "__self__", None) is model
    inner = (
        there.__func__ if bound else lambda self, *args, **kwargs: there(*args, **kwargs)
    )  # a deep copy's is its own

    # the signature stays: `generate` checks its arguments against it
    @functools.wraps(type(model).forward)
    def forward(self, *args, fused_lm_head=False, labels=None, grpo_inputs=None, shared_prompt_width=None, **kwargs):
        head = getattr(self, HEAD, None)
        if head is None or not fused_lm_head or labels is None:
            if labels is not None:
                kwargs["labels"] = labels
            return inner(self, *args, **({"fused_lm_head": True} if fused_lm_head else {}), **kwargs)
        return head(self, args, labels, grpo_inputs, shared_prompt_width, kwargs)

    setattr(forward, HEAD, True)
    return types.MethodType(forward, model)


@contextmanager
def gathered_head(head: torch.nn.Module, hidden_NH: torch.Tensor, *, keep: bool):
    """The head's whole weight, bias and low-rank adapter: from FSDP2's shards or ZeRO-3's, tied or not.

    ``keep``: the weight is needed again in the backward, when ZeRO-3 has taken its parts away: a copy then.
    """
    low_rank, head = None, opened(head)
    if isinstance(head, BaseTunerLayer):
        low_rank = head_adapter(head, hidden_NH)
        head = cast(torch.nn.Module, head.get_base_layer())
    weight: Any = head.weight
    bias: Any = getattr(head, "bias", None)
    weight, bias = _whole(weight), _whole(bias)
    with maybe_gather_lm_head_ctx(weight, bias):
        if hasattr(weight, "ds_id") and keep and torch.is_grad_enabled():
            weight, bias = weight.clone(), None if bias is None else bias.clone()
        yield weight, bias, low_rank


def _whole(parameter: Any) -> Any:
    """The parameter of all FSDP2 shards, its gradient the mean over processes of each one's, as FSDP2's own are.

    (``full_tensor()`` alone would take every process's gradient for the same, and keep one process's of each shard.)
    """
    if not isinstance(parameter, DTensor):
        return parameter
    mesh = parameter.device_mesh
    whole = parameter.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda gradient: gradient / mesh.size())
    return whole


def head_adapter(head: BaseTunerLayer, hidden_NH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """LoRA on the LM head as factors, ((N, R) scaled ``A(hidden)``, (V, R) ``B``), of all active adapters.

    None where it is switched off or merged. Raises ``ValueError`` for adapters that aren't plain LoRA.
    """
    if head.disable_adapters or head.merged:
        return None
    inputs, matrices = [], []
    for name in head.active_adapters:
        if not isinstance(head, LoraLayer) or name in getattr(head, "lora_variant", {}):
            raise ValueError(
                f"adapter {name!r} on the LM head is a {type(head).__name__}"
                f"{' variant' if isinstance(head, LoraLayer) else ''}: only plain LoRA is supported there"
            )
        if name not in head.lora_A:
            continue
        a, b = head.lora_A[name], head.lora_B[name]
        if b.bias is not None:
            raise ValueError(f"adapter {name!r} on the LM head has lora_bias, which isn't supported there")
        own = {"weight": _whole(a.weight)}  # FSDP2 gathers it with the head's, before a forward that isn't called
        hidden = head.lora_dropout[name](hidden_NH.to(a.weight.dtype))
        inputs.append(torch.func.functional_call(a, own, (hidden,)) * head.scaling[name])
        matrices.append(_whole(b.weight))
    if not inputs:
        return None
    return torch.cat(inputs, dim=1), torch.cat(matrices, dim=1)
