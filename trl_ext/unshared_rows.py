"""Lays the samples of a row of TRL's ``AsyncGRPOTrainer`` out one after another, so that they share no position.

TRL's collator packs a micro-batch into one row for each rank. A row is a trie: a prefix of several samples is forwarded
once, and the gradient at its positions is the sum of theirs. TRL's loss is a sum over tokens, divided by their number
on all ranks. So a row's gradient is the sum over forwards that hold some of its samples each.

Shapes: R rows, S samples of a row, L tokens of all its samples, N forwarded tokens, M trained tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

Batch = dict[str, torch.Tensor]
# our columns of a batch: (R, L) the packed position of each sample's tokens, and (R, S) of its samples
PATH, LENGTH, GROUP, SIZE = "recorder_path", "recorder_length", "recorder_group", "recorder_size"
REWARD, ADVANTAGE = "recorder_reward", "recorder_advantage"


def sample_columns(rows: list[Any], group_size: Callable[[int], int]) -> Batch:
    """Returns our columns of the rows that TRL's collator packs, padded with -1.

    Args:
        rows: (R,) TRL's ``TreeRow``.
        group_size: returns the samples of a group that is whole.

    Raises:
        ValueError: a sample has no reward.
    """
    columns: dict[str, list[torch.Tensor]] = {}
    for row in rows:
        if not all("reward" in sample["metrics"] for sample in row.samples):
            raise ValueError("a sample of the rollout worker has no metrics['reward']")
        place = packed_positions(row)
        groups = [int(sample["group_id"]) for sample in row.samples]
        values = {
            PATH: torch.tensor([place[node] for nodes in row.sample_nodes for node in nodes]),
            LENGTH: torch.tensor([len(nodes) for nodes in row.sample_nodes]),
            GROUP: torch.tensor(groups),
            SIZE: torch.tensor([group_size(group) for group in groups]),
            REWARD: torch.tensor([float(sample["metrics"]["reward"]) for sample in row.samples]),
            ADVANTAGE: torch.tensor([float(sample["advantage"]) for sample in row.samples]),
        }
        for name, value in values.items():
            columns.setdefault(name, []).append(value)
    return {name: pad_sequence(of_rows, batch_first=True, padding_value=-1) for name, of_rows in columns.items()}


def packed_positions(row: Any) -> dict[int, int]:
    """Returns each trie node's position in the packed row: TRL packs a row's nodes in depth-first order."""
    place: dict[int, int] = {}
    stack = list(reversed(row.roots.values()))
    while stack:
        node = stack.pop()
        place[node] = len(place)
        stack.extend(reversed(row.children[node].values()))
    return place


@dataclass(frozen=True)
class Forward:
    """One forward of some of a row's samples.

    Attributes:
        inputs: the batch for TRL's ``training_step``.
        samples: the samples that are recorded with it, as indices of the row.
        segment_RT: (1, N) each position's place in ``samples``, -1 for none.
    """

    inputs: Batch
    samples: list[int]
    segment_RT: torch.Tensor


@dataclass(frozen=True)
class UnsharedRow:
    """One rank's row as forwards in which no two samples share a position.

    Attributes:
        forwards: the one that TRL would run if the row's samples share nothing.
        shared: whether they share a position.
        idle: a forward of one sample whose gradient is 0, for a rank that has fewer forwards than another.
    """

    forwards: list[Forward]
    shared: bool
    idle: Batch


def unshare(inputs: Batch, token_budget: int | None) -> UnsharedRow:
    """Splits a row into forwards of at most ``token_budget`` tokens, or of as many as the row has.

    Args:
        inputs: one rank's batch, with our columns.
        token_budget: TRL's option; None, 0 or below: there is none.

    Raises:
        KeyError: the batch lacks a column.
    """
    length_S = inputs[LENGTH][0]
    lengths = length_S[length_S >= 0].tolist()
    paths = list(inputs[PATH][0, : sum(lengths)].split(lengths))
    n_tokens = int(inputs["attention_mask"].sum())
    trained = inputs["segment_id"][inputs["token_index"] >= 0].unique().tolist()
    idle = lay_out(inputs, paths, [min(trained, key=lambda sample: lengths[sample])])
    idle |= {name: torch.zeros_like(idle[name]) for name in ("advantages", "old_log_probs")}
    if sum(lengths) == n_tokens:
        segment_N = torch.empty(n_tokens, dtype=torch.long, device=length_S.device)
        for sample, path in enumerate(paths):
            segment_N[path] = sample
        return UnsharedRow([Forward(inputs, list(range(len(paths))), segment_N[None])], False, idle)
    forwards = []
    untrained = sorted(set(range(len(paths))) - set(trained))  # recorded without a forward: their gradient is 0
    for part in split(trained, lengths, max(n_tokens, token_budget or 0)):
        place = torch.arange(len(part), device=length_S.device)
        segment_RT = place.repeat_interleave(torch.tensor([lengths[s] for s in part], device=place.device))[None]
        forwards.append(Forward(lay_out(inputs, paths, part), part + untrained, segment_RT))
        untrained = []
    return UnsharedRow(forwards, True, idle)


def split(samples: list[int], lengths: list[int], budget: int) -> list[list[int]]:
    """Splits samples, in their order, into parts of at most ``budget`` tokens; no sample is longer."""
    parts: list[list[int]] = []
    room = 0
    for sample in samples:
        if lengths[sample] > room:
            parts.append([])
            room = budget
        parts[-1].append(sample)
        room -= lengths[sample]
    return parts


def lay_out(inputs: Batch, paths: list[torch.Tensor], samples: list[int]) -> Batch:
    """Returns the batch of these samples as TRL's collator would pack them if they shared nothing.

    The divisor of the loss stays that of the whole micro-batch.
    """
    path_N = torch.cat([paths[sample] for sample in samples])
    ids_N, depth_N = inputs["input_ids"][0, path_N], inputs["position_ids"][0, path_N]
    border = torch.tensor([0, *(len(paths[sample]) for sample in samples)], device=path_N.device).cumsum(0)
    terms: dict[str, list[torch.Tensor]] = {"token_index": [], "old_log_probs": [], "advantages": [], "segment_id": []}
    for place, sample in enumerate(samples):
        own = (inputs["segment_id"] == sample) & (inputs["token_index"] >= 0)
        # a token's depth in the trie is its place in its sample
        terms["token_index"].append(inputs["position_ids"][0, inputs["token_index"][own]] + border[place])
        terms["segment_id"].append(torch.full_like(inputs["segment_id"][own], place))
        for name in ("old_log_probs", "advantages"):
            terms[name].append(inputs[name][own])
    joined = {name: torch.cat(values)[None] for name, values in terms.items()}
    index_M = joined["token_index"][0]
    label_N = torch.full_like(ids_N, -100)
    label_N[index_M] = ids_N[index_M + 1]
    longest = border.diff().max().expand(1, 2)
    return {
        **inputs,
        **joined,
        "input_ids": ids_N[None],
        "position_ids": depth_N[None],
        "shift_labels": label_N[None],
        "attention_mask": torch.ones_like(ids_N)[None],
        "tree_kv_index": torch.arange(len(ids_N), device=ids_N.device)[None],
        "tree_cu_seqlens_q": border.int()[None],
        "tree_cu_seqlens_k": border.int()[None],
        "tree_max_seqlens": longest,
    }
