"""Defines the keys of TRL's per-sequence dict and of the columns that we add; no other file knows them.

``GRPOTrainer._generate_and_score_completions`` returns the dict, TRL shuffles and splits it, and ``_compute_loss`` gets
one part. ``Sequences`` reads it by attribute.

Shapes: B sequences, W prompt columns (padded on the left), T completion columns (padded on the right), C = W + T, G
completions of one prompt, F reward functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from .compat import ChangedTRL

Batch = dict[str, Any]


class Column(NamedTuple):
    """How a (B, T) column is padded: on which side and with which value (None: the tokenizer's padding token).

    The side "both" means that a row holds prompt and completion, padded on both sides.
    """

    side: str
    padding: float | None


COLUMNS = {
    "prompt_ids": Column("left", None),
    "prompt_mask": Column("left", 0),
    "completion_ids": Column("right", None),
    "completion_mask": Column("right", 0),
    "tool_mask": Column("right", 1),
    "old_per_token_logps": Column("right", 0.0),
    "ref_per_token_logps": Column("right", 0.0),
    "sampling_per_token_logps": Column("right", 0.0),
    "importance_sampling_ratio": Column("right", 1.0),
    "token_type_ids": Column("both", 0),
    "mm_token_type_ids": Column("both", 0),
}
ALWAYS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages")
OLD, REFERENCE = "old_per_token_logps", "ref_per_token_logps"
POSTPONED = (OLD, REFERENCE)
TOKEN_TYPES = tuple(name for name, column in COLUMNS.items() if column.side == "both")
IMAGES = ("pixel_values", "image_grid_thw", "num_images")
ONE_EACH = ("advantages",)  # (B,)
ITEMS = "num_items_in_batch"
OF_THE_BATCH = (ITEMS,)  # 0-d
# the columns that ``split_rows`` splits by row and ``pad_rows`` pads again
PADDED = {name: column for name, column in COLUMNS.items() if column.side != "both"}
# the columns that are kept of skipped sequences; the batch of a subclass may lack our columns
OF_SKIPPED = (
    "prompt_id",
    "prompt_key",
    "group_rewards",
    "group_position",
    "function_rewards",
    "generated",
    "advantages",
    "token_weight",
)


def _column(name: str) -> Any:
    """Returns a property that reads the column ``name``; None if the batch lacks it."""
    return property(lambda sequences: sequences.columns.get(name))


class Sequences:
    """Reads TRL's dict of B sequences by attribute, without copying or changing it.

    Our own columns:
        prompt_id: (B,) int64, the number of the sequence's group in the generation batch, the same on every rank.
        group_position: (B,) int64 in [0, G), the sequence's position in its group.
        prompt_key: (B,) int64, a hash of the prompt, the same in every batch.
        group_rewards: (B, G), the weighted rewards of the sequence's group, NaN where unscorable.
        function_rewards: (B, F), the rewards of the sequence by function.
        generated: (B,) int64, the number of generated tokens.
        token_weight: (B,), the weight of a token in the loss; only in regrouped micro-batches.
    """

    def __init__(self, columns: Batch) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["prompt_ids"])

    prompt_mask = _column("prompt_mask")  # (B, W)
    completion_mask = _column("completion_mask")  # (B, T)
    completion_ids = _column("completion_ids")  # (B, T)
    advantages = _column("advantages")  # (B,); a subclass may have one for each token, (B, T)
    tool_mask = _column("tool_mask")  # (B, T)
    old_logprobs = _column(OLD)  # (B, T)
    ref_logprobs = _column(REFERENCE)  # (B, T)
    sampling_logprobs = _column("sampling_per_token_logps")  # (B, T), from vLLM
    importance_ratio = _column("importance_sampling_ratio")  # (B, T) or (B, 1)
    num_items = _column(ITEMS)  # 0-d: tokens of the generation batch that the loss counts
    prompt_id = _column("prompt_id")
    group_position = _column("group_position")
    prompt_key = _column("prompt_key")
    group_rewards = _column("group_rewards")
    function_rewards = _column("function_rewards")
    generated = _column("generated")
    token_weight = _column("token_weight")

    @property
    def prompt_width(self) -> int:
        """W, the number of prompt columns."""
        return self.columns["prompt_ids"].shape[1]

    @property
    def width(self) -> int:
        """T, the number of completion columns."""
        return self.completion_ids.shape[1]

    @property
    def input_ids(self) -> torch.Tensor:
        """(B, C) token ids of prompt and completion."""
        return torch.cat([self.columns["prompt_ids"], self.completion_ids], dim=1)

    @property
    def attention_mask(self) -> torch.Tensor:
        """(B, C), 1 at tokens and 0 at padding."""
        return torch.cat([self.prompt_mask, self.completion_mask], dim=1)

    @property
    def live_mask(self) -> torch.Tensor:
        """(B, T) bool: completion tokens that the loss counts, neither padding nor tool output."""
        mask_BT = self.completion_mask
        return (mask_BT if self.tool_mask is None else mask_BT * self.tool_mask).bool()

    @property
    def live_tokens(self) -> torch.Tensor:
        """(B,) int64: how many tokens of each sequence the loss counts."""
        return self.live_mask.sum(dim=1)

    @property
    def has_images(self) -> bool:
        """Whether the batch holds images."""
        return any(self.columns.get(name) is not None for name in IMAGES)

    @property
    def token_types(self) -> Batch:
        """The model's token type inputs (B, C), by name."""
        return {name: self.columns[name] for name in TOKEN_TYPES if self.columns.get(name) is not None}

    @property
    def positions(self) -> int:
        """Token positions that the backbone sees, padding included."""
        return len(self) * (self.prompt_width + self.width)

    @property
    def token_count(self) -> torch.Tensor:
        """0-d: tokens of prompts and completions, without padding."""
        return self.prompt_mask.sum() + self.completion_mask.sum()

    def with_columns(self, **columns: Any) -> Sequences:
        """Returns the same sequences with these columns added or replaced, in a new dict."""
        return Sequences({**self.columns, **columns})

    def select(self, index_B: torch.Tensor, prompt_width: int | None = None, width: int | None = None) -> Sequences:
        """Returns the rows ``index_B``, with only some columns of prompt and completion.

        Args:
            prompt_width: how many prompt columns to keep, the last ones; None: all.
            width: how many completion columns to keep, the first ones; None: all.
        """
        n_rows, all_prompt, all_completion = len(self), self.prompt_width, self.width
        cut = all_prompt - (all_prompt if prompt_width is None else prompt_width)
        kept = all_completion if width is None else width
        chosen: Batch = {}
        for name, value in self.columns.items():
            if isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == n_rows:
                value = value[index_B]
                side = COLUMNS[name].side if name in COLUMNS else None
                if side == "left":
                    value = value[:, cut:]
                elif side == "right" and value.shape[1] == all_completion:
                    value = value[:, :kept]
                elif side == "both":
                    value = value[:, cut : all_prompt + kept]
            elif isinstance(value, list) and len(value) == n_rows:
                value = [value[i] for i in index_B.tolist()]
            chosen[name] = value
        return Sequences(chosen)

    def of_skipped(self, index_B: torch.Tensor) -> Sequences | None:
        """Returns our columns of the skipped rows ``index_B``; None if the batch of a subclass lacks one."""
        if any(name not in self.columns for name in OF_SKIPPED):
            return None
        return Sequences({name: self.columns[name][index_B] for name in OF_SKIPPED})


def join(parts: Sequence[Sequences]) -> Sequences:
    """Concatenates batches of the same widths; entries of a batch as a whole are those of the first batch."""
    columns = dict(parts[0].columns)
    for name, value in parts[0].columns.items():
        if isinstance(value, torch.Tensor) and value.ndim > 0:
            columns[name] = torch.cat([part.columns[name] for part in parts])
        elif isinstance(value, list):
            columns[name] = [item for part in parts for item in part.columns[name]]
    return Sequences(columns)


def check_keys(batch: Mapping[str, Any]) -> None:
    """Raises ``ChangedTRL`` if TRL's dict lacks a required key."""
    missing = [name for name in ALWAYS if name not in batch]
    if missing:
        raise ChangedTRL(f"the batch that GRPOTrainer makes has no {', '.join(missing)}")


def split_rows(output: Batch, lengths: list[int]) -> list[dict[str, torch.Tensor]]:
    """Splits TRL's dict into one dict per sequence of this rank, without padding, on the CPU.

    ``lengths``: completion tokens of each sequence. ``pad_rows`` is the inverse.
    """
    check_rows(output)
    rows: list[dict[str, torch.Tensor]] = []
    for i, length in enumerate(lengths):
        row = {}
        for name, column in PADDED.items():
            if name not in output:
                continue
            value = output[name][i]
            if column.side == "left":
                value = value[output["prompt_mask"][i].bool()]
            elif len(value) == 1:  # an importance ratio of the whole sequence, or of its only token
                value = value[0]
            else:
                value = value[:length]
            row[name] = value.cpu()
        row.update({name: output[name][i].cpu() for name in ONE_EACH})
        rows.append(row)
    return rows


def check_rows(output: Batch) -> None:
    """Raises ``ValueError`` for a column that can't be split by row, such as images."""
    unknown = set(output) - set(PADDED) - set(ONE_EACH) - set(OF_THE_BATCH)
    if unknown:
        raise ValueError(f"resample_zero_variance=True doesn't support batches with {', '.join(sorted(unknown))}")


def pad_rows(rows: list[dict[str, torch.Tensor]], pad_token_id: int, multiple_of: int | None, device: Any):
    """Returns TRL's dict of these rows, padded: the inverse of ``split_rows``."""
    output = {name: torch.stack([row[name] for row in rows]).to(device) for name in ONE_EACH}
    for name, (side, value) in PADDED.items():
        if name not in rows[0]:
            continue
        values = [row[name] for row in rows]
        if all(v.ndim == 0 for v in values):
            output[name] = torch.stack(values)[:, None].to(device)
            continue
        values = [v.view(-1) for v in values]
        filling = pad_token_id if value is None else value
        padded = pad_sequence(values, batch_first=True, padding_value=filling, padding_side=side)
        missing = -padded.shape[1] % (multiple_of or 1)
        sides = (missing, 0) if side == "left" else (0, missing)
        output[name] = torch.nn.functional.pad(padded, sides, value=filling).to(device)
    return output


def num_items(rows: list[Batch], output: Batch) -> Batch:
    """Returns ``num_items_in_batch`` of ``rows`` (tokens that the loss counts), with ``output``'s dtype and device."""
    count = sum(int((row["completion_mask"] * row.get("tool_mask", 1)).sum()) for row in rows)
    before = output[ITEMS]
    return {ITEMS: torch.as_tensor(count, device=before.device, dtype=before.dtype)}
