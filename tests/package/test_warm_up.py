"""A warm-up says what it does and how long it may take, and takes the number of threads that is quickest."""

import time

import pytest
import torch

from examples.tasks.warm_up import Muon
from trl_ext.tasks.progress import Progress
from trl_ext.tasks.threads import quickest_threads


def test_progress_tells_how_long_it_may_still_take(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr("trl_ext.tasks.progress.time.monotonic", lambda: now[0])
    progress = Progress(500, rest=300)
    assert "Warming the built-in policy up" in capsys.readouterr().err  # before the first step
    for step, seconds, expected in (
        (25, 5.0, "5 s, at most 155 s to go"),
        (500, 100.0, "100 s, at most 60 s to go"),
        (560, 140.0, "ready after 140 s"),
    ):
        now[0] = 100.0 + seconds
        progress(step, {"sums": 0.5, "sorting": 0.25})
        line = f"  step {step:>3}: right with probability sums 0.50, sorting 0.25 ({expected})\n"
        assert capsys.readouterr().err == line
    now[0] = 250.0
    progress(560, 0.45)
    assert "0.45 (ready after 150 s)" in capsys.readouterr().err


@pytest.mark.parametrize("best", [1, 2, 4])
def test_the_quickest_number_of_threads_is_taken_and_given_back(best, monkeypatch):
    used = [4]
    monkeypatch.setattr(torch, "get_num_threads", lambda: used[-1])
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    with quickest_threads(lambda: time.sleep(0.001 if used[-1] == best else 0.02)):
        assert used[-1] == best
    assert used[-1] == 4 and {1, 2, 4} == set(used)


def test_one_thread_is_not_timed(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    with quickest_threads(lambda: pytest.fail("timed")):
        pass


@pytest.mark.parametrize("shape", [(20, 50), (50, 20)])
def test_muon_is_torchs_in_float32(shape):
    """torch's own is in bfloat16: after five steps, the way made agrees to its rounding."""
    torch.manual_seed(0)
    ours = torch.randn(shape, requires_grad=True)
    start = ours.detach().clone()
    theirs = start.clone().requires_grad_()
    optimizers = Muon([ours], 1e-2), torch.optim.Muon([theirs], lr=1e-2, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        ours.grad = theirs.grad = torch.randn(shape)
        for optimizer in optimizers:
            optimizer.step()
    assert 0 < (ours - theirs).norm() < 0.02 * (theirs - start).norm()
