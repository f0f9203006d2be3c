"""How a run starts: what is imported, what --help says, what a mistyped name gets, what is set by itself."""

import dataclasses
import importlib
import logging
import os
import subprocess
import sys
from types import SimpleNamespace

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


def run_python(code, *arguments, **variables):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )


WITHOUT = f"""
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__") if sys.argv[0].endswith(".py") else \\
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert not end.code, end.code
print("heavy:", [name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
"""


@pytest.mark.parametrize("columns", [80, 120])
def test_the_script_s_help_is_one_screen_and_imports_nothing_heavy(columns):
    done = run_python(WITHOUT, SCRIPT, "--help", COLUMNS=str(columns))
    assert done.returncode == 0 and "heavy: []" in done.stderr, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= columns
    for heading, names in GROUPS.items():
        assert f"{heading}:" in done.stdout
        assert all(f"--{name} " in done.stdout for name in names)
    assert "[64]" in done.stdout and "--help_all" in done.stdout


def test_the_report_s_help_imports_nothing_heavy():
    done = run_python(WITHOUT, "trl_ext", "report", "--help")
    assert done.returncode == 0 and "heavy: []" in done.stderr, done.stderr
    assert "--json FILE" in done.stdout


def test_every_option_is_in_one_group_with_a_help():
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(one.name for one in dataclasses.fields(CurvatureOptions))
    for one in dataclasses.fields(CurvatureOptions):
        assert len(one.metadata["help"]) > 20, one.name


@pytest.mark.parametrize("package", [grpo_kernels, trl_ext])
def test_lazy_packages_hold_what_they_say(package):
    for name in package.__all__:
        module = importlib.import_module(package._MODULES[name], package.__name__)
        assert getattr(package, name) is getattr(module, name)
        assert name in dir(package)
    assert sorted(package._MODULES) == sorted(package.__all__)
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
        (["--learing_rate", "1e-5"], "--learing_rate: no such option, did you mean --learning_rate?"),
        (["--interference_evry=5"], "--interference_evry: no such option, did you mean --interference_every?"),
        (["--qqqqqq", "1"], "--qqqqqq: no such option"),
        (["--max_steps", "3", "stray"], "stray: belongs to no option"),
        (["--max_steps", "many"], "invalid int value: 'many'"),
        (["--model_name_or_path", "smal"], "no such folder, did you mean small? there are small, smollm2"),
        (["--model_name_or_path", "./nowhere"], "no such folder; there are small, smollm2"),
        (["--model_name_or_path", "no-such-model-xyz"], "there are small, smollm2"),
    ],
)
def test_a_mistyped_name_is_told_what_there_is(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        load_script().main([*arguments, "--output_dir", str(tmp_path / "out")])
    assert message in str(stopped.value)
    assert str(stopped.value).count("\n") == 0


def test_a_mistyped_key_of_a_file_is_named(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model_name_or_path: small\nnormalisation: std\n")
    with pytest.raises(SystemExit, match=r"--normalisation: no such option, did you mean --normalization\?"):
        load_script().main(["--config", str(recipe), "--output_dir", str(tmp_path)])


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
    ("gpu", "has_bf16", "given", "expected"),
    [
        (True, True, {}, (None, False)),  # TRL's default: bf16
        (True, False, {}, (False, False)),
        (True, True, {"use_cpu": True}, (False, True)),
        (True, False, {"bf16": True}, (True, False)),  # TRL says what is wrong
        (False, False, {}, (False, True)),
    ],
)
def test_precision_follows_the_device(gpu, has_bf16, given, expected, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: gpu)
    monkeypatch.setattr("trl_ext.config.is_torch_bf16_gpu_available", lambda: has_bf16)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    config = SimpleNamespace(**{"bf16": None, "use_cpu": False, **given})
    CurvatureGRPOConfig._choose_device(config)
    assert (config.bf16, config.use_cpu) == expected


def test_the_cpu_that_accelerate_was_asked_for(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("trl_ext.config.is_torch_bf16_gpu_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    config = SimpleNamespace(bf16=None, use_cpu=False)
    CurvatureGRPOConfig._choose_device(config)
    assert config.bf16 is False


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
