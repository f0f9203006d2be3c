"""Checks the arguments of the head's public functions; each check raises a ``ValueError`` that names the value."""

from __future__ import annotations

import math

import torch

from .products import HeadSketch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_number(name: str, value: object, *, above: float | None = None, least: float | None = None) -> None:
    """Raises ``ValueError`` unless ``value`` is a finite number, greater than ``above`` and at least ``least``."""
    bound = f" above {above:g}" if above is not None else f" of at least {least:g}" if least is not None else ""
    fine = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not fine or (above is not None and value <= above) or (least is not None and value < least):  # type: ignore[operator]
        raise ValueError(f"{name}={value!r} must be a finite number{bound}")


def check_flag(name: str, value: object) -> None:
    """Raises ``ValueError`` unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be True or False")


def check_head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    low_rank: tuple[torch.Tensor, torch.Tensor] | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
) -> None:
    """Checks the arguments that ``linear_logprob`` and ``linear_grpo_loss`` share, except the targets' values."""
    _check_shapes(hidden, weight, targets)
    tensors = {"hidden": hidden, "weight": weight, "targets": targets}
    if bias is not None:
        if not isinstance(bias, torch.Tensor):
            raise ValueError(f"bias must be a tensor, got {type(bias).__name__}")
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias has shape {tuple(bias.shape)}: expected ({weight.shape[0]},)")
        tensors["bias"] = bias
    if low_rank is not None:
        _check_low_rank(low_rank, hidden, weight)
        tensors |= {"low_rank[0]": low_rank[0], "low_rank[1]": low_rank[1]}
    _check_devices_and_dtypes(tensors)
    check_number("temperature", temperature, above=0)
    check_number("logit_scale", logit_scale)
    if softcap is not None:
        check_number("softcap", softcap, above=0)


def _check_shapes(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> None:
    """Checks that hidden states, weight and targets are tensors that fit each other."""
    for name, tensor in (("hidden", hidden), ("weight", weight), ("targets", targets)):
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if not hidden.is_floating_point() or hidden.is_sparse or weight.is_sparse:
        raise ValueError(f"hidden has dtype {hidden.dtype}, layouts {hidden.layout} and {weight.layout}: dense floats")
    if hidden.ndim == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}: its last dimension must be at least 1")
    if weight.ndim != 2 or hidden.ndim not in (2, 3) or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} don't fit: expected (N, H) or (B, T, H), "
            "and (V, H)"
        )
    if weight.shape[0] == 0:
        raise ValueError("weight has no rows: the vocabulary is empty")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets have shape {tuple(targets.shape)}: expected hidden's, {tuple(hidden.shape[:-1])}")
    if targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"targets have dtype {targets.dtype}: expected torch.int64 or torch.int32")


def _check_low_rank(low_rank: tuple[torch.Tensor, torch.Tensor], hidden: torch.Tensor, weight: torch.Tensor) -> None:
    """Checks that the adapter's two factors fit hidden states and weight."""
    pair = isinstance(low_rank, tuple) and len(low_rank) == 2
    if not pair or not all(isinstance(tensor, torch.Tensor) for tensor in low_rank):
        raise ValueError("low_rank must be a pair of tensors: (N, R) and (V, R)")
    inputs, matrix = low_rank
    fits = inputs.ndim == hidden.ndim and inputs.shape[:-1] == hidden.shape[:-1] and matrix.ndim == 2
    if not fits or matrix.shape != (weight.shape[0], inputs.shape[-1]) or matrix.shape[1] == 0:
        raise ValueError(
            f"low_rank has shapes {tuple(inputs.shape)} and {tuple(matrix.shape)}: expected "
            f"{(*hidden.shape[:-1], 'R')} and ({weight.shape[0]}, R)"
        )


def _check_devices_and_dtypes(tensors: dict[str, torch.Tensor]) -> None:
    """Checks that all tensors, by name, are on hidden's device, and all but the targets are floats."""
    device = tensors["hidden"].device
    for name, given in tensors.items():
        if given.device != device:
            raise ValueError(f"{name} is on {given.device} and hidden on {device}: they must be on one device")
        if name != "targets" and given.dtype not in DTYPES:
            names = ", ".join(str(dtype) for dtype in DTYPES)
            raise ValueError(f"{name} has dtype {given.dtype}: expected one of {names}")


def check_values(ranges: list[tuple[str, torch.Tensor, int]], rewards_BG: torch.Tensor | None = None) -> None:
    """Raises ``ValueError`` unless each ("name holds", tensor, n) has integers in [0, n), and rewards aren't infinite.

    All checks together wait for a GPU once.
    """
    ranges = [entry for entry in ranges if entry[1].numel()]
    bounds = [bound.long() for _, tensor, _ in ranges for bound in tensor.aminmax()]
    if rewards_BG is not None:
        bounds.append(rewards_BG.isinf().any().long())
    if not bounds:
        return
    found = torch.stack(bounds).tolist()
    for (what, _, n), low, high in zip(ranges, found[0::2], found[1::2], strict=False):
        if low < 0 or high >= n:
            raise ValueError(f"{what} {low if low < 0 else high}: expected values in [0, {n})")
    if rewards_BG is not None and found[-1]:
        row, column = rewards_BG.isinf().nonzero()[0].tolist()
        raise ValueError(
            f"rewards[0][{row}, {column}] is {rewards_BG[row, column].item()}: rewards must be finite or NaN"
        )


def check_per_token(name: str, tensor: torch.Tensor | None, count: int, device: torch.device) -> None:
    """Raises ``ValueError`` unless ``tensor`` is None, or a floating-point tensor (count,) on ``device``."""
    if tensor is None:
        return
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or tensor.shape != (count,):
        shape = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        dtype = f" of {tensor.dtype}" if isinstance(tensor, torch.Tensor) else ""
        raise ValueError(f"{name} is {shape}{dtype}: expected ({count},), floating point")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device} and hidden on {device}: they must be on one device")


def usable_sketch(sketch: HeadSketch | None, weight_VH: torch.Tensor) -> HeadSketch | None:
    """Returns ``sketch`` if it fits the head; if it doesn't, calls its ``on_error`` and returns None."""
    if sketch is None:
        return None
    fits = False
    with sketch.guarded():
        _check_head_sketch(sketch, weight_VH)
        fits = True
    return sketch if fits else None


def _check_head_sketch(sketch: HeadSketch, weight_VH: torch.Tensor) -> None:
    """Checks that the projection fits the vocabulary and the device, and that the weight is trainable."""
    if not weight_VH.requires_grad:
        raise ValueError("head_sketch is of dL/dweight, and weight doesn't require a gradient")
    projection = sketch.projection
    if projection is not None and (projection.ndim != 2 or projection.shape[0] != weight_VH.shape[0]):
        raise ValueError(
            f"head_sketch.projection has shape {tuple(projection.shape)}: expected ({weight_VH.shape[0]}, k)"
        )
    if projection is not None and projection.device != weight_VH.device:
        raise ValueError(f"head_sketch.projection is on {projection.device} and weight on {weight_VH.device}")
