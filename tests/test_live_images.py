"""Images of interference while a run goes: TensorBoard, Weights & Biases, Trackio."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from harness import live_or_not, messages, train

from trl_ext.report import live


def watched(policy, folder, **options):
    options |= {"interference_every": 1, "interference_dim": 8, "max_steps": 7, "gradient_accumulation_steps": 2}
    return train(policy, folder, live_or_not(0.0), **options)


def test_tensorboard_gets_images(tiny_policy, tmp_path, monkeypatch):
    """Every fifth logged step, read back from its files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    watched(tiny_policy, tmp_path, report_to="tensorboard")
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    images = events.Images(live.TAG)
    assert [(image.step, image.width, image.height) for image in images] == [(1, 800, 360), (6, 800, 360)]


@pytest.mark.skipif(not (find_spec("wandb") and find_spec("trackio")), reason="needs wandb and trackio")
def test_images_go_to_wandb_and_trackio(tiny_policy, tmp_path):
    """The real packages, without a server, in a process that reads where they keep things when it imports them."""
    kept = {name: tmp_path / name for name in ("wandb", "trackio")}
    for folder in kept.values():
        folder.mkdir()
    path = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    places = {"PYTHONPATH": os.pathsep.join(path), "WANDB_MODE": "offline"}
    places |= {"WANDB_DIR": str(kept["wandb"]), "TRACKIO_DIR": str(kept["trackio"])}
    code = (
        "import sys, pathlib, test_live_images; policy, folder = map(pathlib.Path, sys.argv[1:])\n"
        "test_live_images.watched(policy, folder, report_to=['wandb', 'trackio'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_policy), str(tmp_path / "run")],
        cwd=Path(__file__).parent,
        env={**os.environ, **places},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Images of interference" not in done.stdout + done.stderr
    for folder in kept.values():
        images = [path.read_bytes() for path in folder.rglob("*.png")]
        assert len(images) == 2, folder  # of seven logged steps
        for image in images:  # a PNG's header: 800 x 360
            assert image[1:4] == b"PNG" and image[16:24] == (800).to_bytes(4) + (360).to_bytes(4)


def test_a_backend_that_fails_is_left_out(tiny_policy, tmp_path, monkeypatch, caplog):
    """Logged once, and training goes on."""

    def no_network(*args):
        raise ConnectionError("no network")

    monkeypatch.setattr(live.LiveImages, "_to_tensorboard", no_network)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = watched(tiny_policy, tmp_path, report_to="tensorboard")
    assert trainer.state.global_step == 7
    assert len(messages(caplog, "tensorboard: ConnectionError: no network")) == 1
