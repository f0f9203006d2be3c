"""What-if tables of real runs: against each normalisation's own gradient, in the log, in files, by the command."""

import json
import math
import runpy
import sys

import numpy as np
import pytest
import torch
from harness import assert_what_if, flat, graded, logged, lora, messages, one_step, parameters, train

from grpo_kernels import normalize_rewards
from grpo_kernels.interference.gradient_sketch import GradientSketch
from grpo_kernels.interference.what_if import StepScores, candidates, what_if
from grpo_kernels.recorder.files import FOLDER
from trl_ext import read_interference
from trl_ext.report.what_if_command import main as what_if_command
from trl_ext.tasks.small_policy import build_model, build_tokenizer


def by_length(completion_ids, **kwargs):
    """Of every group some are right and some aren't, mostly."""
    return [float(len(ids) % 2) for ids in completion_ids]


@pytest.mark.parametrize("adapter", [None, lora()], ids=["full", "lora"])
def test_against_separate_backward_passes(adapter, tiny_policy, tmp_path):
    """In exact mode to 1e-5; in the sketch's to its error: 64 x 64 numbers, squared lengths to 1/64."""

    def run(method, **options):
        options |= {"normalization": method, "peft_config": adapter}
        return one_step(tiny_policy, tmp_path / f"{method}{len(options)}", graded, **options)

    now, log = run("std")
    _, sketched = run("std", interference_dim=64)
    assert log["what_if/std/cos"] == pytest.approx(1) and log["what_if/std/factor"] == pytest.approx(1)
    cosines = []
    for method in ("mean", "loo", "max_rl", "batch_std", "rank", "mean_abs"):
        cosines.append(assert_what_if(log, method, run(method)[0], now))
        error = 5 / 64 * math.sqrt(max(1 - cosines[-1] ** 2, 1e-4))
        assert sketched[f"what_if/{method}/cos"] == pytest.approx(cosines[-1], abs=error)
        assert sketched[f"what_if/{method}/factor"] == pytest.approx(log[f"what_if/{method}/factor"], rel=0.1)
    assert sum(cos < 0.9999 for cos in cosines) >= 2  # not all are a factor


@pytest.fixture(scope="module")
def run(tiny_policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    options = {"interference_every": 1, "per_device_train_batch_size": 16, "max_steps": 6, "learning_rate": 0.01}
    return train(tiny_policy, folder, by_length, **options), folder


@pytest.fixture
def run_folder(run):
    return run[1]


def test_the_log_and_the_file(run):
    logs, records = logged(run[0]), read_interference(run[1])
    assert len(records) == len(logs) == 6
    for entry, record in zip(logs, records, strict=True):
        names = {name.split("/")[1] for name in entry if name.startswith("what_if/")}
        assert {"mean", "std", "power"} <= names and "decoupled" not in names
        table = record.what_if
        assert set(table["rows"]) == names and table["used"] == "std"
        assert table["rows"]["mean"]["cos"] == pytest.approx(entry["what_if/mean/cos"])
        n_prompts = len(record.prompt_id_P)
        assert len(table["rows"]["mean"]["share"]) == n_prompts and len(table["mutual"]) == len(names)
        size = len(record.prompt_B)
        for values in (record.position_B, record.advantage_B, record.weight_B, record.length_B):
            assert values.shape == (size,)
        assert record.function_rewards_BF.shape == (size, 1) and record.rewards_PG.shape == (n_prompts, 4)
        place = np.searchsorted(record.prompt_id_P, record.prompt_B)
        np.testing.assert_allclose(record.rewards_PG[place, record.position_B], record.reward_B)
        live = record.coefficient_B != 0
        expected = -record.advantage_B * record.weight_B
        np.testing.assert_allclose(record.coefficient_B[live], expected[live], rtol=1e-5)
        assert (record.length_B > 0).all()
        if table["noise"] is not None:
            assert entry["noise/within"] == pytest.approx(table["noise"]["within"])
            assert 2 <= entry["noise/advised_generations"] <= size
            assert 2 <= entry["noise/advised_low"] <= entry["noise/advised_high"] <= size


@pytest.mark.parametrize(
    ("options", "absent"),
    [
        ({"what_if": []}, "mean"),
        ({"what_if": ["std"]}, "mean"),
        ({"beta": 0.1}, "std"),
        ({"steps_per_generation": 2, "per_device_train_batch_size": 8}, "batch_std"),
        ({"num_iterations": 2}, "std"),  # old log-probs are kept, and the second iteration's ratios aren't 1
    ],
)
def test_what_is_not_logged(options, absent, tiny_policy, tmp_path):
    trainer = train(tiny_policy, tmp_path, by_length, **{"interference_every": 1, **options})
    absent = ("what_if/", "noise/") if "num_iterations" in options else f"what_if/{absent}/"
    assert not [name for entry in trainer.state.log_history for name in entry if name.startswith(absent)]
    assert len(read_interference(tmp_path)) == trainer.state.global_step == 2
    assert all("interference/live_prompts" in entry for entry in trainer.state.log_history if "reward" in entry)


def test_a_failure_leaves_the_rest(tiny_policy, tmp_path, monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise MemoryError("no room")

    monkeypatch.setattr("grpo_kernels.recorder.what_if_log.step_table", broken)
    train(tiny_policy, tmp_path, by_length, interference_every=1)
    (said,) = messages(caplog, "isn't logged from here on")
    assert "What other normalisations would have done" in said and "no room" in said
    assert len(read_interference(tmp_path)) == 2


# ---- the command


def test_the_command(run_folder, tmp_path, capsys):
    file = tmp_path / "table.json"
    what_if_command([str(run_folder), "--json", str(file)])
    printed = capsys.readouterr().out
    assert "trained with std" in printed and "batch_std" in printed and "6 steps" in printed
    table = json.loads(file.read_text())
    assert table["used"] == "std" and table["methods"]["std"]["cos"] == pytest.approx(1)
    one = table["methods"]["mean"]
    assert one["steps"] >= 1 and one["kind"] in ("rate", "schedule") and 0 < one["factor"] < 1
    assert any({"std"} <= set(group) for group in table["same"])


def rewrite(run_folder, folder, change):
    """Writes the run's files to ``folder``, their columns changed."""
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    for path in (run_folder / FOLDER).glob("*.npz"):
        with np.load(path) as file:
            np.savez_compressed(folder / FOLDER / path.name, **change(dict(file)))


def test_a_function_and_files_without_its_columns(run_folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "mine.py").write_text("def half(rewards_PG, context):\n    return (rewards_PG - 0.5) * 2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    old = tmp_path / "old"
    without = ("advantage", "position", "weight", "what_if", "length")
    rewrite(run_folder, old, lambda columns: {n: values for n, values in columns.items() if n not in without})
    (old / "run_config.json").write_text((run_folder / "run_config.json").read_text())
    for folder in (run_folder, old):
        what_if_command([str(folder), "--function", "mine:half", "--methods", "mean", "std"])
        printed = capsys.readouterr().out
        assert "half" in printed and "mean" in printed and "max_rl" not in printed
    what_if_command([str(run_folder), "--methods", "mean"])
    want = capsys.readouterr().out.split("mean")[1].split()[:3]
    what_if_command([str(old), "--methods", "mean"])
    assert capsys.readouterr().out.split("mean")[1].split()[:3] == want


def test_columns_of_earlier_versions_are_ignored(run_folder, tmp_path, capsys):
    def as_earlier(columns):
        del columns["coefficient"]  # so that the table is all it has
        table = json.loads(columns["what_if"].tobytes().decode())
        for row in table["rows"].values():
            row.update(gain=0.5, gain_error=0.1, ahead=0.2, ahead_error=0.1)
        text = json.dumps({**table, "no_gain": None}).encode()
        return {**columns, "what_if": np.frombuffer(text, dtype=np.uint8)}

    rewrite(run_folder, tmp_path, as_earlier)
    what_if_command([str(tmp_path), "--json", str(tmp_path / "table.json")])
    assert "  gain" not in capsys.readouterr().out
    methods = json.loads((tmp_path / "table.json").read_text())["methods"]
    assert "mean" in methods and "gain" not in methods["mean"]


def test_a_function_that_fails_and_a_run_of_one_step(run_folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "fails.py").write_text("def half(rewards_PG, context):\n    return rewards_PG / context['no such']\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "one" / FOLDER).mkdir(parents=True)
    path = next(iter(sorted((run_folder / FOLDER).glob("*.npz"))))
    (tmp_path / "one" / FOLDER / path.name).write_bytes(path.read_bytes())
    what_if_command([str(tmp_path / "one"), "--function", "fails:half", "--methods", "mean"])
    printed = capsys.readouterr().out
    assert "half: not told in 1 step (fails:half raised KeyError: 'no such')" in printed
    assert "1 step (" in printed and "schedule " not in printed.split("cosine: ")[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no such folder"),
        (["RUN", "--methods", "maen"], "Did you mean 'mean'"),
        (["RUN", "--function", "mine"], "module:name"),
        (["RUN", "--function", "no_such_module:f"], "no_such_module"),
        (["RUN", "--function", "math:no_such"], "no_such"),
    ],
)
def test_wrong_calls(arguments, message, run_folder, monkeypatch):
    arguments = [str(run_folder) if one == "RUN" else one for one in arguments]
    with pytest.raises(SystemExit) as stopped:
        monkeypatch.setattr(sys, "argv", ["trl_ext", "what-if", *arguments])
        runpy.run_module("trl_ext", run_name="__main__")
    assert message in str(stopped.value)


def test_a_run_without_anything_to_compare(tiny_policy, tmp_path):
    train(tiny_policy, tmp_path, by_length, interference_every=1, beta=0.1)
    with pytest.raises(SystemExit, match="coefficient"):
        what_if_command([str(tmp_path)])


# ---- what becomes of a factor


def multiplied(rewards_PG, context, alpha):
    return alpha * (rewards_PG - rewards_PG.mean(1, keepdim=True))


@pytest.mark.parametrize("how", ["plain", "clip", "adamw"])
def test_a_factor_is_a_learning_rate_but_under_adamw_and_a_clip(how, tiny_policy, tmp_path):
    """In a run of ``mean`` three times its step has factor 3 and cosine 1. Plain SGD steps three times as far;
    AdamW, and a clip that bites at every step, take no notice."""
    options = {
        "plain": {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 1e-3},
        "clip": {"optim": "sgd", "max_grad_norm": 1e-3, "learning_rate": 1e-1},
        "adamw": {"optim": "adamw_torch", "max_grad_norm": 0.0, "learning_rate": 1e-4, "adam_epsilon": 1e-12},
    }[how]
    moved = {}
    three = {"normalization": multiplied, "normalization_kwargs": {"alpha": 3.0}}
    for name, method in (("mean", {"normalization": "mean"}), ("three", three)):
        chosen = {"interference_every": 1, "per_device_train_batch_size": 16, "max_steps": 1, **options, **method}
        trainer = train(tiny_policy, tmp_path / name, graded, **chosen)
        before = parameters(type(trainer.model).from_pretrained(tiny_policy))
        moved[name] = flat(parameters(trainer.model)) - flat(before)
    log = trainer.state.log_history[0]  # a method's option alpha isn't the function's
    assert log["what_if/mean/factor"] == pytest.approx(1 / 3, rel=1e-4) and "what_if/power/cos" in log
    longer = float(moved["three"] @ moved["mean"] / moved["mean"].square().sum())
    assert longer == pytest.approx(3 if how == "plain" else 1, rel=2e-2)
    assert moved["mean"].norm() > 1e-6


@pytest.fixture(scope="module")
def sketched_tables():
    """A function: the what-if table of one step of the built-in model, by width and seed of the projection."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer((1,))
    model = build_model(tokenizer)
    n_prompts, count = 12, 4
    reward_PG = torch.randint(0, 5, (n_prompts, count)) / 4.0
    reward_PG[0], reward_PG[1] = torch.tensor([0.0, 0.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    advantage_B = normalize_rewards(reward_PG, "std").flatten()
    ids = torch.randint(4, len(tokenizer), (n_prompts * count, 10))
    prompt_B, position_B = torch.arange(n_prompts).repeat_interleave(count), torch.arange(count).repeat(n_prompts)

    def table(width, seed):
        sketch = GradientSketch(model, width)
        with sketch.step(seed) as recorded, sketch.rows(prompt_B):
            logp = model(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1)
            (-logp.gather(2, ids[:, 1:, None]).squeeze(2).sum(1) @ advantage_B).backward()
        columns = (-advantage_B, advantage_B, advantage_B, prompt_B, position_B, reward_PG)
        return what_if(StepScores(recorded[0].gram(), *columns), candidates(["mean", "max_rl", "rank", "power"])).rows

    return table


def test_sketched_tables_of_twenty_draws_are_within_their_error(sketched_tables):
    """Same gradients, twenty projections: cosine and factor scatter by no more than 1 / dim, times how far the method's
    step leans from the step taken, and their mean is the exact one's."""
    dim = 32
    drawn = [sketched_tables(dim, seed) for seed in range(20)]
    for name, row in sketched_tables(0, 0).items():
        cosines = torch.tensor([rows[name].cos for rows in drawn], dtype=torch.float64)
        factors = torch.tensor([rows[name].factor for rows in drawn], dtype=torch.float64) / row.factor
        leaning = math.sqrt(1 - row.cos**2)
        assert leaning > 0.01, name
        for values, truth in ((cosines, row.cos), (factors, 1.0)):
            rmse = float((values - truth).square().mean().sqrt())
            assert rmse < 1.3 / dim * leaning / row.cos, (name, rmse)
            assert abs(float(values.mean()) - truth) < 4 * float(values.std()) / math.sqrt(20) + 1 / dim**2, name
        assert float(factors.std()) > 0  # drawn anew
