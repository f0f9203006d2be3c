"""Verdicts: each signature on a run made sick on purpose, which raises it and only what belongs to it; healthy runs
raise nothing above advice; the command, and the watch while a run goes."""

import json
import math
import runpy
import sys
import time
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_trainer import build
from test_trainer_equality import prompts
from transformers import TrainerCallback

from grpo_kernels.interference.step_gradients import StepGradients
from trl_ext import CurvatureGRPOConfig
from trl_ext.recorder.files import write_step
from trl_ext.report.evidence import interval, state, student
from trl_ext.report.read_run import Run, read_run
from trl_ext.report.signatures import SIGNATURES
from trl_ext.report.verdicts import diagnose
from trl_ext.report.watch import Watch, looked_at

WORDS = 4  # the first token id that is a word


class Answers:
    """Stored rollouts: drawn anew at each step, ended by the end token, of a length that may depend on the step."""

    def __init__(self, length=lambda step: 6, same=False, ends=True, words=None):
        self.length, self.same, self.ends, self.words = length, same, ends, words

    def __call__(self, texts, trainer):
        tokenizer, step = trainer.processing_class, trainer.state.global_step
        generator = torch.Generator().manual_seed(1000 * step + len(texts))
        prompt_ids, completion_ids = [], []
        last = len(tokenizer) if self.words is None else WORDS + self.words
        for prompt in texts:
            prompt_ids.append(tokenizer.encode(f"<user>{prompt[0]['content']}<assistant>"))
            count = self.length(step) - self.ends
            ids = torch.randint(WORDS, last, (count,), generator=generator).tolist()
            ids = [ids[0]] * count if self.same else ids
            completion_ids.append([*ids, tokenizer.eos_token_id] if self.ends else ids)
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None}


class AtStep(TrainerCallback):
    """Does something to the model before a step, counted from 0; ``first``: and before the run."""

    def __init__(self, step, change, first=None):
        self.step, self.change, self.first = step, change, first

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.first is not None:
            with torch.no_grad():
                self.first(model)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                self.change(model)


def scaled_head(factor):
    def change(model):
        model.model.norm.weight.mul_(factor)

    return change


def noise(model):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def broken(model):
    model.model.norm.weight.fill_(math.nan)


def some(completion_ids, **kwargs):
    """About half are right, by what is in them: nothing to be learned of it in a few steps."""
    return [float(sum(ids) % 2) for ids in completion_ids]


def by_prompt(share_dead, dead=lambda text: float(zlib.crc32(text.encode()) % 2)):
    def reward(prompts, completion_ids, **kwargs):
        texts = [prompt[0]["content"] for prompt in prompts]
        return [
            dead(text) if zlib.crc32(text.encode()[::-1]) % 100 < 100 * share_dead else value
            for text, value in zip(texts, some(completion_ids), strict=True)
        ]

    return reward


class ByStep:
    """A reward that moves with the steps: ``level(call)`` of the answers are right, different in every group."""

    __name__ = "by_step"

    def __init__(self, level, held_out=None):
        self.level, self.held_out, self.calls = level, held_out, 0

    def __call__(self, prompts, completion_ids, **kwargs):
        evaluation = self.held_out is not None and "held" in str(prompts[0])
        level = self.held_out if evaluation else self.level(self.calls)
        self.calls += not evaluation
        right = round(level * len(completion_ids))
        order = np.random.default_rng(self.calls).permutation(len(completion_ids))
        return [float(place < right) for place in order]


def tiny(completion_ids, **kwargs):
    """One group differs by a thousandth, the others by 1."""
    return [value * (1e-3 if place < 4 else 1.0) for place, value in enumerate(some(completion_ids))]


def one_of_sixteen(completion_ids, **kwargs):
    """A single right answer, which ``max_rl`` weighs fifteen times."""
    return [float(place % 16 == 0) for place in range(len(completion_ids))]


class Burst:
    """A thousand times as large in one call."""

    __name__ = "burst"
    calls = 0

    def __call__(self, completion_ids, **kwargs):
        self.calls += 1
        return [value * (1000.0 if self.calls == 14 else 1.0) for value in some(completion_ids)]


def slow(completion_ids, **kwargs):
    time.sleep(0.4)
    return some(completion_ids)


def unscored(completion_ids, **kwargs):
    return [
        None if sum(ids) % 3 == 0 else value for ids, value in zip(completion_ids, some(completion_ids), strict=True)
    ]


def loud(prompts, completion_ids, **kwargs):
    """One prompt of each batch is paid in another currency."""
    return [value * (50.0 if place < 4 else 1.0) for place, value in enumerate(some(completion_ids))]


def opposed(task, completion_ids, **kwargs):
    """Two tasks want the opposite of the same answers."""
    wanted = [float(ids[0] == WORDS) for ids in completion_ids]
    return [value if one == "up" else 1 - value for one, value in zip(task, wanted, strict=True)]


def of_tasks():
    dataset = prompts(32)
    return dataset.add_column("task", ["up" if i % 2 else "down" for i in range(32)])


WIDE = {"per_device_train_batch_size": 32}  # eight groups a step: four steps are enough of them
LOGGED = {"interference_every": 1, "interference_dim": 16}
MANY = {"per_device_train_batch_size": 32, **LOGGED}
GROWING = Answers(length=lambda step: 4 + 3 * step)
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, "num_generations_eval": 4}

# signature -> reward, options, answers, what is done to the model, level, and what may be told beside it
SICK = {
    "all_wrong": (lambda completion_ids, **_: [0.0] * len(completion_ids), WIDE, Answers(), None, "critical", ()),
    "all_right": (lambda completion_ids, **_: [1.0] * len(completion_ids), WIDE, Answers(), None, "critical", ()),
    "mostly_dead": (by_prompt(0.9), {"per_device_train_batch_size": 32}, Answers(), None, "warning", ("no_progress",)),
    "few_live_prompts": (some, LOGGED, Answers(), None, "advice", ("unreliable",)),
    "unscored": (unscored, {}, Answers(), None, "warning", ("mostly_dead",)),
    "fell": (ByStep(lambda call: 0.75 if call < 12 else 0.1), {"max_steps": 24}, Answers(), None, "critical",
             ("mostly_dead",)),
    "no_progress": (some, {"max_steps": 40}, Answers(), None, "advice", ()),
    "gap": (ByStep(lambda call: min(0.3 + 0.1 * call, 0.8), 0.3), EVALUATED, Answers(), None, "warning", ()),
    "length_limit": (some, {"max_completion_length": 6}, Answers(ends=False), None, "critical", ()),
    "repetition": (some, {"max_completion_length": 16}, Answers(length=lambda s: 16, same=True), None, "warning", ()),
    "entropy_collapse": (some, {"skip_zero_advantage": False, "learning_rate": 0.0}, Answers(),
                         AtStep(5, scaled_head(3000.0)), "warning", ("gradient_spikes",)),
    "entropy_rise": (some, {"skip_zero_advantage": False, "learning_rate": 0.0}, Answers(),
                     AtStep(5, scaled_head(1e-2), scaled_head(10.0)), "warning", ("gradient_spikes",)),
    "length_hacking": (ByStep(lambda call: min(0.3 + 0.05 * call, 0.8), 0.3),
                       {**EVALUATED, "max_completion_length": 64}, GROWING, None, "warning", ("gap",)),
    "tiny_denominators": (tiny, {"learning_rate": 1e-4}, Answers(), None, "warning", ()),
    "coefficient_spikes": (one_of_sixteen, {"normalization": "max_rl", "num_generations": 16, **WIDE}, Answers(), None,
                           "warning",
                           ("tiny_denominators", "mostly_dead")),
    "gradient_spikes": (Burst(), {"normalization": "mean", "max_steps": 20, "learning_rate": 1e-6}, Answers(), None,
                        "warning", ("coefficient_spikes",)),
    "clip_share": (some, {"num_iterations": 8, "learning_rate": 0.3, "max_steps": 16, "max_grad_norm": 100.0},
                   Answers(), None, "warning", ("gradient_spikes", "entropy_rise", "entropy_collapse")),
    "divergence": (some, {"beta": 1e-4, "learning_rate": 0.0}, Answers(), AtStep(2, noise), "warning",
                   ("entropy_collapse", "gradient_spikes")),
    "slow_rewards": (slow, {}, Answers(), None, "advice", ()),
    "uncovered": (some, {**LOGGED, "interference_layers": ["*layers.0.self_attn*"]}, Answers(), None, "warning",
                  ("few_live_prompts", "unreliable")),
    "unreliable": (some, {**MANY, "learning_rate": 0.0, "max_steps": 12}, Answers(), None, "advice", ()),
    "dominated": (loud, {**MANY, "normalization": "mean", "learning_rate": 1e-5}, Answers(), None, "warning",
                  ("tiny_denominators", "coefficient_spikes", "unreliable")),
    "task_conflict": (opposed, {**MANY, "learning_rate": 0.0}, Answers(length=lambda step: 3, words=2), None, "warning",
                      ("contradicts_theory", "unreliable")),
    "not_finite": (some, {}, Answers(), AtStep(5, broken), "critical", ("divergence",)),
}  # fmt: skip
MADE = ("sampler_mismatch", "contradicts_theory")  # of logs below: no sampler, and no such model, is here


def sick_run(name, policy, folder):
    reward, options, answers, change, _, _ = SICK[name]
    held_out = {}
    if "eval_strategy" in options:
        dataset = prompts(8)
        texts = [[{"role": "user", "content": "held " + row[0]["content"]}] for row in dataset["prompt"]]
        held_out = {"eval_dataset": type(dataset).from_dict({"prompt": texts})}
    options = {"max_steps": 10, "interference_every": 0, **options}
    dataset = of_tasks() if name == "task_conflict" else prompts(256)
    trainer = build(policy, folder, reward, dataset, rollout_func=answers, **held_out, **options)
    if change is not None:
        trainer.add_callback(change)
    trainer.train()
    return trainer


def test_every_signature_has_a_sick_run():
    assert set(SICK) | set(MADE) == set(SIGNATURES) and len(SIGNATURES) >= 16


@pytest.mark.parametrize("name", SICK)
def test_a_sick_run_raises_its_signature_and_what_belongs_to_it(name, tiny_policy, tmp_path):
    sick_run(name, tiny_policy, tmp_path)
    found = {one.name: one for one in diagnose(read_run(tmp_path)).verdicts}
    level, beside = SICK[name][4:]
    assert name in found, found
    assert found[name].level == level and set(found) <= {name, *beside}, found
    assert 1 <= found[name].onset <= 24 and 0.5 < found[name].confidence <= 0.99
    assert found[name].evidence and found[name].remedy
    change = SICK[name][3]
    if change is not None:
        assert found[name].onset == change.step + 1


def made_up(folder, logs, metrics=(), **config):
    """A run's folder of such logs, and of interference files with such metrics."""
    (folder / "log_history.jsonl").write_text("\n".join(json.dumps(entry) for entry in logs))
    (folder / "run_config.json").write_text(json.dumps(config))
    for step, values in enumerate(metrics, 1):
        gradients = StepGradients(torch.eye(4), torch.tensor([0, 0, 1, 1]), torch.tensor([0.0, 1, 0, 1]), None, 2)
        write_step(folder, step, gradients, values, [1, 2])
    return read_run(folder)


def test_a_sampler_that_differs(tmp_path):
    logs = [{"step": s, "loss": 0.0, "sampling/sampling_logp_difference/mean": 0.2 * (s > 3)} for s in range(1, 9)]
    (found,) = diagnose(made_up(tmp_path, logs)).verdicts
    assert (found.name, found.onset, found.level) == ("sampler_mismatch", 4, "warning") and "0.200" in found.evidence


@pytest.mark.parametrize(("mean", "told"), [(-0.4, True), (0.0, False), (0.4, False)])
def test_the_theory_contradicted_or_not_to_be_told(mean, told, tmp_path):
    """Only an interval that excludes the predicted sign says so."""
    rng = np.random.default_rng(0)
    metrics = [
        {"curvature/directional_corr": float(mean + 0.2 * rng.normal()), "curvature/speedup_constant": 0.5}
        for _ in range(8)
    ]
    found = {one.name for one in diagnose(made_up(tmp_path, [{"step": 1, "loss": 0.0}], metrics)).verdicts}
    assert ("contradicts_theory" in found) == told


def test_on_repeated_problems_a_gap_is_advice(tiny_policy, tmp_path):
    reward, options, answers = SICK["gap"][:3]
    held = type(prompts(8)).from_dict({"prompt": [[{"role": "user", "content": f"held {i}"}] for i in range(8)]})
    reward = ByStep(reward.level, 0.3)
    build(tiny_policy, tmp_path, reward, prompts(8), rollout_func=answers, eval_dataset=held, max_steps=10,
          interference_every=0, **options).train()  # fmt: skip
    (found,) = [one for one in diagnose(read_run(tmp_path)).verdicts if one.name == "gap"]
    assert found.level == "advice" and "were seen" in found.evidence


# ---- healthy runs


@pytest.mark.nightly
def test_healthy_runs_raise_nothing_above_advice(tmp_path):
    """Twenty runs of the built-in policy on problems seen once, a live share of at least the stated floor; none of them
    was looked at when thresholds were set. None of 20 bounds the share of false alarms at 14 % (95 %)."""
    from transformers import AutoTokenizer

    from examples.tasks.correctness import Correctness
    from examples.tasks.questions import arithmetic_questions, build_dataset
    from trl_ext import CurvatureGRPOTrainer
    from trl_ext.report.signatures.groups import HEALTHY_LIVE
    from trl_ext.tasks.small_policy import small_policy

    settings = [
        {"normalization": "std", "learning_rate": 2e-4}, {"normalization": "mean", "learning_rate": 1e-4},
        {"normalization": "std", "optim": "sgd", "learning_rate": 0.01, "max_grad_norm": 0.0},
        {"normalization": "loo", "optim": "sgd", "learning_rate": 0.01, "beta": 0.02, "loss_type": "dr_grpo"},
    ]  # fmt: skip
    alarms, looked, alive = {}, 0, []
    for seed in range(5, 10):  # with those of 0 to 4 a threshold was moved
        policy = str(small_policy(seed, (1, 4)))
        train, held_out = (
            build_dataset(arithmetic_questions(n, held_out=held, levels=(1, 4), seed=seed), "chat")
            for n, held in ((700, False), (64, True))
        )
        for i, setting in enumerate(settings):
            folder = tmp_path / f"{seed}-{i}"
            options = {
                "output_dir": str(folder), "num_generations": 8, "per_device_train_batch_size": 128, "max_steps": 40,
                "max_completion_length": 4, "interference_every": 5, "interference_dim": 32, "logging_steps": 1,
                "eval_strategy": "steps", "eval_steps": 20, "eval_on_start": True, "per_device_eval_batch_size": 256,
                "num_generations_eval": 4, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
                "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "seed": seed, **setting,
            }  # fmt: skip
            trainer = CurvatureGRPOTrainer(
                model=policy, reward_funcs=[Correctness()], args=CurvatureGRPOConfig(**options), train_dataset=train,
                eval_dataset=held_out, processing_class=AutoTokenizer.from_pretrained(policy, padding_side="left"),
            )  # fmt: skip
            trainer.train()
            run = read_run(folder)
            dead = run.series("normalization/zero_variance_frac")[1]
            alive.append(1 - sum(dead) / len(dead))
            bad = [(one.name, one.level, one.evidence) for one in diagnose(run).verdicts if one.level != "advice"]
            if alive[-1] >= HEALTHY_LIVE:
                looked += 1
                if bad:
                    alarms[seed, i] = bad
    print(f"healthy: {looked} of 20 runs, live shares {min(alive):.2f} to {max(alive):.2f}; alarms: {alarms}")
    assert looked >= 18 and not alarms, alarms


# ---- evidence


def test_a_state_is_what_lasts():
    steps = list(range(1, 11))
    assert state(steps, [0, 0, 0, 9, 9, 9, 9, 9, 9, 9], lambda v: v > 1).onset == 4
    assert state(steps, [9, 9, 9, 9, 0, 0, 0, 0, 0, 0], lambda v: v > 1) is None  # it is over
    assert state(steps, [0, 0, 0, 0, 0, 0, 0, 0, 9, 9], lambda v: v > 1) is None  # twice is an accident
    assert state(steps, [0, 9, 9, 9, 9, 9, 9, 9, 9, 0], lambda v: v > 1).onset == 2  # one good number ends nothing
    found = state(steps, [0, 9, 9, 0, 9, 9, 9, 9, 9, 8], lambda v: v > 1)
    assert (found.onset, found.count, found.of, found.worst) == (2, 8, 9, 9) and found.confidence == pytest.approx(
        9 / 11
    )


def test_an_interval_by_hand():
    """t-quantiles of the tables: 4.303 at 2 degrees, 2.776 at 4, 2.042 at 30; 97.5 %."""
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5), rel=1e-3)
    assert student(3, 0.025) == pytest.approx(3.182, rel=8e-3)
    assert student(4, 0.025) == pytest.approx(2.776, rel=5e-3) and student(30, 0.025) == pytest.approx(2.042, rel=1e-3)
    assert interval([1.0, 3.0])[1:] == (-math.inf, math.inf)
    assert interval([1.0, 2.0, 4.0, 5.0], looks=8)[1] < interval([1.0, 2.0, 4.0, 5.0])[1]


def test_false_alarms_that_a_fresh_reader_found(tmp_path):
    """None of them says anything above advice: chance with few groups, flat noisy accuracies, another unit, an old
    accident, no gap but a late first evaluation."""
    rng = np.random.default_rng(0)

    def told(name, logs, **config):
        folder = tmp_path / name
        folder.mkdir()
        found = diagnose(
            made_up(folder, [{"step": i + 1, "loss": 0.0, **entry} for i, entry in enumerate(logs)], **config)
        )
        return {one.name: one.level for one in found.verdicts}

    one_prompt = {"generation_batch_size": 8, "num_generations": 8}
    for seed in range(20):
        dead = np.random.default_rng(seed).random(200) < 0.7
        entries = [
            {"normalization/all_wrong_frac": float(d), "normalization/zero_variance_frac": float(d)} for d in dead
        ]
        assert "all_wrong" not in told(f"few{seed}", entries, **one_prompt)
        flat = [
            {"eval_accuracy": a, "step": i}
            for i, a in enumerate(np.random.default_rng(seed).binomial(64, 0.5, 20) / 64)
        ]
        assert "fell" not in told(f"flat{seed}", [{}] * 3 + flat)
        unit = [{"eval_reward": 50 + v, "reward": 50 + v} for v in rng.normal(size=40)]
        assert not {"fell", "gap"} & set(told(f"unit{seed}", unit))
    always = [{"normalization/all_wrong_frac": 1.0}] * 60
    assert told("always", always, **one_prompt) == {"all_wrong": "critical"}
    hundred = [{"normalization/advantage_max": 60.0, "reward": float(v)} for v in rng.normal(50, 5, 40)]
    assert told("hundred", hundred).keys() <= {"no_progress"}
    old = [
        {"normalization/advantage_max": 12.0 if i == 1 else 2.0, "normalization/scale_mean": 0.4} for i in range(200)
    ]
    assert told("old", old) == {}
    nan = [{"reward": math.nan if i == 3 else 0.5 + i / 300} for i in range(200)]
    assert told("nan", nan) == {"not_finite": "warning"}
    learned = [min(1.0, 0.3 + 0.005 * step) for step in range(1, 201)]
    late = [{"reward": v, **({"eval_reward": v} if step % 50 == 0 else {})} for step, v in enumerate(learned, 1)]
    assert not {"gap"} & set(told("late", late))


def test_what_a_fresh_reader_missed(tmp_path):
    """TRL's own runs, and rewards below 0."""
    (tmp_path / "trl").mkdir()
    logs = [
        {"step": s, "loss": 0.0, "frac_reward_zero_std": 1.0, "reward": 0.0, "grad_norm": 0.0} for s in range(1, 40)
    ]
    (found,) = [one for one in diagnose(made_up(tmp_path / "trl", logs)).verdicts if one.name == "mostly_dead"]
    assert found.level == "critical"
    (tmp_path / "negative").mkdir()
    values = [*np.linspace(-5, -1, 30), *np.linspace(-1, -6, 20)]
    noisy = np.array(values) + 0.1 * np.random.default_rng(0).normal(size=50)
    logs = [{"step": s, "loss": 0.0, "reward": float(v)} for s, v in enumerate(noisy, 1)]
    found = {one.name: one.level for one in diagnose(made_up(tmp_path / "negative", logs)).verdicts}
    assert found == {"fell": "critical"}


def test_an_alert_that_fails_keeps_the_watch(tiny_policy, tmp_path, monkeypatch, caplog):
    import wandb

    monkeypatch.setattr(wandb, "run", type("Run", (), {"alert": lambda self, **_: 1 / 0, "url": None})())
    reward = SICK["all_wrong"][0]
    trainer = build(tiny_policy, tmp_path, reward, rollout_func=Answers(), stop_on="critical", max_steps=12,
                    interference_every=0, **WIDE)  # fmt: skip
    watch = next(one for one in trainer.callback_handler.callbacks if isinstance(one, Watch))
    watch.run = replace(watch.run, report_to=("wandb",))
    with caplog.at_level("WARNING"):
        trainer.train()
    assert trainer.state.global_step == 6 and "don't go to wandb: ZeroDivisionError" in caplog.text


def test_a_signature_that_fails_leaves_the_others(tmp_path, monkeypatch):
    run = made_up(tmp_path, [{"step": s, "loss": 0.0, "kl": 5.0} for s in range(1, 6)])
    monkeypatch.setattr(Run, "last", lambda *_: 1 / 0)
    monkeypatch.setitem(SIGNATURES, "all_wrong", SIGNATURES["all_wrong"].__class__("x", lambda run: run.last("reward")))
    found = diagnose(run)
    assert "ZeroDivisionError" in found.unknown["all_wrong"] and [one.name for one in found.verdicts] == ["divergence"]


# ---- the command


@pytest.fixture(scope="module")
def folders(tiny_policy, tmp_path_factory):
    made = {}
    for name in ("all_wrong", "no_progress"):
        made[name] = tmp_path_factory.mktemp(name)
        sick_run(name, tiny_policy, made[name])
    return made


def check(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["trl_ext", "check", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("trl_ext", run_name="__main__")
    return stopped.value.code


def test_the_command(folders, tmp_path, monkeypatch, capsys):
    file = tmp_path / "verdicts.json"
    assert check(monkeypatch, folders["all_wrong"], "--json", file) == 1
    printed = capsys.readouterr().out
    assert "CRITICAL: Every answer is wrong, since step 1" in printed and "-> Too hard" in printed
    assert "Can't be told:" in printed and "use_vllm=False" in printed
    ((told,),) = (one["verdicts"] for one in json.loads(file.read_text()).values())
    assert told["name"] == "all_wrong" and told["onset"] == 1
    assert check(monkeypatch, folders["no_progress"]) == 0
    assert check(monkeypatch, folders["no_progress"], folders["all_wrong"]) == 1
    capsys.readouterr()
    assert check(monkeypatch, tmp_path / "nowhere") == 2
    assert "no such folder" in capsys.readouterr().err


# ---- while it goes


def test_it_is_said_once_and_logged(tiny_policy, tmp_path, caplog):
    with caplog.at_level("WARNING"):
        trainer = sick_run("all_wrong", tiny_policy, tmp_path)
    said = [record.message for record in caplog.records if "Every answer is wrong" in record.message]
    assert len(said) == 1 and "since step 1" in said[0] and "num_generations" in said[0]
    counts = [entry["verdicts/critical"] for entry in trainer.state.log_history if "verdicts/critical" in entry]
    assert counts == [1.0] * len(counts) and len(counts) == 4 and trainer.state.global_step == 10


def test_it_stops_where_that_is_asked_for(tiny_policy, tmp_path, caplog):
    options = {"stop_on": "critical", "max_steps": 10, "interference_every": 0, **WIDE}
    options |= {"save_strategy": "steps", "save_steps": 100}
    reward = SICK["all_wrong"][0]
    with caplog.at_level("WARNING"):
        trainer = build(tiny_policy, tmp_path, reward, rollout_func=Answers(), **options)
        trainer.train()
    assert trainer.state.global_step == 6 and (tmp_path / "checkpoint-6").is_dir()
    assert any("stops at step 6" in record.message for record in caplog.records)
    healthy = build(tiny_policy, tmp_path / "other", some, rollout_func=Answers(), **options)
    healthy.train()
    assert healthy.state.global_step == 10


def test_a_watch_that_fails_is_said_once(tiny_policy, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("trl_ext.report.watch.diagnose", lambda run: 1 / 0)
    with caplog.at_level("WARNING"):
        trainer = build(tiny_policy, tmp_path, some, max_steps=4, stop_on="critical")
        trainer.train()
    said = [record.message for record in caplog.records if "isn't watched" in record.message]
    assert len(said) == 1 and "ZeroDivisionError" in said[0] and trainer.state.global_step == 4


def test_a_long_log_is_looked_at_less_often(monkeypatch):
    looked = []

    class Never(Watch):
        def __init__(self):
            self._seen = 0

        def log(self, metrics): ...

    monkeypatch.setattr(
        "trl_ext.report.watch.diagnose", lambda run: looked.append(len(run.logs)) or type("D", (), {"verdicts": []})
    )
    watch = Never()
    watch._said, watch.run = set(), type("R", (), {"output_dir": "", "num_generations": 4, "generation_batch_size": 8})
    history = []
    for step in range(2000):
        history.append({"step": step})
        watch._look(type("S", (), {"log_history": history}))
    assert looked[:5] == [1, 2, 3, 4, 5] and len(looked) < 300
    for length in (1, 7, 60, 61, 1999):  # a run that is resumed there sees what the other saw last
        assert looked_at(length) == max(look for look in looked if look <= length)


def test_a_wrong_level(tmp_path):
    with pytest.raises(ValueError, match="stop_on='advice' must be 'critical', 'warning' or None"):
        CurvatureGRPOConfig(output_dir=str(tmp_path), stop_on="advice")


def test_two_processes_stop_together(tiny_policy, tmp_path):
    """Also where one of them can't look."""
    from test_two_processes import start_worker

    started = start_worker(2, tiny_policy, tmp_path / "run", dead=1.0, stop_on="critical", max_steps=16,
                           interference_every=0, blind=1)  # fmt: skip
    assert started.finish() == [0, 0], started.text()[-3000:]
    logs = [torch.load(tmp_path / "run" / f"result.{rank}.pt")["logs"] for rank in range(2)]
    steps = [max(entry["step"] for entry in log) for log in logs]
    assert "stops at step 12" in started.text() and "Every answer is right" in started.text()
    assert steps == [12, 12]
