"""Files of interference: what was written is read, small and large steps, kills in the middle, bad input."""

import os
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch

from grpo_kernels.interference.step_gradients import StepGradients
from grpo_kernels.recorder.files import MAX_SEQUENCES, read_interference, write_step

NAN = float("nan")


def random_step(prompts: int, n: int, seed: int = 0, coefficients: bool = True) -> StepGradients:
    generator = torch.Generator().manual_seed(seed)
    size = prompts * n
    vectors = torch.randn(size, 20, generator=generator)
    ids = torch.arange(prompts).repeat_interleave(n)[torch.randperm(size, generator=generator)] * 3 - 5
    rewards = torch.rand(size, generator=generator)
    rewards[0] = NAN
    given = torch.randn(size, generator=generator) if coefficients else None
    return StepGradients(vectors @ vectors.T, ids, rewards, given, n)


def test_a_small_step_is_read_as_written(tmp_path):
    step = random_step(3, 4)
    texts = ["Was ist 2 + 2? π≈3\0", "x" * 300, "\ud800"]  # NUL, too long, not UTF-8
    write_step(tmp_path, 10, step, {"interference/cos_mean": 0.25}, [2**62, -7, 0], texts)
    [record] = read_interference(tmp_path)
    assert record.step == 10 and record.metrics == {"interference/cos_mean": 0.25}
    assert record.prompt_id_P.tolist() == [-5, -2, 1] and record.prompt_key_P.tolist() == [2**62, -7, 0]
    assert record.prompt_text_P == [texts[0], "x" * 200, "?"]
    np.testing.assert_array_equal(record.gram_BB, step.gram_BB.numpy())
    np.testing.assert_array_equal(record.prompt_B, step.prompt_B.numpy())
    np.testing.assert_array_equal(record.reward_B, step.reward_B.double().numpy())
    np.testing.assert_array_equal(record.coefficient_B, step.coefficient_B.double().numpy())
    members_PB = (step.prompt_B == torch.tensor([[-5], [-2], [1]])).double()
    gram_BB = step.gram_BB.double()
    np.testing.assert_allclose(record.gram_PP, members_PB @ gram_BB @ members_PB.T, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(record.trace_P, members_PB @ gram_BB.diagonal(), rtol=1e-5)
    rewards_P = [step.reward_B[(members == 1) & ~step.reward_B.isnan()].double() for members in members_PB]
    assert record.sigma_P == pytest.approx([rewards.std(correction=0).item() for rewards in rewards_P])


def test_a_large_step_keeps_prompts_and_stays_small(tmp_path):
    """Above 512 sequences: the prompts' matrix, as a small step of the same would have it, and no texts here."""
    step = random_step(512, 2, coefficients=False)
    path = write_step(tmp_path, 1, step, {}, range(512))
    assert path.stat().st_size < 2**20
    [record] = read_interference(tmp_path)
    assert record.gram_BB is record.coefficient_B is record.prompt_text_P is None
    belongs = (step.prompt_B[:, None] == torch.as_tensor(record.prompt_id_P)).double()
    expected = belongs.T @ step.gram_BB.double() @ belongs
    np.testing.assert_allclose(record.gram_PP, expected.numpy(), rtol=1e-5, atol=1e-4)
    assert record.reward_B.shape == record.prompt_B.shape == (1024,)
    edge = random_step(MAX_SEQUENCES // 2, 2)
    assert write_step(tmp_path, 2, edge, {}, range(256)).stat().st_size < 2**20
    assert read_interference(tmp_path)[1].gram_BB is not None


def test_steps_are_in_order_and_a_resumed_run_writes_over(tmp_path):
    for number in (30, 5, 123456789, 10):
        write_step(tmp_path, number, random_step(2, 2, seed=number % 7), {"step": float(number)}, [0, 1])
    write_step(tmp_path, 10, random_step(2, 2), {"step": -1.0}, [0, 1])
    records = read_interference(str(tmp_path))
    assert [record.step for record in records] == [5, 10, 30, 123456789]
    assert records[1].metrics == {"step": -1.0}


@pytest.mark.parametrize("damage", ["half", "empty", "text", "another npz", "flipped"])
def test_a_damaged_file_is_skipped_and_named(tmp_path, damage):
    paths = [write_step(tmp_path, number, random_step(3, 4), {}, range(3)) for number in (1, 2, 3)]
    whole = paths[1].read_bytes()
    if damage == "another npz":
        np.savez(paths[1], other=np.zeros(3))
    else:
        middle = len(whole) // 2
        flipped = whole[:80] + bytes(255 - byte for byte in whole[80:middle]) + whole[middle:]
        paths[1].write_bytes({"half": whole[:middle], "empty": b"", "text": b"hello", "flipped": flipped}[damage])
    with pytest.warns(UserWarning, match=r"step_00000002\.npz is skipped"):
        assert [record.step for record in read_interference(tmp_path)] == [1, 3]


WRITER = """
import sys, torch
from grpo_kernels.interference.step_gradients import StepGradients
from grpo_kernels.recorder.files import write_step
vectors = torch.randn(500, 30)
step = StepGradients(vectors @ vectors.T, torch.arange(500) // 2, torch.rand(500), None, 2)
for number in range(100000):
    write_step(sys.argv[1], number, step, {"loss": float(number)}, range(250))
"""


def test_a_killed_run_leaves_whole_files(tmp_path):
    """Killed at some moment of writing one file after another: every file is whole, and a new run goes on."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], env=environment)
    folder = tmp_path / "interference"
    unfinished: list = []
    try:
        deadline = time.monotonic() + 60
        while not unfinished and time.monotonic() < deadline:
            if folder.is_dir() and len(list(folder.glob("step_*.npz"))) >= 2:
                unfinished = list(folder.glob(".*"))
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    assert unfinished  # it was seen in the middle of a file
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        records = read_interference(tmp_path)
    assert [record.step for record in records] == list(range(len(records))) and len(records) >= 2
    assert all(record.gram_BB.shape == (500, 500) for record in records)
    write_step(tmp_path, len(records), random_step(2, 2), {}, [0, 1])
    assert len(read_interference(tmp_path)) == len(records) + 1


def test_a_folder_that_is_not_a_run_is_named(tmp_path):
    for folder, message in ((tmp_path / "nothing_here", "nothing_here"), (tmp_path, "is not the folder of a run")):
        with pytest.raises(ValueError, match=message):
            read_interference(folder)
    assert list(tmp_path.iterdir()) == []
