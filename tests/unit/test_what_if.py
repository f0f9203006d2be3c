"""What other normalisations would have done, and where noise comes from: by hand, by brute force, and in a simulation
whose true gradients are known.

Shapes: P prompts, K possible answers, G drawn ones, D parameters.
"""

import itertools
from dataclasses import astuple, replace

import pytest
import torch
from kernel_inputs import make_scores

from grpo_kernels import normalize_rewards
from grpo_kernels.interference.noise import (
    GradientNoise,
    advised_generations,
    answer_pair_moments,
    gradient_noise,
    raw_gradient_factors,
)
from grpo_kernels.interference.what_if import StepScores, candidates, what_if

METHODS = ("none", "mean", "std", "max_rl", "power", "batch_std", "global", "rank", "median_mad")


class Toy:
    """A log-linear policy: logits of prompt p's answers are features_PKD @ theta, theta = 0; rewards 0 or 1, by a
    direction that all prompts have in common."""

    def __init__(self, prompts=6, answers=8, size=12, seed=0, common=0.3):
        generator = torch.Generator().manual_seed(seed)
        own = torch.randn(prompts, answers, size, generator=generator, dtype=torch.float64)
        self.features_PKD = own + common * torch.randn(1, answers, size, generator=generator, dtype=torch.float64)
        liked_PK = self.features_PKD[:, :, 0] + torch.randn(prompts, answers, generator=generator, dtype=torch.float64)
        self.reward_PK = (liked_PK > 0.5).double()
        self.reward_PK[:, 0], self.reward_PK[:, 1] = 0.0, 1.0  # none is all equal in truth
        self.score_PKD = self.features_PKD - self.features_PKD.mean(1, keepdim=True)
        self.gradient_PD = (self.reward_PK[:, :, None] * self.score_PKD).mean(1)  # of each prompt's mean reward

    def draw(self, generator, count, chosen_P=None):
        """Scores (P, G, D) and rewards (P, G) of ``count`` answers to each prompt, or to each of the chosen ones."""
        prompt_P1 = (torch.arange(len(self.reward_PK)) if chosen_P is None else chosen_P)[:, None]
        answer_PG = torch.randint(self.reward_PK.shape[1], (len(prompt_P1), count), generator=generator)
        return self.score_PKD[prompt_P1, answer_PG], self.reward_PK[prompt_P1, answer_PG]


@pytest.fixture
def drawn():
    score, reward = Toy().draw(torch.Generator().manual_seed(4), 6)
    reward[2] = 1.0  # an all-equal one
    return score, reward


def prompt_steps(score_PGD, reward_PG, method):
    """(P, D) each prompt's part of a step with ``method``."""
    advantage_PG = normalize_rewards(reward_PG, method, **({"alpha": 0.5} if method == "power" else {}))
    return -(0.25 * advantage_PG[:, :, None] * score_PGD).sum(1)


def step_of(score_PGD, reward_PG, method):
    return prompt_steps(score_PGD, reward_PG, method).sum(0)


def cosine(a, b) -> float:
    return float(a @ b / a.norm() / b.norm())


@pytest.mark.parametrize("trained", ["std", "mean", "rank"])
def test_cosine_factor_and_share_are_of_the_methods_own_steps(drawn, trained):
    score, reward = drawn
    table = what_if(make_scores(score, reward, trained), candidates(METHODS))
    now = step_of(score, reward, trained)
    assert {"mean", "std", "max_rl", "power", "batch_std", "rank"} <= set(table.rows)
    steps = {}
    for name, row in table.rows.items():
        steps[name] = its = step_of(score, reward, name)
        assert row.cos == pytest.approx(cosine(its, now), abs=1e-10)
        assert row.factor == pytest.approx(float(its @ now / now.square().sum()), rel=1e-8)
        of_prompts = prompt_steps(score, reward, name)
        torch.testing.assert_close(row.share_P, of_prompts @ its / its.square().sum(), rtol=1e-8, atol=1e-10)
        assert float(row.share_P.sum()) == pytest.approx(1)
        raw = ((reward - reward.mean(1, keepdim=True))[:, :, None] * score).sum(1) / (reward.shape[1] - 1)
        of_others = raw.sum(0) - raw  # a step gains on other prompts than its own
        assert row.progress == pytest.approx(-float((of_prompts * of_others).sum()), rel=1e-8, abs=1e-10)
        assert row.square == pytest.approx(float(its.square().sum()), rel=1e-8)
    assert table.rows[trained].cos == pytest.approx(1) and table.rows[trained].factor == pytest.approx(1)
    for i, a in enumerate(steps.values()):
        for j, b in enumerate(steps.values()):
            assert float(table.mutual_MM[i, j]) == pytest.approx(cosine(a, b), abs=1e-10)
            assert float(table.factor_MM[i, j]) == pytest.approx(float(a.norm() / b.norm()), rel=1e-8)


def test_the_share_of_a_task_is_that_of_its_prompts(drawn):
    tasks = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 1]], dtype=torch.bool)
    table = what_if(make_scores(*drawn), candidates(["std", "mean", "global"]), tasks_TP=tasks)
    for row in table.rows.values():
        expected = torch.stack([row.share_P[of].sum() for of in tasks])
        torch.testing.assert_close(row.task_share_T, expected)
        assert float(row.task_share_T.sum()) == pytest.approx(1.0)
    assert len(what_if(make_scores(*drawn), candidates(["std"])).rows["std"].task_share_T) == 0


def test_sequences_may_come_in_any_order(drawn):
    scores = make_scores(*drawn)
    shuffled = make_scores(*drawn, chosen=torch.randperm(36, generator=torch.Generator().manual_seed(3)))
    expected, found = (what_if(one, candidates(METHODS)).rows for one in (scores, shuffled))
    assert found.keys() == expected.keys()
    for name, row in found.items():
        assert (row.cos, row.factor) == pytest.approx((expected[name].cos, expected[name].factor))
        torch.testing.assert_close(row.share_P, expected[name].share_P)
    assert astuple(gradient_noise(shuffled)) == pytest.approx(astuple(gradient_noise(scores)))


def test_methods_that_need_missing_scores_are_left_out(drawn):
    """Trained with ``none``, wrong answers have no score: ``mean`` and noise need them, ``none`` doesn't."""
    score, reward = drawn
    table = what_if(make_scores(score, reward, "none"), candidates(["none", "mean", "global"]))
    assert set(table.rows) == {"none"}
    wrong = int((reward == 0).sum())
    assert table.absent["mean"] == f"{wrong} sequences without a score would have an advantage"
    reason = f"{wrong} sequences without a score have a reward that differs from their group's mean"
    assert raw_gradient_factors(make_scores(score, reward, "none"))[1] == reason
    assert gradient_noise(make_scores(score, reward, "none")) is None

    table = what_if(make_scores(score, reward, "std"), candidates(["none", "std"]))
    assert table.absent == {"none": "6 sequences without a score would have an advantage"}  # the all-equal group's


def test_dead_sequences_scored_in_an_extra_pass_admit_every_method(drawn):
    """Sequences of advantage 0, scored at advantage 1: each method's step is the one that training with it makes."""
    score, reward = drawn
    scores = make_scores(score, reward, "std")
    dead = scores.advantage_B == 0
    coefficient = torch.where(dead, -0.25, scores.coefficient_B)
    contribution = coefficient[:, None] * score.flatten(0, 1)
    score_advantage = torch.where(dead, 1.0, scores.score_advantage_B)
    whole = {
        "gram_BB": contribution @ contribution.T,
        "coefficient_B": coefficient,
        "score_advantage_B": score_advantage,
    }
    table = what_if(replace(scores, **whole), candidates(METHODS))
    assert set(table.rows) == set(METHODS)
    now = step_of(score, reward, "std")
    for name in ("none", "global"):
        assert table.rows[name].cos == pytest.approx(cosine(step_of(score, reward, name), now), abs=1e-10)


def test_sequences_without_a_token_add_nothing(drawn):
    score, reward = drawn
    scores = make_scores(score, reward)
    cut = (scores.prompt_B == 0) & (scores.position_B == 0)
    gram_BB = scores.gram_BB.masked_fill(cut | cut[:, None], 0.0)
    masked = replace(scores, gram_BB=gram_BB, coefficient_B=scores.coefficient_B.masked_fill(cut, 0.0))
    row = what_if(masked, candidates(["mean"])).rows["mean"]
    score = score.clone()
    score[0, 0] = 0.0
    expected = cosine(step_of(score, reward, "mean"), step_of(score, reward, "std"))
    assert row.cos == pytest.approx(expected, abs=1e-10)


def test_what_cannot_be_computed_is_left_out_with_a_reason(drawn):
    score, reward = drawn
    part = make_scores(score, reward, chosen=torch.arange(36) % 5 > 0)
    assert raw_gradient_factors(part)[1] == "the step holds parts of groups" and gradient_noise(part) is None
    graded = what_if(make_scores(score, 2 * reward), candidates(["max_rl"]))
    assert "needs rewards in [0, 1]" in graded.absent["max_rl"]
    nothing = what_if(make_scores(score, torch.ones_like(reward)), candidates(["mean"]))
    assert nothing.absent == {"mean": "the step's gradient is 0"} and not nothing.rows


def test_a_function_as_normalisation(drawn):
    score, reward = drawn

    def best_only(rewards_PG, context):
        return torch.where(rewards_PG == rewards_PG.amax(1, keepdim=True), 1.0, 0.0) * (context["lengths"] > 0)

    chosen, context = candidates([best_only, "std"]), {"lengths": torch.ones_like(reward)}
    table = what_if(make_scores(score, reward), chosen, context=context)
    name = next(iter(table.absent))
    assert name.endswith("best_only") and "without a score" in table.absent[name]
    reward[2, 0] = 0.0
    table = what_if(make_scores(score, reward), chosen, context=context)
    assert len(table.rows) == 2 and 0 < table.rows[name].cos < 1


def test_an_unknown_normalisation_is_named():
    with pytest.raises(ValueError, match="Did you mean 'mean'"):
        candidates(["maen"])
    with pytest.raises(ValueError, match="alpha=3"):
        candidates(["power"], alpha=3)


# ---- noise


def all_scored(score, reward):
    """Of every sequence, whatever its reward."""
    ones = torch.ones(reward.numel(), dtype=torch.float64)
    flat, row, count = score.flatten(0, 1), torch.arange(reward.numel()), reward.shape[1]
    return StepScores(flat @ flat.T, ones, ones, ones, row // count, row % count, reward)


def test_pairs_of_pairs_by_loops(drawn):
    score, reward = drawn
    reward = reward + torch.arange(6.0) / 7
    found = answer_pair_moments(all_scored(score, reward))
    for p in range(3):
        pairs = itertools.combinations(range(6), 2)
        h = {(i, j): (reward[p, i] - reward[p, j]) * (score[p, i] - score[p, j]) / 2 for i, j in pairs}
        inner = {n: [] for n in (0, 1, 2)}
        for a in h:
            for b in h:
                inner[len({*a} & {*b})].append(float(h[a] @ h[b]))
        for n, values in zip((0, 1, 2), found, strict=True):
            assert float(values[p]) == pytest.approx(sum(inner[n]) / len(inner[n]), rel=1e-9)


def test_unscorable_answers_are_left_out(drawn):
    score, reward = drawn
    whole = answer_pair_moments(all_scored(score[:, :5], reward[:, :5]))
    reward = reward.clone()
    reward[:, 5] = torch.nan
    for one, other in zip(answer_pair_moments(all_scored(score, reward)), whole, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("count", [2, 3, 6])
def test_noise_predicts_the_variance_of_steps(count):
    """Prompts from a population of 200; the variance of a step's mean gradient, measured, at three sizes. From 2 or 3
    answers one number is taken for all sizes: right at its own."""
    toy, generator = Toy(prompts=200, answers=6, size=5, common=1.0), torch.Generator().manual_seed(1)
    mean_D = toy.gradient_PD.mean(0)

    def step(prompts, count):
        return toy.draw(generator, count, torch.randint(200, (prompts,), generator=generator))

    found = [gradient_noise(all_scored(*step(12, count))) for _ in range(600)]
    mean = GradientNoise(*(sum(values) / len(found) for values in zip(*map(astuple, found), strict=True)))
    for prompts, generations in ((12, 2), (6, 4), (3, 8)) if count == 6 else ((12, count),):
        squares = []
        for _ in range(2000):
            score, reward = step(prompts, generations)
            centred = reward - reward.mean(1, keepdim=True)
            gradient = (centred[:, :, None] * score).sum(1).mean(0) / (generations - 1)
            squares.append(float((gradient - mean_D).square().sum()))
        squares = torch.tensor(squares)
        predicted = torch.tensor([one.variance(prompts, generations, at=count) for one in found])
        error = float((squares.var() / len(squares) + predicted.var() / len(predicted)).sqrt())
        assert float(predicted.mean()) == pytest.approx(mean.variance(prompts, generations, at=count), rel=1e-4)
        assert abs(float(squares.mean() - predicted.mean())) < 3 * error < 0.2 * float(squares.mean())
    assert all(one.low <= one.high for one in found)


def test_advice_at_its_ends():
    assert advised_generations(9.0, 1.0, 100) == pytest.approx(4.0)
    assert advised_generations(1.0, 0.0, 64) == 64 and advised_generations(1.0, -1.0, 64) == 64
    assert advised_generations(0.0, 1.0, 64) == 2 and advised_generations(1e9, 1.0, 64) == 64
