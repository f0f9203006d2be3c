"""A rank killed by SIGKILL, at any moment: torchrun starts all again and the run goes on from its last whole
checkpoint, and ends as an undisturbed one does; without restarts it ends with an error, and nothing hangs.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from processes import ROOT, environment
from safetensors.torch import load_file

STEPS = 40
OF_TIME = ("time", "seconds", "runtime", "per_second")


class Run:
    """``examples/math.py`` by torchrun on two processes."""

    def __init__(self, policy, folder, restarts, **variables):
        self.folder, self.output = folder, folder.with_suffix(".txt")
        torchrun = Path(sys.executable).with_name("torchrun")
        options = (
            f"--model_name_or_path {policy} --output_dir {folder} --resume_from_checkpoint auto --use_cpu true "
            f"--max_steps {STEPS} --save_steps 3 --eval_strategy no --max_completion_length 12 --logging_steps 1 "
            "--per_device_train_batch_size 16 --num_generations 8 --learning_rate 1e-3 --interference_every 4 "
            "--normalization running_std"
        )
        launch = f"{torchrun} --standalone --nproc_per_node=2 --max-restarts={restarts} examples/math.py {options}"
        path = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
        variables = environment(**path, **variables)
        with open(self.output, "w") as file:
            streams = {"stdout": file, "stderr": subprocess.STDOUT}
            self.process = subprocess.Popen(launch.split(), cwd=ROOT, env=variables, **streams)
        self.seen = 0

    def text(self):
        return self.output.read_text(errors="replace")

    def workers(self):
        """By rank, those that live."""
        found = {}
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                rank = child.environ().get("RANK")
                if rank is not None and "math.py" in " ".join(child.cmdline()):
                    found.setdefault(int(rank), child)
            except psutil.Error:
                continue
        return found

    def wait_for_a_step(self, seconds=180, least=0):
        """That was printed since the last call, this one or a later one."""
        deadline = time.monotonic() + seconds
        while True:
            steps = re.findall(r"^ *(\d+) +[-\d.]+ ", self.text()[self.seen :], flags=re.MULTILINE)
            if steps and int(steps[-1]) >= least:
                self.seen = len(self.text())
                return int(steps[-1])
            assert self.process.poll() is None, self.text()[-4000:]
            assert time.monotonic() < deadline, self.text()[-4000:]
            time.sleep(0.05)

    def kill(self, rank):
        self.workers()[rank].send_signal(signal.SIGKILL)
        self.seen = len(self.text())

    def finish(self, seconds=300):
        try:
            return self.process.wait(seconds)
        finally:
            self.process.kill()

    def history(self):
        kept = json.loads((self.folder / "trainer_state.json").read_text())["log_history"]
        return [
            {key: value for key, value in log.items() if not any(word in key for word in OF_TIME)}
            for log in kept
            if "reward" in log
        ]


@pytest.fixture(scope="module")
def undisturbed(warm_policy, tmp_path_factory):
    run = Run(warm_policy, tmp_path_factory.mktemp("undisturbed") / "run", restarts=0)
    assert run.finish() == 0, run.text()[-4000:]
    return run


def kills(policy, folder, count, first=0):
    rng = random.Random(count)
    run = Run(policy, folder, restarts=count, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    step = first
    for _ in range(count):
        step = run.wait_for_a_step(least=step + rng.randrange(4))
        time.sleep(rng.random() * 0.6)
        run.kill(rng.randrange(2))
    assert run.finish() == 0, run.text()[-6000:]
    return run


def same(run, other):
    assert run.history() == other.history()
    ours, theirs = load_file(run.folder / "model.safetensors"), load_file(other.folder / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.engines
def test_one_kill(warm_policy, undisturbed, tmp_path):
    run = kills(warm_policy, tmp_path / "run", 1, first=5)
    assert len(run.history()) == STEPS
    assert run.text().count("No complete checkpoint") == run.text().count("Resuming from") == 1
    same(run, undisturbed)


@pytest.mark.nightly
def test_ten_kills(warm_policy, undisturbed, tmp_path):
    run = kills(warm_policy, tmp_path / "run", 10)
    assert run.text().count("Resuming from") >= 5
    same(run, undisturbed)


@pytest.mark.engines
def test_killed_without_restarts(warm_policy, tmp_path):
    """An exit code that isn't 0, in well under the half hour that torch would wait, and no process is left."""
    run = Run(warm_policy, tmp_path / "run", restarts=0)
    run.wait_for_a_step()
    left = run.workers()
    run.kill(1)
    assert run.finish(90) != 0
    gone, alive = psutil.wait_procs(left.values(), timeout=5)
    assert not alive and len(gone) == 2


@pytest.mark.engines
def test_a_restart_that_finds_nobody(tmp_path):
    """Ends with an error, in the time that it is given."""
    code = (
        "from trl_ext import rejoin\n"
        "with rejoin.rendezvous_deadline(3):\n"
        "    from trl_ext import CurvatureGRPOConfig\n"
        f"    CurvatureGRPOConfig(output_dir={str(tmp_path)!r}, use_cpu=True, bf16=False)\n"
    )
    alone = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    restarted = {"TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_MAX_RESTARTS": "3", "ACCELERATE_USE_CPU": "true"}
    env = {**os.environ, **alone, **restarted}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 75, done.stderr[-3000:]
    assert "error: restart 1 found no way back to the other processes in 3 s: set TORCH_DISABLE" in done.stderr
