"""Checkpoints that survive: truncated files, a full disk, ``kill -9`` at any moment, reward functions that fail."""

import itertools
import json
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import checkpoint_worker
import pytest
import torch
from harness import build, train
from processes import start
from safetensors.torch import load_file

from trl_ext.advantages.reward_checks import RewardRaised
from trl_ext.checkpoints import CheckpointError, find_checkpoint
from trl_ext.checkpoints.save import complete_or_none
from trl_ext.checkpoints.validate import what_is_broken

SAVING = {"save_strategy": "steps", "save_steps": 1, "interference_every": 0}


@pytest.fixture(scope="module")
def saved_run(tiny_policy, tmp_path_factory):
    """A run's folder with checkpoints of steps 1 to 3, AdamW's state among them."""
    folder = tmp_path_factory.mktemp("saved")
    train(tiny_policy, folder, max_steps=3, optim="adamw_torch", **SAVING)
    return folder


@pytest.fixture
def run_folder(saved_run, tmp_path):
    return Path(shutil.copytree(saved_run, tmp_path / "run"))


def cut(file, fraction=0.5):
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * fraction)])


WEIGHTS_AND_STATES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin")
FILES = (*WEIGHTS_AND_STATES, "config.json", "tokenizer.json", "trainer_state.json")


def fails_at(*calls):
    """A reward function that raises at these of its calls."""
    count = itertools.count(1)

    def failing(completion_ids, **kwargs):
        if next(count) in calls:
            raise KeyError("boom")
        return [float(len(ids)) for ids in completion_ids]

    return failing


def no_room(*args, **kwargs):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_short_is_named_and_the_checkpoint_before_is_used(name, fraction, run_folder):
    said = []
    assert find_checkpoint("auto", run_folder, said.append) == str(run_folder / "checkpoint-3")
    assert said == [f"Resuming from {run_folder / 'checkpoint-3'}."]
    cut(run_folder / "checkpoint-3" / name, fraction)
    del said[:]
    assert find_checkpoint("latest", run_folder, said.append) == str(run_folder / "checkpoint-2")
    assert f"{run_folder / 'checkpoint-3'} is skipped: {name} " in said[0]
    assert said[1] == f"Resuming from {run_folder / 'checkpoint-2'}."
    with pytest.raises(ValueError, match=f"no complete checkpoint there \\({name} "):
        find_checkpoint(str(run_folder / "checkpoint-3"), run_folder)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["trainer_state.json"], "trainer_state.json is missing"),
        (["model.safetensors"], "the weights are missing"),
        (["optimizer.pt"], "the optimizer's state is missing"),
        (["rng_state.pth"], "rng_state.pth is missing"),
        (["optimizer.pt", "scheduler.pt", "rng_state.pth"], None),  # save_only_model
    ],
)
def test_what_is_missing(names, reason, run_folder):
    for name in names:
        (run_folder / "checkpoint-3" / name).unlink()
    assert what_is_broken(run_folder / "checkpoint-3") == reason


def test_another_processs_random_state_is_missing(run_folder):
    """The process that writes the trainer's state last doesn't wait for the others."""
    folder = run_folder / "checkpoint-3"
    state = json.loads((folder / "trainer_state.json").read_text())
    ours = state["stateful_callbacks"]["CurvatureGRPOTrainer"]
    assert ours["processes"] == 1
    ours["processes"] = 2
    (folder / "trainer_state.json").write_text(json.dumps(state))
    (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")
    assert what_is_broken(folder) == "rng_state_1.pth is missing"
    shutil.copy(folder / "rng_state_0.pth", folder / "rng_state_1.pth")
    assert what_is_broken(folder) is None


def test_the_forms_of_other_engines(run_folder):
    """Sharded weights, FSDP's and DeepSpeed's folders: what each writes last."""
    folder = run_folder / "checkpoint-3"
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00002-of-00002.safetensors, which is missing" in what_is_broken(folder)
    shutil.copy(folder / "model.safetensors", folder / "model-00002-of-00002.safetensors")
    assert what_is_broken(folder) is None
    (folder / "optimizer_0").mkdir()
    (folder / "optimizer_0" / "__0_0.distcp").write_bytes(b"...")
    assert "has no .metadata" in what_is_broken(folder)
    (folder / "optimizer_0" / ".metadata").write_bytes(b"...")
    assert what_is_broken(folder) is None
    (folder / "latest").write_text("global_step3\n")
    assert what_is_broken(folder) == "latest names a folder that is missing"
    (folder / "global_step3").mkdir()
    assert what_is_broken(folder) is None
    torch.save({"a": torch.ones(1000)}, folder / "global_step3" / "states.pt", _use_new_zipfile_serialization=False)
    assert what_is_broken(folder) is None  # torch's older form has no table of contents


def test_auto_starts_and_restarts(tmp_path):
    said = []
    assert find_checkpoint("auto", tmp_path, said.append) is None
    assert said == [f"No complete checkpoint in {tmp_path}: starting at step 0."]
    assert find_checkpoint(None, tmp_path) is None and find_checkpoint(False, tmp_path) is None
    for resume in (True, "latest", "True"):
        with pytest.raises(ValueError, match="no complete checkpoint in"):
            find_checkpoint(resume, tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        find_checkpoint(str(tmp_path / "nowhere"), tmp_path)


@pytest.mark.parametrize("resume", ["auto", True])
def test_the_trainer_passes_over_a_broken_checkpoint(resume, tiny_policy, run_folder, monkeypatch):
    """And writes it anew."""
    said = []
    monkeypatch.setattr("trl_ext.trainer.get_logger", lambda name: SimpleNamespace(warning=said.append, info=print))
    cut(run_folder / "checkpoint-3" / "optimizer.pt")
    again = build(tiny_policy, run_folder, max_steps=4, optim="adamw_torch", **SAVING)
    again.train(resume_from_checkpoint=resume)
    assert any("checkpoint-3 is skipped: optimizer.pt ends too early" in text for text in said)
    assert f"Resuming from {run_folder / 'checkpoint-2'}." in said
    assert what_is_broken(run_folder / "checkpoint-3") is None and again.state.global_step == 4
    assert [log["step"] for log in again.state.log_history if "reward" in log] == [1, 2, 3, 4]


def test_a_complete_run_that_is_started_again_trains_no_further_step(tiny_policy, run_folder):
    """transformers would train step 4 of 3, at each restart of the command."""
    again = build(tiny_policy, run_folder, max_steps=3, optim="adamw_torch", **SAVING)
    before = [one.detach().clone() for one in again.model.parameters()]
    assert again.train(resume_from_checkpoint="auto").global_step == again.state.global_step == 3
    saved = load_file(run_folder / "checkpoint-3" / "model.safetensors")
    for (name, one), first in zip(again.model.named_parameters(), before, strict=True):
        if name in saved:
            assert torch.equal(one, saved[name]) and not torch.equal(one, first), name
    assert not (run_folder / "checkpoint-4").exists()


# ---- no room


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 11 MiB: two checkpoints of the tiny policy, and a part of a third."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=11m", "none", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small file system can't be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk(small_disk, tiny_policy):
    trainer = build(tiny_policy, small_disk, max_steps=4, **SAVING)
    with pytest.raises(CheckpointError) as raised:
        trainer.train()
    told = str(raised.value)
    assert told.startswith(f"{small_disk / 'checkpoint-3'} couldn't be saved, ") and "\n" not in told
    assert "of 11 MiB are free there (" in told and "the newest complete one is checkpoint-2" in told
    assert not (small_disk / "checkpoint-3").exists()
    for number in (1, 2):
        assert what_is_broken(small_disk / f"checkpoint-{number}") is None
    # with room, the same command goes on
    shutil.rmtree(small_disk / "checkpoint-1")
    again = build(tiny_policy, small_disk, max_steps=4, save_total_limit=1, **SAVING)
    again.train(resume_from_checkpoint="auto")
    assert again.state.global_step == 4 and what_is_broken(small_disk / "checkpoint-4") is None


@pytest.mark.parametrize("stage", checkpoint_worker.STAGES)
def test_whatever_can_not_be_written(stage, tiny_policy, tmp_path, monkeypatch):
    """Each part of a checkpoint, where no small file system can be mounted."""
    trainer = build(tiny_policy, tmp_path, max_steps=3, **SAVING)
    owner = trainer.state if stage == "save_to_json" else trainer
    method, seen = getattr(type(owner), stage), []

    def full(self, where, *rest, **kwargs):
        seen.append(1)
        return no_room() if len(seen) == 2 else method(self, where, *rest, **kwargs)

    monkeypatch.setattr(type(owner), stage, full)
    with pytest.raises(CheckpointError, match=r"checkpoint-2 couldn't be saved.*No space left.*is checkpoint-1"):
        trainer.train()
    assert sorted(folder.name for folder in tmp_path.glob("checkpoint-*")) == ["checkpoint-1"]
    assert what_is_broken(tmp_path / "checkpoint-1") is None


def test_a_folder_that_is_gone(tmp_path):
    """The room is told of what is there of its path."""
    with pytest.raises(CheckpointError, match=r"OSError: gone.*there is no earlier one"):
        with complete_or_none(tmp_path / "run" / "checkpoint-1", str(tmp_path / "run")):
            raise OSError("gone")


def test_a_reward_that_fails_is_told_though_nothing_can_be_saved(tiny_policy, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("trl_ext.checkpoints.save.logger.warning", said.append)
    monkeypatch.setattr("transformers.Trainer._save_optimizer_and_scheduler", no_room)
    with pytest.raises(RewardRaised, match="raised KeyError: 'boom'"):
        train(tiny_policy, tmp_path, fails_at(2), max_steps=3, **{**SAVING, "save_steps": 100})
    assert len(said) == 1 and "Its latest step is lost" in said[0] and "No space left" in said[0]
    assert not list(tmp_path.glob("checkpoint-*"))


def test_what_fails_after_a_checkpoint_leaves_it(tiny_policy, tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise ConnectionError("the hub can't be reached")

    monkeypatch.setattr("transformers.trainer.rotate_checkpoints", no_network)
    with pytest.raises(ConnectionError, match="the hub"):
        train(tiny_policy, tmp_path, max_steps=2, **SAVING)
    assert what_is_broken(tmp_path / "checkpoint-1") is None


# ---- kill -9


@pytest.fixture(scope="module")
def undisturbed(tiny_policy, tmp_path_factory):
    """By optimizer and processes: the parameters a run ends with, and the seconds from its first step to its end."""
    kept = {}

    def run(optimizer, processes):
        if (optimizer, processes) not in kept:
            folder = tmp_path_factory.mktemp("undisturbed")
            started = begin(processes, tiny_policy, folder, optimizer)
            started.wait_for(folder / "began.0")
            begun = time.monotonic()
            assert started.finish() == [0] * processes, started.text()[-2000:]
            kept[optimizer, processes] = torch.load(folder / "end.0.pt"), time.monotonic() - begun
        return kept[optimizer, processes]

    return run


def begin(processes, policy, folder, optimizer="sgd", behaviour=None, save_steps=1):
    options = {"save_steps": save_steps, "optim": optimizer, "per_device_train_batch_size": 8 // processes}
    folder.mkdir(exist_ok=True)
    for marker in folder.glob("began.*"):
        marker.unlink()
    arguments = (str(policy), str(folder), options, behaviour or {})
    return start(processes, checkpoint_worker.main, *arguments, folder=folder / "output")


def run_to_the_end(processes, *arguments, **options):
    started = begin(processes, *arguments, **options)
    assert started.finish() == [0] * processes, started.text()[-3000:]


KILLS = checkpoint_worker.random_kills(50)
SHORT = [(1, KILLS[0]), (1, KILLS[3]), (2, ("sgd", 0.6))]
NIGHTLY = [*((1, kill) for kill in KILLS), *((2, (name, i / 4)) for name in ("sgd", "adamw_torch") for i in range(4))]


@pytest.mark.parametrize(
    ("processes", "kill"),
    [*SHORT, *(pytest.param(*one, marks=pytest.mark.nightly) for one in NIGHTLY if one not in SHORT)],
)
def test_kill_9(processes, kill, undisturbed, tiny_policy, tmp_path):
    """Killed at a random moment, or in the middle of writing a file; resumed, it ends bit-equal."""
    optimizer, where = kill
    want, seconds = undisturbed(optimizer, processes)
    in_a_save = isinstance(where, tuple)
    started = begin(processes, tiny_policy, tmp_path, optimizer, {"kill_in": where} if in_a_save else {})
    if in_a_save:
        assert started.finish() == [-signal.SIGKILL], started.text()[-2000:]
    else:
        started.wait_for(tmp_path / "began.0")
        time.sleep(where * seconds)
        for process in started.processes:
            process.kill()
        ends = started.finish()
        assert set(ends) <= {-signal.SIGKILL, 0}, started.text()[-2000:]
    run_to_the_end(processes, tiny_policy, tmp_path, optimizer)
    got = torch.load(tmp_path / "end.0.pt")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# ---- rewards


@pytest.mark.parametrize("processes", [1, 2])
def test_rewards_that_fail_at_step_3_leave_a_checkpoint_of_step_2(processes, tiny_policy, tmp_path):
    """On one of two processes: both stop. Resumed, the run ends as if nothing had been."""
    behaviour = {"fails": True, "rank": processes - 1}
    started = begin(processes, tiny_policy, tmp_path, behaviour=behaviour, save_steps=100)
    assert started.finish(60) == [1] * processes, started.text()[-2000:]
    assert "reward function 'reward' raised KeyError: 'boom'" in started.text(), started.text()[-2000:]
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert what_is_broken(tmp_path / "checkpoint-2") is None
    for folder in (tmp_path, tmp_path / "whole"):
        run_to_the_end(processes, tiny_policy, folder, save_steps=100)
    got, want = (torch.load(folder / "end.0.pt") for folder in (tmp_path, tmp_path / "whole"))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_nothing_is_saved_where_nothing_is_to_be(tiny_policy, tmp_path):
    """At step 1, and in a run that saves nothing."""
    failing = fails_at(1, 4)
    with pytest.raises(RewardRaised, match="raised KeyError: 'boom'") as raised:
        train(tiny_policy, tmp_path, failing, max_steps=4, **{**SAVING, "save_steps": 100})
    assert isinstance(raised.value.__cause__, KeyError)
    with pytest.raises(RewardRaised):
        train(tiny_policy, tmp_path, failing, max_steps=4, interference_every=0)
    assert not list(tmp_path.glob("checkpoint-*"))
