"""Runs ``linear_grpo_loss`` as one operator on tensors and scalars, for ``torch.compile``.

Outside of ``torch.compile`` an autograd Function runs the same code, and saves memory: it scales the gradients in
place, and keeps a half-precision weight's in half precision if a single window holds all rows with a gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from grpo_kernels.head.rows.plain import Transform

from .checks import check_flag, check_head, check_number, usable_sketch
from .derivatives import refuse_second_derivatives
from .loss_checks import GivenAdvantages, check_loss_options, read_tokens
from .loss_tiles import LossCall, run_loss
from .products import HeadSketch, compute_dtype

DETAILS = ("logprob", "entropy", "ratio", "clipped", "kl", "advantage")
OPERANDS = 5  # hidden, weight, bias, the adapter's inputs and weight
SCHEMA = """(Tensor hidden, Tensor weight, Tensor? bias, Tensor? low_inputs, Tensor? low_weight, bool[] needs,
ScalarType product_dtype, Tensor targets, Tensor sequence, Tensor weights, Tensor? advantages, Tensor? advantages_N,
Tensor? rewards, Tensor? position, str? normalization, float? eps, float? alpha, Tensor? old, Tensor? ref,
Tensor? policy_scale, str loss_type, float epsilon, float? epsilon_high, float? delta, float[] sapo_temperatures,
float beta, bool kl_times_ratio, float entropy_coef, float temperature, float logit_scale, float? softcap,
bool float32_logits) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
Tensor, Tensor)"""


class LossNumbers(NamedTuple):
    """The arguments of ``linear_grpo_loss`` that are no tensors."""

    loss_type: str
    epsilon: float
    epsilon_high: float | None
    delta: float | None
    sapo_temperatures: tuple[float, float]
    beta: float
    kl_times_ratio: bool
    entropy_coef: float
    temperature: float
    logit_scale: float
    softcap: float | None
    float32_logits: bool


Tensors = tuple[torch.Tensor | None, ...]


def make_call(
    operands: Any,
    tensors: Any,
    rewards: Any,
    normalization: Any,
    per_token: Tensors,
    numbers: LossNumbers,
    head_sketch: HeadSketch | None,
    product_dtype: torch.dtype | None = None,
) -> LossCall:
    """Checks the arguments of ``linear_grpo_loss``. ``product_dtype``: default that of ``compute_dtype``."""
    hidden_NH, weight_VH, bias, *pair = operands
    targets_N, sequence_N, weights_B, advantages, advantages_N = tensors
    low_rank = None if pair[0] is None and pair[1] is None else tuple(pair)
    check_head(
        hidden_NH, weight_VH, targets_N, bias, low_rank, numbers.temperature, numbers.logit_scale, numbers.softcap
    )
    check_flag("float32_logits", numbers.float32_logits)
    if hidden_NH.ndim != 2:
        raise ValueError(f"hidden_NH has shape {tuple(hidden_NH.shape)}: expected (N, H)")
    options = check_loss_options(
        loss_type=numbers.loss_type,
        epsilon=numbers.epsilon,
        epsilon_high=numbers.epsilon_high,
        delta=numbers.delta,
        sapo_temperatures=numbers.sapo_temperatures,
        beta=numbers.beta,
        kl_times_ratio=numbers.kl_times_ratio,
    )
    if numbers.beta and per_token[1] is None:
        raise ValueError(f"beta={numbers.beta!r} needs ref_logprobs_N")
    check_number("entropy_coef", numbers.entropy_coef)
    given = GivenAdvantages(advantages, advantages_N, rewards, normalization)
    named = dict(zip(("old_logprobs_N", "ref_logprobs_N", "policy_scale_N"), per_token, strict=True))
    return LossCall(
        product_dtype or compute_dtype(hidden_NH),
        read_tokens(targets_N, sequence_N, weights_B, given, named, len(weight_VH)),
        Transform(float(numbers.temperature), float(numbers.logit_scale), numbers.softcap),
        options,
        numbers.entropy_coef / max(len(hidden_NH), 1),
        usable_sketch(head_sketch, weight_VH),
        numbers.float32_logits,
    )


def loss_in_a_graph(operands: Any, tensors: Any, rewards: Any, normalization: Any, per_token: Any, numbers: Any):
    """Calls the operator, for ``torch.compile``: tensors and scalars only."""
    method, options = ("std", {}) if normalization is None else normalization
    if not set(options) <= {"eps", "alpha"}:
        raise ValueError(f"normalization={normalization!r}: under torch.compile its options are eps and alpha")
    grad = torch.is_grad_enabled()
    needs = [grad and operand is not None and operand.requires_grad for operand in operands]
    return loss_operator(
        *operands,
        needs,
        compute_dtype(operands[0]),
        *tensors,
        *((None, None) if rewards is None else rewards),
        None if normalization is None else method,
        options.get("eps"),
        options.get("alpha"),
        *per_token,
        *(list(number) if isinstance(number, tuple) else number for number in numbers),
    )[: 2 + len(DETAILS)]


@torch.library.custom_op("grpo_kernels::linear_grpo_loss", mutates_args=(), schema=SCHEMA)
def loss_operator(*arguments):
    """Returns the loss, the policy loss, ``DETAILS``, the operands' gradients (empty: not needed), and their units."""
    operands, needs, dtype, tensors, rewards, normalization, per_token, numbers = _unflatten(arguments)
    with torch.autocast(operands[0].device.type, enabled=False):
        call = make_call(operands, tensors, rewards, normalization, per_token, numbers, None, dtype)
        found = run_loss(call, needs, operands)
    work = found.loss.dtype
    ones = torch.ones(OPERANDS, dtype=work, device=found.loss.device)
    for place, unit in enumerate(found.units):
        if unit is not None:
            ones[place] = unit
    totals = [found.loss.new_empty(0) if total is None else total.to(work) for total in found.totals]
    details = [found.logs[name].clone() for name in DETAILS]  # they may be views of one tensor
    return found.loss, found.policy_loss, *details, *totals, ones


@loss_operator.register_fake
def _shapes(*arguments):
    operands, needs, dtype, *_ = _unflatten(arguments)
    work = torch.promote_types(dtype, torch.float32)
    scalar = operands[0].new_empty((), dtype=work)
    values = {name: scalar.new_empty(operands[0].shape[0]) for name in DETAILS}
    values["clipped"] = values["clipped"].new_empty(values["clipped"].shape, dtype=torch.bool)
    totals = [scalar.new_empty(operand.shape if need else 0) for operand, need in zip(operands, needs, strict=True)]
    return scalar, scalar.new_empty(()), *values.values(), *totals, scalar.new_empty(OPERANDS)


def _keep(ctx, inputs, output):
    ctx.needs, ctx.count = inputs[OPERANDS], len(inputs)
    ctx.dtypes = [None if operand is None else operand.dtype for operand in inputs[:OPERANDS]]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[2 + len(DETAILS) :])


def _backward(ctx, loss_grad, *_):
    refuse_second_derivatives()
    *totals, units = ctx.saved_tensors
    grads = [None] * ctx.count
    for place, total in enumerate(totals):
        if ctx.needs[place] and loss_grad is not None:
            grads[place] = (total * (loss_grad * units[place])).to(ctx.dtypes[place])
    return tuple(grads)


loss_operator.register_autograd(_backward, setup_context=_keep)


def _unflatten(arguments: Any) -> tuple[Any, ...]:
    """Returns the groups of arguments that ``_make_call`` takes, from those of the schema."""
    *operands, needs, dtype = arguments[: OPERANDS + 2]
    tensors, (rewards, position, method, eps, alpha) = arguments[7:12], arguments[12:17]
    options = {name: value for name, value in (("eps", eps), ("alpha", alpha)) if value is not None}
    pair, normalization = (rewards, position) if rewards is not None else None, (method, options) if method else None
    return tuple(operands), needs, dtype, tensors, pair, normalization, arguments[17:20], LossNumbers(*arguments[20:])
