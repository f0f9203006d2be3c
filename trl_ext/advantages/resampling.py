"""Replaces dead groups of a batch by live groups of other prompts: dynamic sampling (DAPO, arXiv 2503.14476, 3.2).

Flow: TRL's rollouts and rewards of a batch -> as long as too few groups are live, a round of other prompts ->
the first live groups in the order they were drawn, filled up with dead ones, exchanged between ranks -> TRL's
per-sequence dict and completions table, as if these had been the batch.

Shapes: P prompts, G completions of one prompt, B = P*G sequences of all ranks, F reward functions.

The drawn prompts depend only on ``seed``, the step, the generation's number in it, and the dataset. So they are the
same on every rank, and after a resume.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import IterableDataset

from trl_ext.compat import RunSettings, logged_columns, replace_latest
from trl_ext.schema import Batch, Sequences, check_rows, num_items, pad_rows, split_rows

from .compute import zero_variance_groups
from .normalizer import Normalizer
from .prompt_keys import prompt_key
from .rewarded import RewardedBatch

Example = dict[str, Any]  # a row of the dataset


def has_transform(dataset: Any) -> bool:
    """Returns whether the dataset has a transform, which may make columns that aren't stored."""
    return (getattr(dataset, "format", None) or {}).get("type") == "custom"


def check_dataset(dataset: Any) -> None:
    """Raises ``ValueError`` for a dataset without random access or without stored prompts, or with images."""
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise ValueError(
            f"resample_zero_variance=True: other prompts can't be drawn from a {type(dataset).__name__}, "
            "which has no length; it needs a map-style train_dataset"
        )
    columns = set(getattr(dataset, "column_names", None) or ())
    if columns and not has_transform(dataset) and "prompt" not in columns:
        raise ValueError(
            "resample_zero_variance=True: train_dataset has no column 'prompt', so there are no other prompts to draw "
            "(an environment makes them)"
        )
    images = {"image", "images"} & columns
    if images:
        raise ValueError(f"resample_zero_variance=True: the column {images.pop()!r} of train_dataset isn't supported")


@dataclass(frozen=True)
class Round:
    """One round of generation.

    Attributes:
        rows: this rank's sequences, without padding.
        rewarded: the rewards of all ranks.
        logged: all ranks' columns of TRL's completions table.
        dead_P: (P,) bool, of all ranks.
    """

    rows: list[dict[str, torch.Tensor]]
    rewarded: RewardedBatch
    logged: dict[str, list[Any]]
    dead_P: torch.Tensor


class GenerationCount:
    """Numbers the generation batches of an optimizer step, so that each draws different prompts."""

    def __init__(self) -> None:
        self._step, self._number = -1, 0

    def next(self, step: int) -> int:
        """Returns the number of a new generation batch in this optimizer step, from 0."""
        self._number = self._number + 1 if step == self._step else 0
        self._step = step
        return self._number

    def forget(self) -> None:
        """Resets the count, when training starts."""
        self._step = -1


class Resampling:
    """Replaces dead groups of a batch by live ones, before its rewards are normalised."""

    def __init__(self, run: RunSettings, normalizer: Normalizer) -> None:
        self.run, self.accelerator, self.normalizer = run, run.accelerator, normalizer
        self.n_prompts, self.max_rounds = run.prompts_per_generation, run.options.resample_max_rounds
        wanted = run.options.resample_live_prompts
        self.wanted = self.n_prompts if wanted is None else wanted

    def begin(self, logs: Mapping[str, Any]) -> None:
        """Clears the extra columns of TRL's table before a round of generation.

        Otherwise a reward function that logs no extra column in this round would leave an earlier round's there.
        """
        for column in logs["extra"].values():
            column.clear()

    def fill(
        self,
        output: Batch,
        rewarded: RewardedBatch,
        logs: Mapping[str, Any],
        generate: Callable[[list[Example]], tuple[Batch, RewardedBatch]],
        *,
        dataset: Any,
        step: int,
        generation: int,
    ) -> tuple[Batch, RewardedBatch]:
        """Returns the batch to train on, and its rewards; ``logs`` then holds that batch.

        Args:
            output: TRL's dict of the first round.
            rewarded: the rewards of the first round.
            logs: TRL's completions table.
            generate: runs a round of generation on this rank's examples.
            dataset: where other prompts are drawn from.
            step: the optimizer step.
            generation: the number of the generation batch in this step.
        """
        n_local = len(Sequences(output))
        check_rows(output)
        rounds = [self._take(rewarded, logs)]
        seen = set(rewarded.keys_B.tolist())
        order = self._order(len(dataset), step, generation)
        while self._live(rounds) < self.wanted and len(rounds) <= self.max_rounds:
            others = self._other_prompts(dataset, order, seen, n_local, rewarded.num_generations)
            if others is None:
                self.run.log_once(
                    "resample_zero_variance: the dataset has no other prompts left to draw in this step; the batch "
                    "keeps its dead ones."
                )
                break
            if len(rounds) == 1:
                rounds[0].rows.extend(self._rows(output, rewarded))
            more, rewarded_more = generate(others)
            rounds.append(self._take(rewarded_more, logs))
            rounds[-1].rows.extend(self._rows(more, rewarded_more))
        self.run.log(
            {
                "resampling/rounds": float(len(rounds)),
                "resampling/prompts_drawn": float(len(rounds) * self.n_prompts),
                "resampling/live_prompts": float(min(self._live(rounds), self.n_prompts)),
            }
        )
        return (output, rewarded) if len(rounds) == 1 else self._merge(rounds, output, logs)

    def _live(self, rounds: list[Round]) -> int:
        return sum(int((~drawn.dead_P).sum()) for drawn in rounds)

    def _rows(self, output: Batch, rewarded: RewardedBatch) -> list[dict[str, torch.Tensor]]:
        n_local = len(Sequences(output))
        first = self.accelerator.process_index * n_local
        return split_rows(output, rewarded.lengths_B[first : first + n_local].tolist())

    def _take(self, rewarded: RewardedBatch, logs: Mapping[str, Any]) -> Round:
        """Returns a round without its rows; ``fill`` adds them if there is a second round."""
        n = len(rewarded.rewards_BF)
        dead_P = zero_variance_groups(
            rewarded.rewards_BF,
            rewarded.weights_F,
            rewarded.num_generations,
            self.normalizer.aggregation,
            self.normalizer.tolerance,
        )
        return Round(
            rows=[],
            rewarded=rewarded,
            logged={name: list(column)[-n:] for name, column in logged_columns(logs).items() if len(column) >= n},
            dead_P=dead_P.cpu(),
        )

    def _order(self, size: int, step: int, generation: int) -> list[int]:
        """Returns the dataset's rows in a random order, from whose end prompts are drawn."""
        generator = torch.Generator()
        generator.manual_seed((self.run.seed * 1_000_003 + step) * 1_009 + generation)
        return torch.randperm(size, generator=generator).tolist()

    def _other_prompts(
        self, dataset: Any, order: list[int], seen: set[int], n_local: int, num_generations: int
    ) -> list[Example] | None:
        """Returns this rank's examples of a round of new prompts; None if the dataset has too few left."""
        found: list[Example] = []
        while order and len(found) < self.n_prompts:
            example = dataset[order.pop()]
            key = prompt_key(example["prompt"])
            if key not in seen:
                seen.add(key)
                found.append(example)
        if len(found) < self.n_prompts:
            return None
        first = self.accelerator.process_index * n_local
        return [dict(found[row // num_generations]) for row in range(first, first + n_local)]

    def _merge(self, rounds: list[Round], output: Batch, logs: Mapping[str, Any]) -> tuple[Batch, RewardedBatch]:
        """Returns this rank's part of the chosen groups as TRL's dict, and their rewards; ``logs`` then holds them."""
        last, n_local = rounds[-1].rewarded, len(Sequences(output))
        dead_P = torch.cat([drawn.dead_P for drawn in rounds])
        group_P = torch.cat([(~dead_P).nonzero().flatten(), dead_P.nonzero().flatten()])[: self.n_prompts]
        row_B = (group_P.sort().values[:, None] * last.num_generations + torch.arange(last.num_generations)).flatten()
        device = last.rewards_BF.device

        def chosen(name: str) -> torch.Tensor:
            return torch.cat([getattr(drawn.rewarded, name) for drawn in rounds])[row_B.to(device)]

        rewarded = replace(
            last,
            rewards_BF=chosen("rewards_BF"),
            lengths_B=chosen("lengths_B"),
            keys_B=chosen("keys_B"),
            task_keys_B=chosen("task_keys_B"),
        )
        first, n = self.accelerator.process_index * n_local, len(rounds[0].rewarded.rewards_BF)
        wanted = set(row_B.tolist())
        own = {number * n + first + i: row for number, drawn in enumerate(rounds) for i, row in enumerate(drawn.rows)}
        found = {
            i: row for part in gather_object([{i: own[i] for i in own.keys() & wanted}]) for i, row in part.items()
        }
        rows = [found[i] for i in row_B.tolist()]
        merged = pad_rows(rows[first : first + n_local], self.run.pad_token_id, self.run.pad_to_multiple_of, device)
        merged |= num_items(rows, output)
        for name, column in logged_columns(logs).items():
            values = [value for drawn in rounds for value in drawn.logged.get(name, [None] * n)]
            replace_latest(column, [values[row] for row in row_B.tolist()])
        return merged, rewarded
