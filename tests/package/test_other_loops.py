"""The examples without our trainer: they train, and their folders can be read and reported."""

import pytest
from processes import ROOT, load_script

from grpo_kernels.recorder.files import read_interference
from trl_ext.report.command import main as report_command


def test_the_example_learns_and_its_folder_can_be_reported(tmp_path, capsys):
    example = load_script(ROOT / "examples" / "plain_loop.py")
    rewards = example.train(steps=25, every=5, folder=str(tmp_path))
    assert sum(rewards[-5:]) / 5 > 2 * sum(rewards[:5]) / 5
    records = read_interference(tmp_path)
    assert [record.step for record in records] == [1, 6, 11, 16, 21]
    first = records[0]
    assert first.gram_PP.shape == (8, 8) and first.prompt_text_P[0] == "repeat token 1"
    assert first.metrics["interference/coverage"] == pytest.approx(1)
    assert first.metrics["interference/sketch_check"] == pytest.approx(1, abs=0.1)
    assert {"noise/within", "what_if/mean/cos", "curvature/fisher_trace_mean"} <= set(first.metrics)
    report_command(["report", str(tmp_path)])
    assert (tmp_path / "report.html").stat().st_size > 1000 and "up to step 21" in capsys.readouterr().out


@pytest.mark.parametrize("trainer", ["rloo", "grpo"])
def test_the_example_with_trls_trainer_can_be_reported(trainer, tiny_policy, tmp_path, capsys):
    example = load_script(ROOT / "examples" / "attached.py")
    assert len(example.train(trainer, str(tiny_policy), steps=3, every=2, folder=str(tmp_path))) == 3
    records = read_interference(tmp_path)
    assert [record.step for record in records] == [1, 3]
    assert all(len(record.prompt_key_P) == 8 and "What is" in record.prompt_text_P[0] for record in records)
    report_command(["report", str(tmp_path)])
    assert (tmp_path / "report.html").stat().st_size > 1000 and "up to step 3" in capsys.readouterr().out
