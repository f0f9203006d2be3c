"""The methods with a state: by hand, their signals, checkpoints, a kill and a resume, two processes."""

import json
import math
import shutil
import signal

import pytest
import torch
from harness import by_length, logged, messages, train
from two_process_worker import run_processes, start_processes

from trl_ext.advantages.normalization_state import make_state, restore_states

NAN = float("nan")
UNMEASURED = {"interference_every": 0}  # the signals are the test's own


def state_of(method, decay=0.5):
    return make_state(method, {"decay": decay})


def test_running_variance_by_hand():
    state = state_of("running_std")
    early = state.context(torch.tensor([[0.0, 1.0], [2.0, 2.0]]))  # an evaluation before training
    assert early == pytest.approx({"running_variance": 0.25})
    state.observe_rewards(torch.tensor([[0.0, 1.0], [2.0, 2.0]]))  # variances 1/2 and 0
    assert state.variance == pytest.approx(0.25)
    state.observe_rewards(torch.tensor([[0.0, 3.0], [5.0, NAN]]))  # 4.5; one alone has none
    assert state.variance == pytest.approx((0.25 + 4.5) / 2)
    state.observe_rewards(torch.tensor([[NAN, NAN], [1.0, NAN]]))  # nothing to see
    assert state.context(torch.zeros(1, 2)) == pytest.approx({"running_variance": 2.375})
    assert state.metrics() == pytest.approx({"normalization/running_std": math.sqrt(2.375)})
    first = state_of("running_std", decay=0.0)
    first.observe_rewards(torch.tensor([[0.0, 1.0]]))
    first.observe_rewards(torch.tensor([[0.0, 2.0]]))
    assert first.variance == pytest.approx(2.0)  # no memory


def test_curvature_by_hand():
    """Groups of four with pass rates 1/4, 1/2, 1/4, 1: bins 1, 2, 1, 4. Stds 1/2, 1/sqrt(3), 1/2, 0."""
    batch = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 1], [1, 1, 1, 1]])
    stds = [0.5, math.sqrt(1 / 3), 0.5, 0.0]
    state = state_of("curvature")

    def scales(batch):
        return state.context(batch)["curvature_scale"].tolist()

    state.observe_rewards(batch)
    assert not state.ready
    assert scales(batch) == pytest.approx(stds)  # std, until measured
    state.observe_curvature(torch.tensor([0, 2]), torch.tensor([6.0, 10.0]))  # bin 1: 8
    assert scales(batch) == pytest.approx(stds)  # alone: its shape says nothing
    state.observe_curvature(torch.tensor([1, 0]), torch.tensor([24.0, NAN]))  # bin 2: 24, the other isn't known
    unit = (0.5 + stds[1]) / 32
    assert scales(batch) == pytest.approx([8 * unit, 24 * unit, 8 * unit, 0.0])
    state.observe_curvature(torch.tensor([0]), torch.tensor([-8.0]))  # bin 1: (8 - 8) / 2 = 0: the floor
    unit = (0.5 + stds[1]) / 24
    floor = 0.1 * (0.5 + stds[1]) / 2
    assert scales(batch) == pytest.approx([floor, 24 * unit, floor, 0.0])
    # an evaluation with another number of generations falls back to the std
    assert scales(torch.tensor([[0.0, 1]])) == pytest.approx([math.sqrt(0.5)])
    with pytest.raises(ValueError, match="prompt_id 4 is not in the latest batch of 4 prompts"):
        state.observe_curvature(torch.tensor([4]), torch.tensor([1.0]))


@pytest.mark.parametrize("method", ["running_std", "curvature", "std"])
def test_states_go_through_json_bit_for_bit(method):
    state, other = state_of(method), state_of(method)
    state.observe_rewards(torch.tensor([[0.1, 0.7, 0.3], [1.0, 0.0, 1 / 3]]))
    state.observe_curvature(torch.tensor([0, 1]), torch.tensor([1 / 3, 0.1]))
    assert restore_states([other], json.loads(json.dumps([state.state_dict()])))
    assert other.state_dict() == state.state_dict()
    assert method == "std" or None not in state.state_dict().values()
    assert restore_states([other], [{"something": 1}]) is False
    assert restore_states([other], []) is False


def saved_state(folder, step):
    state = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return state["stateful_callbacks"]["CurvatureGRPOTrainer"]["normalization"]


SAVED = {"save_strategy": "steps", "save_steps": 1, **UNMEASURED}


def test_resumed_training_restores_the_state(tiny_policy, tmp_path):
    options = {"normalization": "running_std", "max_steps": 3, **SAVED}
    trainer = train(tiny_policy, tmp_path, **options)
    expected = saved_state(tmp_path, 3)
    assert None not in expected[0].values() and expected != saved_state(tmp_path, 2)
    shutil.rmtree(tmp_path / "checkpoint-3")
    train(tiny_policy, tmp_path, **options, resume=str(tmp_path / "checkpoint-2"))
    assert saved_state(tmp_path, 3) == expected
    assert all("normalization/running_std" in log for log in logged(trainer))


def test_another_normalisation_starts_with_a_new_state(tiny_policy, tmp_path, caplog):
    """The checkpoint is one of ``adaptive``, which is no longer there."""
    train(tiny_policy, tmp_path, normalization="running_std", max_steps=1, **SAVED)
    file = tmp_path / "checkpoint-1" / "trainer_state.json"
    state = json.loads(file.read_text())
    state["stateful_callbacks"]["CurvatureGRPOTrainer"]["normalization"] = [{"sigma": 0.3, "outside": False}]
    file.write_text(json.dumps(state))
    train(tiny_policy, tmp_path, normalization="curvature", **SAVED, resume=str(tmp_path / "checkpoint-1"))
    assert set(saved_state(tmp_path, 2)[0]) == {"curvature", "std"}
    assert len(messages(caplog, "The checkpoint was saved with another normalization")) == 1


def test_where_it_is_std_it_logs_that_once(tiny_policy, tmp_path, caplog):
    trained = [train(tiny_policy, tmp_path, by_length, normalization=n, **UNMEASURED) for n in ("curvature", "std")]
    for a, b in zip(*(trainer.model.parameters() for trainer in trained), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    message = "normalization='curvature' is 'std' until it has seen the curvature along the prompts' gradients."
    assert len(messages(caplog, message)) == 1


@pytest.mark.nightly
def test_killed_and_resumed_on_two_processes(tiny_policy, tmp_path):
    """Killed at the end of step 3; what checkpoint-2 held is taken up bit for bit, and goes on as without the kill."""
    options = {"normalization": "curvature", "max_steps": 4, **SAVED}
    whole = run_processes(1, tiny_policy, tmp_path / "whole", signals=True, **options)[0]
    folder = tmp_path / "killed"
    killed = start_processes(2, tiny_policy, folder, signals=True, kill_at=3, **options)
    assert killed.finish() == [-signal.SIGKILL] * 2 and not (folder / "result.0.pt").exists()
    checkpoint = folder / "checkpoint-2"
    assert (checkpoint / "trainer_state.json").exists() and not (folder / "checkpoint-3").exists()
    saved = saved_state(folder, 2)
    resumed = run_processes(2, tiny_policy, folder, signals=True, resume=str(checkpoint), **options)
    for one in resumed:
        assert one["states"][0] == saved  # when training began
        assert one["states"] == resumed[0]["states"]  # on both processes, at every step
    assert sum(value is not None for value in saved[0]["curvature"]) >= 2
    assert resumed[0]["states"][1:] == whole["states"][-2:]
    assert resumed[0]["advantages"][-48:] == pytest.approx(whole["advantages"][-48:], rel=1e-5, abs=1e-6)
