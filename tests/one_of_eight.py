"""One process of eight, at 512 prompts of 16 answers and k = 64: what it holds and makes of a large step."""

from types import SimpleNamespace

import pytest
import torch

from grpo_kernels.interference.inner_products import squared_norms
from grpo_kernels.recorder import collectives, measure
from grpo_kernels.recorder.measure import RecordedStep
from grpo_kernels.recorder.sequence_table import SequenceTable
from grpo_kernels.recorder.what_if_log import WhatIfLog
from grpo_kernels.recorder.what_if_step import STATELESS
from trl_ext.advantages.normalizer import UsedNormalization
from trl_ext.recorder.what_if import compared_with

P, G, K, H, PROCESSES = 512, 16, 64, 4096, 8


class OneOfEight:
    """Its exchanges move nothing, but bring as much as they would: the others have what this one has."""

    def all_reduce(self, values):
        pass

    def all_gather_into_tensor(self, gathered, values):
        gathered.view(PROCESSES, *values.shape)[:] = values
        columns = gathered.view(PROCESSES, *values.shape)
        first_P1 = torch.arange(PROCESSES, device=values.device)[:, None] * (P // PROCESSES)
        columns[:, :, 0] = first_P1 + values[:, 0]  # other processes have other prompts

    def all_to_all_single(self, arrived, sent):
        arrived.copy_(sent)


def one_of_eight(known, monkeypatch, measured, device="cpu"):
    """What the first process finds of a step, everything that it makes of it within ``measured``, a context."""
    network = OneOfEight()
    for name in ("all_reduce", "all_gather_into_tensor", "all_to_all_single"):
        monkeypatch.setattr(collectives.dist, name, getattr(network, name))
    exchanges = collectives.Collectives(torch.device(device), PROCESSES, 0)
    run = SimpleNamespace(
        options=SimpleNamespace(what_if=None, normalization_kwargs=None),
        prompts_per_generation=P,
    )

    def log_once(text, level="warning"):
        assert level == "info", text

    used = UsedNormalization("std", 4, [1.0])
    what = WhatIfLog(lambda: compared_with(run, used), exchanges.attempt, log_once)
    torch.manual_seed(0)
    with torch.device(device):
        group_rewards = (torch.rand(P // PROCESSES, G) < 0.5).float()
        tasks = {key: f"task {key % 4}" for key in range(len(group_rewards))}
        with measured:
            step, counts = recorded_step(group_rewards, known), [len(group_rewards) * G] * PROCESSES
            found = measure.measure(step, exchanges, counts, G, what.observe, tasks=tasks)
    assert found.metrics["interference/live_prompts"] > P - 8
    assert sum(found.metrics[f"tasks/task {i}/heard"] for i in range(4)) == pytest.approx(1)
    assert ("what_if/std/cos" in found.metrics) is known and ("noise/between" in found.metrics) is known
    if known:
        names = [name for name in STATELESS if name != "decoupled"]
        assert all(f"what_if/{name}/cos" in found.metrics for name in names)
    return found


def recorded_step(group_rewards, known):
    """What one process recorded of its groups; ``known``: with coefficients."""
    n = group_rewards.numel()
    prompt_B, position_B = torch.arange(n) // G, torch.arange(n) % G
    rewards_BG, reward_B = group_rewards[prompt_B], group_rewards.flatten()
    advantage_B = (reward_B - rewards_BG.mean(1)) / (rewards_BG.std(1) + 1e-4)
    sketch = torch.randn(n, 2, K * K // 2).mul_(advantage_B[:, None, None])
    features = torch.cat([torch.randn(n // G, H), torch.full((n // G, 1), float(G))], dim=1)
    table = SequenceTable(
        **dict.fromkeys(("prompt_id", "prompt_key"), prompt_B),
        **dict.fromkeys(("position", "length"), position_B),
        **dict.fromkeys(("advantage", "score_advantage"), advantage_B),
        weight=torch.ones(n),
        group_rewards=rewards_BG,
        function_rewards=reward_B[:, None],
        square=squared_norms(sketch.flatten(1)),
        coefficient=-advantage_B / PROCESSES if known else None,
    )
    return RecordedStep(sketch, {"model": slice(0, K * K // 2)}, table, features)
