"""The arms against plain references on what a run generated, and the choice of prompts against numbers by hand."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import beta as beta_distribution
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.dead_groups.arms import ARMS, ChoosingTrainer, CountingTrainer, OracleTrainer
from examples.dead_groups.costs import at_budget, budget, cost, reached
from examples.dead_groups.run import TRAINING
from examples.dead_groups.selection import (
    FLOOR,
    KEPT,
    PRIOR_GROUPS,
    PRIOR_KEPT,
    PassRates,
    beta_from_moments,
    mixed_chance,
    task_numbers,
    weighted_draw,
)
from examples.dead_groups.settings import Rewards, pass_rates
from examples.tasks.questions import Question, build_dataset
from trl_ext import CurvatureGRPOConfig

G, STEPS = 4, 4
QUESTIONS = [Question(f"What is {a} + 1?", str(a + 1), a, "odd" if a % 2 else "even") for a in range(1, 25)]


class Lucky(Rewards):
    """Rewards by the answer's first letter, so that an untrained policy has groups of every kind."""

    def is_right(self, gold, text):
        return len(text) % 2 == int(gold) % 2 and int(gold) % 5 != 0


KINDS = {"choose": ChoosingTrainer, "oracle": OracleTrainer}


@pytest.fixture(scope="module")
def runs(tiny_policy, tmp_path_factory):
    """Trains each arm; returns the trainers with the groups, rewards and batches that they had."""
    found = {}
    for arm, options in ARMS.items():
        kind: Any = KINDS.get(arm, CountingTrainer)

        class Stored(kind):
            def _calculate_rewards(self, inputs, prompts, completions, ids):
                self.rounds.append((inputs, ids))
                rewards = super()._calculate_rewards(inputs, prompts, completions, ids)
                self.rewards.append(rewards[:, 0].clone())
                return rewards

            def _generate_and_score_completions(self, inputs):
                batch = super()._generate_and_score_completions(inputs)
                self.batches.append({name: value for name, value in batch.items() if torch.is_tensor(value)})
                return batch

        folder = tmp_path_factory.mktemp(arm)
        sizes = {"num_generations": G, "per_device_train_batch_size": 8 * G, "max_steps": STEPS}
        args = CurvatureGRPOConfig(
            output_dir=str(folder), **{**TRAINING, **sizes}, **options, learning_rate=1e-3, seed=3
        )
        tokenizer = AutoTokenizer.from_pretrained(tiny_policy, padding_side="left")
        scorer = Lucky(0.0, 0)
        trainer = Stored(
            model=str(tiny_policy),
            reward_funcs=[scorer],
            args=args,
            train_dataset=build_dataset(QUESTIONS, "chat"),
            processing_class=tokenizer,
        )
        trainer.scorer, trainer.rounds, trainer.rewards, trainer.batches = scorer, [], [], []
        if isinstance(trainer, ChoosingTrainer):
            trainer.begin(3)
        if isinstance(trainer, OracleTrainer):
            trainer.questions = QUESTIONS
        trainer.train()
        found[arm] = trainer
    return found


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_is_its_plain_reference(arm, runs):
    """Advantages, and the tokens that it counts, from the rewards that it got."""
    trainer = runs[arm]
    groups = [one.view(-1, G).double() for one in trainer.rewards]
    generated = sum(len(answer) for _, ids in trainer.rounds for answer in ids)
    live = sum(int((one.amax(1) > one.amin(1)).sum()) for one in groups)
    assert (trainer.generated, trainer.live_groups) == (generated, live)
    assert 0 < live < sum(map(len, groups)) == trainer.groups
    if arm == "resample":
        assert len(trainer.rounds) > STEPS
        return  # its batches: tests/equality/test_resampling.py
    trained = 0
    for rewards, batch in zip(groups, trainer.batches, strict=True):
        centred = rewards - rewards.mean(1, keepdim=True)
        expected = rewards if arm == "none" else centred / (rewards.std(1, keepdim=True) + 1e-4)
        torch.testing.assert_close(batch["advantages"].double(), expected.flatten(), atol=1e-6, rtol=1e-5)
        trained += int(batch["completion_mask"][expected.flatten() != 0].sum())
    assert trainer.trained == trained > 0


def plain_posterior(rows, rewards, tasks, step):
    """The Beta distributions of all rows, from the list of groups by steps alone."""
    whole = [PRIOR_GROUPS * one for one in (1.0, 0.5, 1 / 3)]
    by_task: dict[int, list[float]] = {}
    seen: dict[int, tuple[float, float]] = {}
    for when, (chosen, groups) in enumerate(zip(rows, rewards, strict=True)):
        for row, right in zip(chosen, groups, strict=True):
            a, b = seen.get(row, (0.0, 0.0))
            # an answer's weight falls by KEPT with every step
            seen[row] = a + right * KEPT ** (step - when), b + (G - right) * KEPT ** (step - when)
            last = max(w for w, c in enumerate(rows) if any(tasks[r] == tasks[row] for r in c))
            weight = PRIOR_KEPT ** (last - when)
            sums = by_task.setdefault(tasks[row], [0.0, 0.0, 0.0])
            for place, value in enumerate((1.0, right / G, right * (right - 1) / (G * (G - 1)))):
                sums[place] += weight * value
    for sums in by_task.values():
        whole = [a + b for a, b in zip(whole, sums, strict=True)]
    mean, square = whole[1] / whole[0], whole[2] / whole[0]
    found = []
    for row, task in enumerate(tasks):
        n, m, s = by_task.get(task, (0.0, 0.0, 0.0))
        prior = beta_from_moments((m + PRIOR_GROUPS * mean) / (n + PRIOR_GROUPS), (s + PRIOR_GROUPS * square) / (n + 4))
        a, b = seen.get(row, (0.0, 0.0))
        found.append((prior[0] + a, prior[1] + b))
    return np.array(found)


def test_choosing_knows_what_its_rounds_showed(runs):
    trainer = runs["choose"]
    place = {one.question: row for row, one in enumerate(QUESTIONS)}
    rows = [[place[one["question"]] for one in inputs[::G]] for inputs, _ in trainer.rounds]
    rewards = [one.view(-1, G).sum(1).tolist() for one in trainer.rewards]
    assert all(len(set(one)) == len(one) == 8 for one in rows)
    tasks = task_numbers([one.task for one in QUESTIONS])
    expected = plain_posterior(rows, rewards, tasks, STEPS)
    got = np.stack(trainer.known.distributions(np.arange(len(QUESTIONS)), STEPS), 1)
    np.testing.assert_allclose(got, expected, rtol=1e-9)


def test_the_exact_pass_rates_are_those_of_sampling(tiny_policy):
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tiny_policy).eval(),
        AutoTokenizer.from_pretrained(tiny_policy),
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # an untrained policy's rates are all alike
    questions = [Question(one.question, text, 1) for one in QUESTIONS[:2] for text in ("1", "2")]
    prompts = tokenizer(
        [f"<user>{one.question}<assistant>" for one in questions[::2]], return_tensors="pt", padding=True
    )
    n = 4000
    out = model.generate(**prompts, do_sample=True, top_k=0, max_new_tokens=3, num_return_sequences=n)
    answers = [text.strip() for text in tokenizer.batch_decode(out[:, prompts["input_ids"].shape[1] :])]
    ended = [text.removesuffix("<pad>").split("<eos>")[0].strip() if "<eos>" in text else None for text in answers]
    rates = pass_rates(model, tokenizer, questions).tolist()
    for place, (one, rate) in enumerate(zip(questions, rates, strict=True)):
        found = sum(text == one.answer for text in ended[place // 2 * n : (place // 2 + 1) * n]) / n
        assert abs(found - rate) < 5 * math.sqrt(rate * (1 - rate) / n) + 5 / n


def test_moments_of_a_beta_distribution():
    for a, b in ((0.5, 0.5), (2.0, 3.0), (1.0, 9.0)):
        mean, variance = beta_distribution.stats(a, b)
        np.testing.assert_allclose(beta_from_moments(float(mean), float(variance + mean**2)), (a, b), rtol=1e-6)
    for mean, square in ((0.0, 0.0), (1.0, 1.0), (0.3, 0.09), (0.3, 0.3), (0.3, 0.05)):  # limits, and noise beyond
        assert all(0 < one < 60 for one in beta_from_moments(mean, square))


def test_the_chance_of_a_mixed_group():
    np.testing.assert_allclose(mixed_chance(np.array([0.0, 1.0, 0.5, 0.1]), 8), [0, 0, 1 - 2 / 256, 1 - 0.9**8 - 1e-8])
    known = PassRates([0], 8)
    a, b = np.array([0.3, 4.0]), np.array([2.0, 1.0])
    drawn = np.random.default_rng(0).beta(a[:, None], b[:, None], (2, 200_000))
    np.testing.assert_allclose(known._expected(a, b), mixed_chance(drawn, 8).mean(1), atol=4e-3)


def test_a_weighted_draw_takes_the_first_in_proportion():
    random, weights = np.random.default_rng(0), np.array([1.0, 2.0, 0.05, 5.0])
    draws = [weighted_draw(weights, 2, random) for _ in range(20_000)]
    assert all(len(set(one.tolist())) == 2 for one in draws)
    ones = np.bincount([weighted_draw(weights, 1, random)[0] for _ in range(20_000)], minlength=4) / 20_000
    np.testing.assert_allclose(ones, weights / weights.sum(), atol=0.015)


def test_hard_prompts_are_not_starved():
    """Of prompts that were never solved in many groups, the floor leaves a twentieth of the weight of a mixed one."""
    known = PassRates([0] * 200, 8)
    for step in range(20):
        for row in range(100):
            known.observe(row, 4, step)
            known.observe(100 + row, 0, step)
    random = np.random.default_rng(0)
    drawn = np.concatenate([known.choose(16, 20, random)[0] for _ in range(300)])
    share = (drawn >= 100).mean()
    assert FLOOR / (1 + FLOOR) * 0.8 < share < 0.1


def test_costs_by_hand():
    rows = [
        {"generated": 0, "trained": 0, "accuracy": 0.2},
        {"generated": 20_000, "trained": 2_000, "accuracy": 0.6},
        {"generated": 40_000, "trained": 4_000, "accuracy": 0.8},
    ]
    assert cost(rows[1], 3) == 62_000 and budget("wide", 3) == 48 * 128 * 2 * 3.5
    assert at_budget(rows, "wide", 3) == pytest.approx(0.2 + 0.4 * 43_008 / 62_000)
    assert reached("wide", rows[2]) and not reached("wide", rows[0])
