"""Phases of training and the speed-up constant, from step to step, and back from a checkpoint."""

import itertools
import json

import pytest
import torch

from grpo_kernels.interference.training_phase import SpeedupConstant, TrainingPhase

NAN = float("nan")
PAPER = [(0.977, 0.045), (0.803, 0.066), (0.524, 0.130)]  # arXiv 2601.23135, Table 3


def seen(near_orthogonal, cos_std, reliability=0.5, live=8.0) -> dict[str, float]:
    names = ("near_orthogonal_frac", "cos_std", "reliability", "live_prompts")
    values = (near_orthogonal, cos_std, reliability, live)
    return {f"interference/{name}": value for name, value in zip(names, values, strict=True) if value is not None}


def test_the_papers_rows_are_phases_1_2_3():
    assert [TrainingPhase().observe(seen(*row)) for row in PAPER] == [1, 2, 3]
    run = TrainingPhase()
    phases = [run.observe(seen(*row)) for row in [*PAPER, PAPER[0]] for _ in range(40)]
    assert phases[39::40] == [1, 2, 3, 1]  # and back, through phase 2
    assert max(abs(after - before) for before, after in itertools.pairwise(phases)) == 1  # through 2, and once each
    assert sum(after != before for before, after in itertools.pairwise(phases)) == 4


def test_phases_have_hysteresis_and_thresholds():
    at_once = dict(decay=0.0)
    phase = TrainingPhase(**at_once)
    shares = [0.95, 0.895, 0.885, 0.905, 0.915]
    assert [phase.observe(seen(share, 0.05)) for share in shares] == [1, 1, 2, 2, 1]
    phase = TrainingPhase(**at_once)
    assert [phase.observe(seen(0.5, std)) for std in (0.05, 0.105, 0.115, 0.095, 0.085)] == [2, 2, 3, 3, 2]
    assert TrainingPhase(**at_once).observe(seen(0.95, 0.2)) == 1  # near-orthogonal comes first
    assert TrainingPhase(**at_once).observe(seen(0.9, 0.1)) == 1
    assert TrainingPhase(**at_once).observe(seen(0.899, 0.1)) == 3
    assert TrainingPhase(**at_once).observe(seen(0.5, None)) == 2  # the spread is below the sketch's
    assert TrainingPhase(near_orthogonal=0.98).observe(seen(*PAPER[0])) == 2
    assert TrainingPhase(cos_std=0.05).observe(seen(*PAPER[1])) == 3


def test_no_phase_below_a_reliability_or_a_number_of_prompts():
    phase = TrainingPhase()
    assert phase.observe(seen(*PAPER[1], reliability=0.05)) is None
    assert phase.observe(seen(*PAPER[1], live=3.0)) is None
    assert phase.observe(seen(*PAPER[1], reliability=None)) is None
    assert phase.observe({}) is None
    assert phase.averages["reliability"] == 0.05  # the others weren't averaged
    assert [phase.observe(seen(*PAPER[1])) for _ in range(5)] == [None, 2, 2, 2, 2]
    assert TrainingPhase(min_reliability=0.6).observe(seen(*PAPER[1])) is None
    assert TrainingPhase(min_prompts=2).observe(seen(*PAPER[1], live=2.0)) == 2


def test_states_are_restored_from_json():
    metrics = [seen(0.5, 0.04 * i) | {"curvature/sigma_mean": 0.1 * i} for i in range(12)]
    rewards = torch.tensor([0.0, 1.0, NAN])
    phase, constant = TrainingPhase(), SpeedupConstant()
    whole = [(phase.observe(m), constant.observe(m, rewards)) for m in metrics]
    phase, constant = TrainingPhase(), SpeedupConstant()
    half = [(phase.observe(m), constant.observe(m, rewards)) for m in metrics[:6]]
    saved = json.dumps([phase.state_dict(), constant.state_dict()])
    phase, constant = TrainingPhase(), SpeedupConstant()
    for state, one in zip((phase, constant), json.loads(saved), strict=True):
        state.load_state_dict(one)
    assert half + [(phase.observe(m), constant.observe(m, rewards)) for m in metrics[6:]] == whole
    assert len({phase for phase, _ in whole}) > 1


def test_speedup_constant_by_hand():
    constant = SpeedupConstant()
    unit = torch.tensor([0.0, 1.0])
    assert constant.observe({}, torch.tensor([NAN])) is None
    assert constant.observe({"curvature/sigma_mean": 0.3}, unit) == pytest.approx(0.8)
    assert constant.observe({"curvature/sigma_mean": 0.45}, unit) == pytest.approx(1.0)
    assert constant.observe({"curvature/sigma_mean": 0.45}, torch.tensor([1.5, 0.0])) is None
    assert constant.observe({"curvature/sigma_mean": 0.45}, unit) is None  # from then on
