"""Phases of training, from step to step, and back from a checkpoint."""

import itertools
import json

from grpo_kernels.interference.training_phase import TrainingPhase

PAPER = [(0.977, 0.045), (0.803, 0.066), (0.524, 0.130)]  # arXiv 2601.23135, Table 3


def seen(near_orthogonal, cos_std, interval=0.1, live=8.0, kind="alignment", alignment=0.05) -> dict[str, float]:
    values = {"near_orthogonal_frac": near_orthogonal, "cos_std": cos_std, "live_prompts": live}
    if interval is not None:
        values |= {kind: alignment, f"{kind}_low": alignment - interval / 2, f"{kind}_high": alignment + interval / 2}
    return {f"interference/{name}": value for name, value in values.items() if value is not None}


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


def test_no_phase_where_the_alignment_is_not_known_or_prompts_are_few():
    phase = TrainingPhase()
    assert phase.observe(seen(*PAPER[1], interval=0.6)) is None
    assert phase.observe(seen(*PAPER[1], interval=None)) is None
    assert phase.observe(seen(*PAPER[1], live=3.0)) is None
    assert phase.observe({}) is None
    assert phase.observe(seen(*PAPER[1], kind="alignment_trained")) == 2
    assert TrainingPhase(max_interval=0.05).observe(seen(*PAPER[1])) is None
    assert TrainingPhase(min_prompts=2).observe(seen(*PAPER[1], live=2.0)) == 2


def test_no_phase_1_where_only_noise_makes_cosines_small():
    """Gradients that are aligned for sure, with raw cosines near 0."""
    assert TrainingPhase().observe(seen(*PAPER[0], alignment=1.0)) is None
    assert TrainingPhase().observe(seen(*PAPER[0], alignment=0.14)) == 1
    assert TrainingPhase().observe(seen(*PAPER[1], alignment=1.0)) == 2


def test_its_state_is_restored_from_json():
    metrics = [seen(0.5, 0.04 * i) for i in range(12)]
    phase = TrainingPhase()
    want = [phase.observe(m) for m in metrics]
    phase = TrainingPhase()
    half = [phase.observe(m) for m in metrics[:6]]
    again = TrainingPhase()
    again.load_state_dict(json.loads(json.dumps(phase.state_dict())))
    assert half + [again.observe(m) for m in metrics[6:]] == want
    assert len(set(want)) > 1
