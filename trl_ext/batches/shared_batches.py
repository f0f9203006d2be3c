"""Micro-batches of sequences that share prompts: whole groups together, up to a budget of tokens.

Shapes: B sequences of this process.
"""

from __future__ import annotations

from typing import Any

import torch

from trl_ext.asked_model import can_be_asked, evaluation_mode, multiplies_in_half, some_ids
from trl_ext.loss.fused_head import backbone
from trl_ext.loss.packed_rows import KEYWORD
from trl_ext.loss.shared_attention import NotShared
from trl_ext.loss.shared_prompts import let_share
from trl_ext.trl_surface import TOKEN_TYPES, RunSettings

from .batch_rows import RowTable, even_batches
from .columns import HALF_TOLERANCE, TOLERANCE

CAN_NOT = 1 << 40  # micro-batches, of a process whose rows can't
# of a position's memory, what a copy of a prompt's keys and values takes: reckoned (2 of about 14 tensors of the hidden
# width that a layer keeps), not measured; in parts, on a CPU, nothing is copied
COPIED = 0.15


def why_not_shared(run: RunSettings, model: Any, trim_prompts: bool, *, prepared: bool = False) -> str | None:
    """Why every sequence runs with a prompt of its own, or None; the model, with our head, is asked, by a few tokens,
    both ways.

    ``trim_prompts``: whether padding before prompts can be left out (``columns.py``): where it can't, positions aren't
    relative, or a state runs over the row. ``prepared``: the engine has the model.
    """
    if not run.options.share_prompts:
        return "share_prompts=False"
    if not run.options.fused_loss:
        return "fused_loss=False"
    if not trim_prompts:
        return "what the model says of a token depends on what stands before the sequence"
    if run.torch_compile:
        return "torch_compile=True"
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        return "the model is on several devices"
    if not can_be_asked(model, run.accelerator, prepared=prepared):
        return "the model's parameters aren't loaded"
    undo = let_share(without_adapters(model))
    try:
        moved, half = multiplies_in_half(model, lambda: moved_by_sharing(model))
    except Exception as error:
        return f"the model can't run so ({type(error).__name__}: {error})"
    finally:
        undo()
    if not moved <= (HALF_TOLERANCE if half else TOLERANCE):
        return f"what the model says changes with it, by {moved:.1e} of its size"
    return None


def without_adapters(model: Any) -> Any:
    """The model without an adapter's wrapper around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def moved_by_sharing(model: Any) -> float:
    """How far hidden states of two prompts' three answers are from those of rows of their own, relative."""
    ids = some_ids(model, 3, 12)
    ids[1, :6] = ids[0, :6]
    mask = torch.ones_like(ids)
    mask[2, :2] = mask[0, 10:] = 0  # a shorter prompt, a shorter answer
    seen: list[tuple[Any, torch.Tensor]] = []

    def see(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        seen.append((kwargs.get(KEYWORD), output.last_hidden_state))

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    hook = backbone(base).register_forward_hook(see, with_kwargs=True)
    try:  # the whole model is called, before which FSDP and ZeRO gather what it is made of
        with evaluation_mode(model), torch.no_grad():
            for width in (None, 6):
                options = {"labels": ids, "fused_lm_head": True, "shared_prompt_width": width}
                model(input_ids=ids, attention_mask=mask, **options)
    finally:
        hook.remove()
    (_, own), (rows, (packed,)) = seen
    if getattr(model.config.get_text_config(), "sliding_window", None) and rows.windows == {None}:
        raise NotShared("its sliding window is in the mask alone")
    shared, own = packed[rows.packed_BC[mask.bool()]].double(), own[mask.bool()].double()
    return float((shared - own).norm() / own.norm())


def can_share(batch: dict[str, Any], table: RowTable) -> bool:
    """Whether the rows of TRL's dict can: prompts are known, there and without gaps, and nothing else travels with
    their tokens."""
    if "prompt_id" not in batch or any(batch.get(name) is not None for name in TOKEN_TYPES):
        return False
    return not table.gaps


def largest(batches: list[torch.Tensor], table: RowTable) -> int:
    """Positions of the largest of these batches with padding."""
    return max(len(rows) * int(table.prompt_B[rows].max() + table.answer_B[rows].max()) for rows in batches)


def packed_positions(rows_B: torch.Tensor, table: RowTable) -> int:
    """Tokens of these sequences, each prompt once."""
    first = {prompt: row for row, prompt in zip(rows_B.tolist(), table.id_B[rows_B].tolist(), strict=True)}
    return int(table.answer_B[rows_B].sum() + table.prompt_B[list(first.values())].sum())


def shared_batches(table: RowTable, budget: int) -> list[list[int]]:
    """The rows of each micro-batch, of the wanted ones: prompts once, with copies of their keys and values, within the
    budget; a group that is larger is split. First fit, the largest first."""
    ids, prompts, answers = (column_B.tolist() for column_B in (table.id_B, table.prompt_B, table.answer_B))
    groups: dict[int, list[int]] = {}
    for row in table.wanted_B.nonzero().squeeze(1).tolist():
        groups.setdefault(ids[row], []).append(row)
    pieces: list[tuple[float, list[int]]] = []
    for rows in groups.values():
        cost, piece = 0.0, list[int]()
        for row in sorted(rows, key=lambda row: -answers[row]):
            own = answers[row] + COPIED * prompts[row]
            if piece and cost + own > budget:
                pieces.append((cost, piece))
                piece = []
            cost = cost + own if piece else prompts[row] + own
            piece.append(row)
        pieces.append((cost, piece))
    filled: list[float] = []
    batches: list[list[int]] = []
    for cost, piece in sorted(pieces, key=lambda piece: -piece[0]):
        place = next((i for i, full in enumerate(filled) if full + cost <= budget), None)
        if place is None:
            filled.append(cost)
            batches.append(piece)
        else:
            filled[place] += cost
            batches[place] += piece
    return batches


def as_many(batches: list[list[int]], n_batches: int, table: RowTable) -> list[torch.Tensor]:
    """``n_batches`` of them, as another process has: the largest are split, and where there aren't as many sequences,
    others that have no gradient make up for them."""
    batches = [list(rows) for rows in batches]
    while len(batches) < n_batches and any(len(rows) > 1 for rows in batches):
        rows = max(batches, key=len)
        batches.remove(rows)
        batches += [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
    if len(batches) < n_batches:
        return even_batches(table.wanted_B, table.length_B, n_batches, empty_B=table.live_B == 0)
    return [torch.tensor(rows) for rows in batches]
