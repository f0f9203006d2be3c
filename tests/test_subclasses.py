"""A subclass's own methods count: each that TRL lets one override changes its result, here as in TRL's trainer.

Each case is the same subclass of ``GRPOTrainer`` and of ``CurvatureGRPOTrainer``, on the same rollouts; its gradients
must be the same, and not those without it.
"""

import pytest
import torch
from test_trainer_equality import run
from trl import GRPOConfig, GRPOTrainer

from trl_ext import CurvatureGRPOConfig, CurvatureGRPOTrainer
from trl_ext.rewards.reward_checks import checked_reward

PLAIN = {
    "loss_type": "dapo", "beta": 0.0, "num_iterations": 1, "accumulation": (2, 2), "lora": False, "rewards": "one",
    "aggregation": "sum_then_normalize", "scale_rewards": "group", "evaluation": False, "fused_loss": True,
    "skip_zero_advantage": True,
}  # fmt: skip


def log_probs(base):
    class Own(base):
        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            logps, *rest = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            return 2 * logps, *rest

    return Own


def rewards(base):
    class Own(base):
        def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
            found = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
            return (found - 0.3).square()

    return Own


def advantages(base):
    class Own(base):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            output["advantages"] = -2 * output["advantages"]
            return output

    return Own


def generation(base):
    class Own(base):
        def _generate_single_turn(self, *args, **kwargs):
            ids, logprobs = super()._generate_single_turn(*args, **kwargs)
            return [row[:5] for row in ids], logprobs

    return Own


def inputs(base):
    class Own(base):
        def _prepare_inputs(self, generation_batch):
            batch = super()._prepare_inputs(generation_batch)
            return {**batch, "advantages": batch["advantages"] + 0.5}

    return Own


def inner_loss(base):
    class Own(base):
        def _compute_loss(self, model, inputs):
            return 3 * super()._compute_loss(model, inputs)

    return Own


def outer_loss(base):
    class Own(base):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return 3 * super().compute_loss(model, inputs, *args, **kwargs)

    return Own


def step(base):
    class Own(base):
        def training_step(self, model, inputs, num_items_in_batch=None):
            return super().training_step(
                model, {**inputs, "advantages": 2 * inputs["advantages"]} if "advantages" in inputs else inputs,
                num_items_in_batch,
            )  # fmt: skip

    return Own


def entropy_mask(base):
    class Own(base):
        def get_high_entropy_mask(self, entropies, mask, threshold):
            kept = super().get_high_entropy_mask(entropies, mask, threshold)
            kept[:, 0] = False
            return kept

    return Own


CASES = [log_probs, rewards, advantages, generation, inputs, inner_loss, outer_loss, entropy_mask]
SETTINGS = {"on policy": {}, "KL, twice": {"beta": 0.05, "num_iterations": 2}}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("own", CASES)
def test_a_subclass_is_heard(own, setting, tiny_policy, tmp_path):
    setting = {**PLAIN, **SETTINGS[setting]}
    extra = {"max_grad_norm": 0.0, **({"top_entropy_quantile": 0.5} if own is entropy_mask else {})}

    def gradients(base, config, name):
        return run(base, config, tiny_policy, tmp_path / name, setting, **extra)[1].gradients

    ours = gradients(own(CurvatureGRPOTrainer), CurvatureGRPOConfig, "ours")
    theirs = gradients(own(GRPOTrainer), GRPOConfig, "theirs")
    plain = gradients(GRPOTrainer, GRPOConfig, "plain")
    for mine, its in zip(ours, theirs, strict=True):
        for name, gradient in its.items():
            torch.testing.assert_close(mine[name], gradient, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
    differences = [
        (its[name] - was[name]).norm() / was[name].norm()
        for its, was in zip(theirs, plain, strict=True)
        for name in was
    ]
    assert max(differences) > 0.05, "the subclass changes nothing: the test shows nothing"


class Counting:
    """An environment that owns its reward."""

    def __init__(self, reward):
        self.reward = reward

    def get_reward(self):
        return self.reward


def test_a_reward_of_environments_is_called_with_them_alone():
    """As TRL's own ``get_reward`` of several environments may be: without completions, None for others' rollouts."""

    def get_reward(environments, **kwargs):
        return [one.get_reward() if isinstance(one, Counting) else None for one in environments]

    checked = checked_reward(get_reward, "Counting")
    assert checked(environments=[Counting(1.0), object(), Counting(0.5)]) == [1.0, None, 0.5]
    with pytest.raises(ValueError, match=r"'Counting' returned inf for row 1: rewards must be finite"):
        checked(environments=[Counting(1.0), Counting(float("inf"))])
    with pytest.raises(ValueError, match=r"'Counting' returned 1 rewards for 2 completions"):
        checked(environments=[Counting(1.0)], completions=["a", "b"])
