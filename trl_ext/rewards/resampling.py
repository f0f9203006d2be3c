"""Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): prompts whose answers all got the same reward make room.

Flow: TRL's rollouts and rewards of a batch -> its groups, gathered over processes -> while too few have different
rewards: other prompts, another generation -> the first live groups, in the order they were drawn, filled up with dead
ones -> TRL's per-sequence dict and logged table, as if these had been the batch.

Shapes: P prompts, G completions of one prompt, B = P*G sequences (of all processes), F reward functions.

What is drawn depends on ``seed``, the step and the dataset alone: the same on every process, and after a resume.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import IterableDataset
from trl.trainer.utils import pad

from .advantages import zero_variance_groups
from .prompt_keys import prompt_key

# what each name of TRL's dict is padded with, and on which side; others are numbers, one a sequence
PADDING = {
    "prompt_ids": (None, "left"),  # the tokenizer's padding token
    "prompt_mask": (0, "left"),
    "completion_ids": (None, "right"),
    "completion_mask": (0, "right"),
    "tool_mask": (1, "right"),
    "old_per_token_logps": (0.0, "right"),
    "ref_per_token_logps": (0.0, "right"),
    "sampling_per_token_logps": (0.0, "right"),
    "importance_sampling_ratio": (1.0, "right"),
}
ONE_EACH = ("advantages",)
OF_THE_BATCH = ("num_items_in_batch",)


def check_dataset(dataset: Any) -> None:
    """Raises ``ValueError`` for one that other prompts can't be drawn from, or whose images couldn't be moved."""
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise ValueError(
            f"resample_zero_variance=True: other prompts can't be drawn from a {type(dataset).__name__}, "
            "which has no length; it needs a map-style train_dataset"
        )
    images = {"image", "images"} & set(getattr(dataset, "column_names", None) or ())
    if images:
        raise ValueError(f"resample_zero_variance=True: the column {images.pop()!r} of train_dataset isn't supported")


@dataclass
class Round:
    """One generation of all processes, a row a sequence; ``logged`` are TRL's columns of the completions table."""

    rows: list[dict[str, torch.Tensor]]
    rewards_BF: torch.Tensor
    lengths_B: torch.Tensor
    keys_B: torch.Tensor
    logged: dict[str, list[Any]]
    dead_P: torch.Tensor


def split_rows(output: dict[str, Any], lengths: list[int]) -> list[dict[str, torch.Tensor]]:
    """TRL's dict as a dict for each of this process's sequences, without padding, on the CPU.

    ``ValueError`` for what isn't a row's own, such as images.
    """
    unknown = set(output) - set(PADDING) - set(ONE_EACH) - set(OF_THE_BATCH)
    if unknown:
        raise ValueError(f"resample_zero_variance=True doesn't support batches with {', '.join(sorted(unknown))}")
    rows: list[dict[str, torch.Tensor]] = []
    for i, length in enumerate(lengths):
        row = {}
        for name in PADDING:
            if name not in output:
                continue
            value = output[name][i]
            if PADDING[name][1] == "left":
                value = value[output["prompt_mask"][i].bool()]
            elif len(value) == 1:  # an importance ratio of the sequence, or of its only token
                value = value[0]
            else:
                value = value[:length]
            row[name] = value.cpu()
        row.update({name: output[name][i].cpu() for name in ONE_EACH})
        rows.append(row)
    return rows


def pad_rows(rows: list[dict[str, torch.Tensor]], pad_token_id: int, multiple_of: int | None, device: Any):
    """The way back: TRL's dict of these rows."""
    output = {name: torch.stack([row[name] for row in rows]).to(device) for name in ONE_EACH}
    for name, (value, side) in PADDING.items():
        if name not in rows[0]:
            continue
        values = [row[name] for row in rows]
        if all(v.ndim == 0 for v in values):
            output[name] = torch.stack(values)[:, None].to(device)
            continue
        values = [v.view(-1) for v in values]
        filling = pad_token_id if value is None else value
        output[name] = pad(values, filling, side, pad_to_multiple_of=multiple_of).to(device)  # type: ignore[arg-type]
    return output


class Resampling:
    """What ``CurvatureGRPOTrainer`` does with a batch of rollouts before it normalises the rewards."""

    def __init__(self, trainer: Any) -> None:
        args = trainer.args
        self.trainer = trainer
        self.n_prompts = args.generation_batch_size // args.num_generations
        wanted = getattr(args, "resample_live_prompts", None)
        self.wanted = self.n_prompts if wanted is None else wanted
        self.max_rounds = getattr(args, "resample_max_rounds", 4)

    def fill(self, output: dict[str, Any], n_local: int) -> dict[str, Any]:
        """The batch to train on; ``output`` is TRL's dict of the first generation, of ``n_local`` sequences here."""
        rounds = [self._take(output, n_local)]
        seen = set(rounds[0].keys_B.tolist())
        order = self._order()
        while self._live(rounds) < self.wanted and len(rounds) <= self.max_rounds:
            others = self._other_prompts(order, seen, n_local)
            if others is None:
                self.trainer._say_once(
                    "resample_zero_variance: the dataset has no other prompts left to draw in this step; the batch "
                    "keeps its dead ones."
                )
                break
            rounds.append(self._take(self.trainer._generate_and_reward(others), n_local))
        metrics = self.trainer._metrics["train"]
        metrics["resampling/rounds"].append(float(len(rounds)))
        metrics["resampling/prompts_drawn"].append(float(len(rounds) * self.n_prompts))
        metrics["resampling/live_prompts"].append(float(min(self._live(rounds), self.n_prompts)))
        return output if len(rounds) == 1 else self._merge(rounds, output, n_local)

    def _live(self, rounds: list[Round]) -> int:
        return sum(int((~one.dead_P).sum()) for one in rounds)

    def _take(self, output: dict[str, Any], n_local: int) -> Round:
        trainer = self.trainer
        first = trainer.accelerator.process_index * n_local
        lengths = trainer._gathered_lengths_B[first : first + n_local].tolist()
        logs, n = trainer._logs, len(trainer._gathered_rewards_BF)
        columns = {"prompt": logs["prompt"], "completion": logs["completion"]}
        columns |= {f"rewards {name}": column for name, column in logs["rewards"].items()}
        columns |= {f"extra {name}": column for name, column in logs["extra"].items()}
        return Round(
            rows=gather_object(split_rows(output, lengths)),
            rewards_BF=trainer._gathered_rewards_BF,
            lengths_B=trainer._gathered_lengths_B,
            keys_B=trainer._gathered_keys_B,
            logged={name: list(column)[-n:] for name, column in columns.items() if len(column) >= n},
            dead_P=zero_variance_groups(
                trainer._gathered_rewards_BF,
                trainer.reward_weights.to(trainer._gathered_rewards_BF.device),
                trainer.num_generations,
                trainer.multi_objective_aggregation,
            ).cpu(),
        )

    def _order(self) -> list[int]:
        """The dataset's rows in the order they are drawn in at this step."""
        trainer, args = self.trainer, self.trainer.args
        generator = torch.Generator()
        generator.manual_seed((args.seed * 1_000_003 + trainer.state.global_step) * 1_009 + trainer._generation_of_step)
        return torch.randperm(len(trainer.train_dataset), generator=generator).tolist()

    def _other_prompts(self, order: list[int], seen: set[int], n_local: int) -> list[dict[str, Any]] | None:
        """This process's examples of a batch of prompts not drawn for it yet, or None where they run out."""
        trainer = self.trainer
        found: list[dict[str, Any]] = []
        while order and len(found) < self.n_prompts:
            example = trainer.train_dataset[order.pop()]
            key = prompt_key(example["prompt"])
            if key not in seen:
                seen.add(key)
                found.append(example)
        if len(found) < self.n_prompts:
            return None
        first = trainer.accelerator.process_index * n_local
        return [dict(found[row // trainer.num_generations]) for row in range(first, first + n_local)]

    def _merge(self, rounds: list[Round], output: dict[str, Any], n_local: int) -> dict[str, Any]:
        """The chosen groups in place of the trainer's batch; what was gathered and logged with them."""
        trainer, n_generations = self.trainer, self.trainer.num_generations
        dead_P = torch.cat([one.dead_P for one in rounds])
        group_P = torch.cat([(~dead_P).nonzero().flatten(), dead_P.nonzero().flatten()])[: self.n_prompts]
        row_B = (group_P.sort().values[:, None] * n_generations + torch.arange(n_generations)).flatten()
        device = trainer._gathered_rewards_BF.device

        def chosen(name: str) -> torch.Tensor:
            return torch.cat([getattr(one, name) for one in rounds])[row_B.to(device)]

        trainer._gathered_rewards_BF = chosen("rewards_BF")
        trainer._gathered_lengths_B, trainer._gathered_keys_B = chosen("lengths_B"), chosen("keys_B")
        rows = [row for one in rounds for row in one.rows]
        rows = [rows[i] for i in row_B.tolist()]
        first = trainer.accelerator.process_index * n_local
        merged = pad_rows(
            rows[first : first + n_local], trainer._tokenizer.pad_token_id, trainer.pad_to_multiple_of, device
        )
        live = (row["completion_mask"] * row.get("tool_mask", 1) for row in rows)
        merged["num_items_in_batch"] = torch.as_tensor(
            sum(int(mask.sum()) for mask in live), device=device, dtype=output["num_items_in_batch"].dtype
        )
        self._replace_logged(rounds, row_B.tolist())
        return merged

    def _replace_logged(self, rounds: list[Round], rows: list[int]) -> None:
        """The table of completions holds the batch that is trained on."""
        logs, n = self.trainer._logs, len(rounds[0].rows)
        columns = {name: logs[name] for name in ("prompt", "completion")}
        columns |= {f"rewards {name}": column for name, column in logs["rewards"].items()}
        columns |= {f"extra {name}": column for name, column in logs["extra"].items()}
        for name, column in columns.items():
            values = [value for one in rounds for value in one.logged.get(name, [None] * n)]
            for _ in range(min(n, len(column))):
                column.pop()
            column.extend(values[row] for row in rows)
