"""How a run starts: what is imported, what --help says, which wrong arguments are named, what is set by itself."""

import dataclasses
import logging
import os
import shlex
import subprocess
import sys

import pytest
from processes import ROOT, load_script

import grpo_kernels
import trl_ext
from examples.tasks.command_line import did_you_mean
from examples.tasks.load_model import check_model, known_models
from trl_ext import CurvatureGRPOConfig
from trl_ext.options import GROUPS, CurvatureOptions

SCRIPT = ROOT / "examples" / "math.py"
HEAVY = ("torch", "trl", "transformers", "datasets", "numpy")
RUN = f"""
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__") if sys.argv[0].endswith(".py") else \\
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert not end.code, end.code
print("heavy:", [name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
"""


def printed_without_heavy_imports(*arguments, columns=80):
    command = [sys.executable, "-c", RUN, *map(str, arguments)]
    env = {**os.environ, "COLUMNS": str(columns)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "heavy: []" in done.stderr, done.stderr
    return done.stdout


@pytest.mark.parametrize("columns", [80, 120])
def test_the_script_s_help_is_one_screen_and_imports_nothing_heavy(columns):
    printed = printed_without_heavy_imports(SCRIPT, "--help", columns=columns)
    lines = printed.splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= columns
    for heading, names in GROUPS.items():
        assert f"{heading}:" in printed
        assert all(f"--{name} " in printed for name in names)
    assert "[64]" in printed and "--help_all" in printed


def test_the_report_s_help_imports_nothing_heavy():
    assert "--json FILE" in printed_without_heavy_imports("trl_ext", "report", "--help")


def test_every_option_is_in_one_group_with_a_help():
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(one.name for one in dataclasses.fields(CurvatureOptions))
    for one in dataclasses.fields(CurvatureOptions):
        assert len(one.metadata["help"]) > 20, one.name


@pytest.mark.parametrize("package", [grpo_kernels, trl_ext])
def test_lazy_packages_hold_what_they_list(package):
    for name in package.__all__:
        assert name.isupper() or getattr(package, name).__name__ == name
        assert name in dir(package)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        package.nonsense  # noqa: B018


def test_help_all_lists_trl_s_options(capsys):
    with pytest.raises(SystemExit) as end:
        load_script().main(["--help_all"])
    assert not end.value.code
    printed = capsys.readouterr().out
    assert "--learning_rate" in printed and "--interference_every" in printed and len(printed.splitlines()) > 500


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--learing_rate 1e-5", "--learing_rate: no such option, did you mean --learning_rate?"),
        ("--interference_evry=5", "--interference_evry: no such option, did you mean --interference_every?"),
        ("--qqqqqq 1", "--qqqqqq: no such option"),
        ("--max_steps 3 stray", "stray: belongs to no option"),
        ("--max_steps many", "invalid int value: 'many'"),
        ("--model_name_or_path smal", "no such folder, did you mean small? there are small, smollm2"),
        ("--config recipe.yaml", "--normalisation: no such option, did you mean --normalization?"),
        ("--dataset gsm9k", "--dataset 'gsm9k': choose from mixture, arithmetic, gsm8k, math"),
        ("--dataset_path nowhere.jsonl", "no such file: nowhere.jsonl"),
        ("--dataset_path bad.jsonl", "bad.jsonl, line 2 isn't JSON"),
        ("--dataset_path latin.jsonl", "latin.jsonl isn't UTF-8 text"),
        ("--dataset_path bad.parquet", "bad.parquet isn't a parquet file"),
        ("--config nope.yaml", "--config nope.yaml: no such file"),
        ('--normalization_kwargs \'{"method": "std"}\'', "the method goes into normalization"),
        ("--normalization_kwargs '{alpha}'", "normalization_kwargs='{alpha}' isn't a JSON object"),
        ("--dataset_path gold.jsonl", "none of the 2 gold answers can be parsed"),
        ("--dataset_path ok.jsonl --question_column text", "--question_column='text' is not a column"),
        ("--eval_dataset_path x.jsonl", "--eval_dataset_path goes with --dataset_path"),
        ("--normalization gpo", "unknown normalization 'gpo': choose from none, mean, batch_mean, loo, std"),
        ("--normalization power --normalization_kwargs '{\"alpha\": 2}'", "alpha=2 must be a number in [0, 1]"),
        ("--per_device_train_batch_size 12", "(12) must be divisible by num_generations (8)"),
        ("--output_dir /dev/null/run", "--output_dir /dev/null/run can't be written to"),
        ("--resume_from_checkpoint latest", "resume_from_checkpoint=latest: no complete checkpoint in"),
        ("--resume_from_checkpoint .", "no complete checkpoint there"),
        ("--prompt_style poem", "--prompt_style 'poem': choose from auto, chat, few_shot"),
        ("--dataset arithmetic --levels 7", "levels=(7,): choose from"),
        ("--levels 1", "--levels goes with --dataset arithmetic"),
        ("--train_size 5000", "count=5000 is more than the train exercises that sums, reversals"),
        ("--eval_size 0", "--eval_size 0 must be at least 1"),
        ("--load_in_4bit", "need --use_peft"),
        ("--model_name_or_path ./nowhere", "--model_name_or_path ./nowhere: no such folder; there are small, smollm2"),
        ("--model_name_or_path .", "the folder holds no config.json"),
    ],
)
def test_bad_input_ends_before_a_model_is_loaded(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("examples.tasks.load_model.find_model", lambda *args: pytest.fail("got as far as the model"))
    (tmp_path / "bad.jsonl").write_text('{"question": "q", "answer": "1"}\n{oops\n')
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "caf\xe9", "answer": "1"}\n')
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and then nothing")
    (tmp_path / "gold.jsonl").write_text('{"question": "q", "answer": "none of it"}\n' * 2)
    (tmp_path / "ok.jsonl").write_text('{"question": "q", "answer": "1"}\n' * 9)
    (tmp_path / "recipe.yaml").write_text("model_name_or_path: small\nnormalisation: std\n")
    assert_refused(SCRIPT, arguments, message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--max_step_typo 3", "--max_step_typo"),
        ("--config nowhere.yaml", "--config nowhere.yaml: no such file"),
        ("--num_generations 7", "num_generations"),
        ("--output_dir /dev/null/run", "--output_dir /dev/null/run can't be written to"),
    ],
)
def test_bad_input_ends_the_calculator_before_its_warm_up(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(ROOT / "examples" / "calculator.py", f"--use_cpu true {arguments}", message)


def test_a_model_that_the_hub_does_not_have(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(SCRIPT, "--model_name_or_path no-such-model-xyz", "there are small, smollm2")


def assert_refused(script, arguments, message):
    """The script ends with one line that names the error."""
    output = [] if "--output_dir" in arguments else ["--output_dir", "out"]
    with pytest.raises(SystemExit) as stopped:
        load_script(script).main([*shlex.split(arguments), *output])
    said = str(stopped.value)
    assert message in said and said.startswith("error: ") and "\n" not in said


def test_models_that_lie_here_are_named(tmp_path, monkeypatch):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "models" / "mine" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert "folders with a model (models/mine)" in known_models()


def test_nothing_close_is_not_suggested():
    assert did_you_mean("--zzz", ["--learning_rate"]) == ""
    check_model("small-model")  # may be the hub's


# ---- what is set by itself


def test_without_a_gpu_a_config_trains_on_the_cpu_in_float32(tmp_path):
    config = CurvatureGRPOConfig(output_dir=str(tmp_path))
    assert config.use_cpu and config.bf16 is False
    assert CurvatureGRPOConfig(output_dir=str(tmp_path), bf16=True, use_cpu=True).bf16  # what is set stays


@pytest.mark.parametrize(
    ("gpu", "has_bf16", "given", "accelerate_on_cpu", "expected"),
    [
        (True, True, {}, "", (None, False)),  # TRL's default: bf16
        (True, True, {}, "true", (False, False)),  # accelerate launch --cpu
        (True, False, {}, "", (False, False)),
        (True, True, {"use_cpu": True}, "", (False, True)),
        (True, False, {"bf16": True}, "", (True, False)),  # TRL says what is wrong
        (False, False, {}, "", (False, True)),
    ],
)
def test_precision_follows_the_device(gpu, has_bf16, given, accelerate_on_cpu, expected, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: gpu)
    monkeypatch.setattr("trl_ext.config.is_torch_bf16_gpu_available", lambda: has_bf16)
    monkeypatch.setenv("ACCELERATE_USE_CPU", accelerate_on_cpu or "false")
    monkeypatch.setattr("trl_ext.config.GRPOConfig.__post_init__", lambda self: None)  # which looks for the GPU
    config = CurvatureGRPOConfig(output_dir="unused", generation_batch_size=8, **given)
    assert (config.bf16, config.use_cpu) == expected


# ---- what is said


def test_one_line_of_bitsandbytes_is_dropped_and_others_stay(caplog):
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    with caplog.at_level(logging.WARNING, logger.name):
        logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "no kernels")
        logger.warning("something that matters")
    assert [record.getMessage() for record in caplog.records] == ["something that matters"]


@pytest.mark.parametrize(
    ("variables", "processes", "alone"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}, 1, True),  # --cpu --num_processes 2
        ({"ACCELERATE_MIXED_PRECISION": "no"}, 1, False),
        ({"MASTER_ADDR": "127.0.0.1"}, 1, False),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"}, 2, False),
    ],
)
def test_one_process_where_several_were_asked_for(variables, processes, alone, monkeypatch):
    for name in ("ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert load_script().started_alone(processes) is alone
