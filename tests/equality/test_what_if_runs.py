"""What-if tables of real runs: against each normalisation's own gradient, in the log, in files, by the command."""

import json
import math
import runpy
import sys

import numpy as np
import pytest
import torch
from harness import PLAIN, graded, logged, messages, train
from peft import LoraConfig

from trl_ext import CurvatureGRPOConfig, read_interference
from trl_ext.recorder.files import FOLDER
from trl_ext.report.what_if_command import main as what_if_command


def by_length(completion_ids, **kwargs):
    """Of every group some are right and some aren't, mostly."""
    return [float(len(ids) % 2) for ids in completion_ids]


def trained(policy, folder, method, lora, **options):
    """(gradient, log) of one step on the same rollouts, in exact mode, whatever the normalisation."""
    adapter = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0) if lora else None
    exact = {"interference_every": 1, "interference_dim": 0, "learning_rate": 0.0, "max_grad_norm": 0.0}
    rows = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2, "max_steps": 1}
    options = {**PLAIN, **exact, **rows, "normalization": method, **options}
    recorder = train(policy, folder, graded, peft_config=adapter, **options).recorder
    gradient = recorder.gradients[0]
    return torch.cat([gradient[name].double().flatten() for name in sorted(gradient)]), recorder.logs[0]


@pytest.mark.parametrize("lora", [False, True])
def test_against_separate_backward_passes(lora, tiny_policy, tmp_path):
    """In exact mode to 1e-5; in the sketch's to its error: 64 x 64 numbers, squared lengths to 1/64."""
    methods = ("mean", "loo", "max_rl", "batch_std", "rank", "mean_abs")
    now, log = trained(tiny_policy, tmp_path / "std", "std", lora)
    _, sketched = trained(tiny_policy, tmp_path / "sketch", "std", lora, interference_dim=64)
    assert log["what_if/std/cos"] == pytest.approx(1) and log["what_if/std/factor"] == pytest.approx(1)
    seen = 0
    for method in methods:
        its, _ = trained(tiny_policy, tmp_path / method, method, lora)
        cos, factor = float(its @ now / its.norm() / now.norm()), float(its @ now / now.square().sum())
        assert log[f"what_if/{method}/cos"] == pytest.approx(cos, abs=1e-5)
        assert log[f"what_if/{method}/factor"] == pytest.approx(factor, rel=1e-4)
        assert sketched[f"what_if/{method}/cos"] == pytest.approx(cos, abs=5 / 64 * math.sqrt(max(1 - cos**2, 1e-4)))
        assert sketched[f"what_if/{method}/factor"] == pytest.approx(factor, rel=0.1)
        seen += cos < 0.9999
    assert seen >= 2  # not all are a factor


def test_the_log_and_the_file(tiny_policy, tmp_path):
    trainer = train(tiny_policy, tmp_path, by_length, interference_every=1, per_device_train_batch_size=16)
    logs = logged(trainer)
    records = read_interference(tmp_path)
    assert len(records) == len(logs) == 2
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
    ],
)
def test_what_is_not_logged(options, absent, tiny_policy, tmp_path):
    trainer = train(tiny_policy, tmp_path, by_length, **{"interference_every": 1, **options})
    names = [name for entry in trainer.state.log_history for name in entry if name.startswith(f"what_if/{absent}/")]
    assert not names and trainer.state.global_step == 2
    assert all("interference/live_prompts" in entry for entry in trainer.state.log_history if "reward" in entry)


def test_options_of_a_function_are_its_own(tiny_policy, tmp_path):
    def scaled(rewards_PG, context, alpha):
        return alpha * (rewards_PG - rewards_PG.mean(1, keepdim=True))

    options = {"normalization": scaled, "normalization_kwargs": {"alpha": 3.0}}
    trainer = train(tiny_policy, tmp_path, graded, interference_every=1, per_device_train_batch_size=16, **options)
    log = logged(trainer)[0]
    assert log["what_if/mean/factor"] == pytest.approx(1 / 3, rel=1e-4) and "what_if/power/cos" in log


def test_a_failure_leaves_the_rest(tiny_policy, tmp_path, monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise MemoryError("no room")

    monkeypatch.setattr("trl_ext.recorder.what_if.step_table", broken)
    with caplog.at_level("WARNING"):
        train(tiny_policy, tmp_path, by_length, interference_every=1)
    (said,) = messages(caplog, "isn't logged from here on")
    assert "What other normalisations would have done" in said and "no room" in said
    assert len(read_interference(tmp_path)) == 2


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["maen"], "unknown normalization 'maen'.*Did you mean 'mean'"),
        (["adaptive"], "'adaptive' needs a state from earlier steps"),
        ("mean", "must be a list of names"),
    ],
)
def test_wrong_names(names, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        CurvatureGRPOConfig(output_dir=str(tmp_path), what_if=names)


# ---- the command


@pytest.fixture(scope="module")
def run_folder(tiny_policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    options = {"interference_every": 1, "per_device_train_batch_size": 16, "max_steps": 6, "learning_rate": 0.01}
    train(tiny_policy, folder, by_length, **options)
    return folder


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


def test_a_function_and_files_without_its_columns(run_folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "mine.py").write_text("def half(rewards_PG, context):\n    return (rewards_PG - 0.5) * 2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    old = tmp_path / "old"
    (old / FOLDER).mkdir(parents=True)
    for path in (run_folder / FOLDER).glob("*.npz"):
        with np.load(path) as file:
            kept = {n: file[n] for n in file.files if n not in ("advantage", "position", "weight", "what_if", "length")}
        np.savez_compressed(old / FOLDER / path.name, **kept)
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
    (tmp_path / FOLDER).mkdir()
    for path in (run_folder / FOLDER).glob("*.npz"):
        with np.load(path) as file:
            kept = {name: file[name] for name in file.files if name != "coefficient"}  # so that the table is all it has
        table = json.loads(kept["what_if"].tobytes().decode())
        for row in table["rows"].values():
            row.update(gain=0.5, gain_error=0.1, ahead=0.2, ahead_error=0.1)
        kept["what_if"] = np.frombuffer(json.dumps({**table, "no_gain": None}).encode(), dtype=np.uint8)
        np.savez_compressed(tmp_path / FOLDER / path.name, **kept)
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


def three_times(rewards_PG, context):
    return 3 * (rewards_PG - rewards_PG.mean(1, keepdim=True))


@pytest.mark.parametrize("how", ["plain", "clip", "adamw"])
def test_a_factor_is_a_learning_rate_but_under_adamw_and_a_clip(how, tiny_policy, tmp_path):
    """What-if says factor 3 and cosine 1 of ``three_times`` in a run of ``mean``. Plain SGD steps three times as far;
    AdamW, and a clip that bites at every step, take no notice."""
    options = {
        "plain": {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 1e-3},
        "clip": {"optim": "sgd", "max_grad_norm": 1e-3, "learning_rate": 1e-1},
        "adamw": {"optim": "adamw_torch", "max_grad_norm": 0.0, "learning_rate": 1e-4, "adam_epsilon": 1e-12},
    }[how]
    moved = {}
    for name, method in (("mean", "mean"), ("three", three_times)):
        chosen = {"interference_every": 1, "per_device_train_batch_size": 16, "max_steps": 1, **options}
        trainer = train(tiny_policy, tmp_path / name, graded, normalization=method, **chosen)
        before = type(trainer.model).from_pretrained(tiny_policy).state_dict()
        after = trainer.model.state_dict()
        moved[name] = torch.cat([(after[key] - before[key]).double().flatten() for key in sorted(before)])
        if name == "three":
            assert trainer.state.log_history[0]["what_if/mean/factor"] == pytest.approx(1 / 3, rel=1e-4)
    longer = float(moved["three"] @ moved["mean"] / moved["mean"].square().sum())
    assert longer == pytest.approx(3 if how == "plain" else 1, rel=2e-2)
    assert moved["mean"].norm() > 1e-6


def test_off_policy_is_left_out(tiny_policy, tmp_path):
    """Of two iterations on the same rollouts the second, whose ratios aren't 1, isn't told."""
    options = {"interference_every": 1, "num_iterations": 2, "max_steps": 4, "per_device_train_batch_size": 16}
    trainer = train(tiny_policy, tmp_path, graded, **options)
    logs = [entry for entry in trainer.state.log_history if "reward" in entry or "interference/live_prompts" in entry]
    assert len(read_interference(tmp_path)) == 4
    assert not any(record.what_if for record in read_interference(tmp_path)), "old log-probs are kept in all of them"
    assert not any(name.startswith(("what_if/", "noise/")) for entry in logs for name in entry)


def test_sketched_tables_of_twenty_draws_are_within_their_error():
    """Same gradients, twenty projections: cosine and factor scatter by no more than 1 / dim, times how far the method's
    step leans from the step taken, and their mean is the exact one's."""
    from grpo_kernels import normalize_rewards
    from grpo_kernels.interference.gradient_sketch import GradientSketch
    from grpo_kernels.interference.what_if import StepScores, candidates, what_if
    from trl_ext.tasks.small_policy import build_model, build_tokenizer

    torch.manual_seed(0)
    tokenizer = build_tokenizer((1,))
    model = build_model(tokenizer)
    n_prompts, count, dim = 12, 4, 32
    size = n_prompts * count
    reward_PG = torch.randint(0, 5, (n_prompts, count)) / 4.0
    reward_PG[0], reward_PG[1] = torch.tensor([0.0, 0.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    advantage_B = normalize_rewards(reward_PG, "std").flatten()
    ids = torch.randint(4, len(tokenizer), (size, 10))
    prompt_B = torch.arange(n_prompts).repeat_interleave(count)

    def table(width, seed):
        sketch = GradientSketch(model, width)
        with sketch.step(seed) as recorded, sketch.rows(prompt_B):
            logp = model(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1)
            (-logp.gather(2, ids[:, 1:, None]).squeeze(2).sum(1) @ advantage_B).backward()
        sketch.close()
        scores = StepScores(
            recorded[0].gram(),
            -advantage_B,
            advantage_B,
            advantage_B,
            prompt_B,
            torch.arange(count).repeat(n_prompts),
            reward_PG,
        )
        return what_if(scores, candidates(["mean", "max_rl", "rank", "power"])).rows

    exact, drawn = table(0, 0), [table(dim, seed) for seed in range(20)]
    for name, row in exact.items():
        cosines = torch.tensor([rows[name].cos for rows in drawn], dtype=torch.float64)
        factors = torch.tensor([rows[name].factor for rows in drawn], dtype=torch.float64) / row.factor
        leaning = math.sqrt(1 - row.cos**2)
        assert leaning > 0.01, name
        for values, truth in ((cosines, row.cos), (factors, 1.0)):
            rmse = float((values - truth).square().mean().sqrt())
            assert rmse < 1.3 / dim * leaning / row.cos, (name, rmse)
            assert abs(float(values.mean()) - truth) < 4 * float(values.std()) / math.sqrt(20) + 1 / dim**2, name
        assert float(factors.std()) > 0  # drawn anew
