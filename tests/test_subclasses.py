"""A subclass's own methods count: each that TRL lets one override changes its result, here as in TRL's trainer.

Each case is the same subclass of ``GRPOTrainer`` and of ``CurvatureGRPOTrainer``, on the same rollouts; its gradients
must be the same, and not those without it.
"""

import pytest
import torch
from test_trainer_equality import run
from trl import GRPOConfig, GRPOTrainer

from trl_ext import CurvatureGRPOConfig, CurvatureGRPOTrainer
from trl_ext.advantages.reward_checks import checked_reward

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
            loss = super().training_step(model, inputs, num_items_in_batch)
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(1.5)  # of this micro-batch, and of those before it
            return loss

    return Own


def entropy_mask(base):
    class Own(base):
        def get_high_entropy_mask(self, entropies, mask, threshold):
            kept = super().get_high_entropy_mask(entropies, mask, threshold)
            kept[:, 0] = False
            return kept

    return Own


def off_policy_mask(base):
    class Own(base):
        @staticmethod
        def get_off_policy_mask(advantages, *args, **kwargs):
            kept = base.get_off_policy_mask(advantages, *args, **kwargs)
            return torch.where(advantages > 0, kept, 0.0)

    return Own


def gamma_weights(base):
    class Own(base):
        @staticmethod
        def get_gamma_weights(advantages, *args, **kwargs):
            return torch.where(advantages > 0, 2.0, 0.5) * base.get_gamma_weights(advantages, *args, **kwargs)

    return Own


def prompt_tokens(base):
    class Own(base):
        def _tokenize_prompts(self, prompts):
            ids, *rest = super()._tokenize_prompts(prompts)
            return [row[2:] for row in ids], *rest

    return Own


def shorter(base):
    class Own(base):
        def _generate(self, prompts):
            prompt_ids, completion_ids, *rest = super()._generate(prompts)
            return prompt_ids, [row[:3] for row in completion_ids], *rest

    return Own


def masked(base):
    """Two tokens of each completion aren't the model's."""

    class Own(base):
        def _generate(self, prompts):
            prompt_ids, completion_ids, _, *rest = super()._generate(prompts)
            mask = [[int(i not in (1, 2)) for i in range(len(row))] for row in completion_ids]
            return prompt_ids, completion_ids, mask, *rest

    return Own


def other_mask(base):
    """A rollout's mask leaves out the second token; the subclass's, in place of it, the first."""

    def without(place, rows):
        return [[int(i != place) for i in range(len(row))] for row in rows]

    def rollout(prompts, trainer):
        prompt_ids, *fields = trainer._tokenize_prompts(prompts)
        completion_ids, _ = trainer._generate_single_turn(prompt_ids, *fields, trainer.num_generations)
        mask = without(1, completion_ids)
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None, "env_mask": mask}

    class Own(base):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.rollout_func = rollout

        def _generate(self, prompts):
            prompt_ids, completion_ids, _, *rest = super()._generate(prompts)
            return prompt_ids, completion_ids, without(0, completion_ids), *rest

    return Own


def predicted(base):
    class Own(base):
        def prediction_step(self, *args, **kwargs):
            loss, *rest = super().prediction_step(*args, **kwargs)
            return loss + 1, *rest

    return Own


def logged(base):
    class Own(base):
        def log(self, logs, *args, **kwargs):
            logs["of_mine"] = 7.0
            self._metrics["train"]["reward"].append(100.0)
            super().log(logs, *args, **kwargs)

    return Own


CASES = [
    log_probs, rewards, advantages, generation, inputs, inner_loss, outer_loss, entropy_mask, step, off_policy_mask,
    gamma_weights, prompt_tokens, shorter, masked, other_mask,
]  # fmt: skip
OF_LOG_PROBS = [
    log_probs,
    prompt_tokens,
    shorter,
    masked,
    other_mask,
]  # old and reference ones, made before the rewards
IN_THE_LOG = [predicted, logged]
SETTINGS = {
    "on policy": {},
    "KL, twice": {"beta": 0.05, "num_iterations": 2},
    "at once": {"beta": 0.05, "num_iterations": 2, "skip_zero_advantage": False},
}
OPTIONS = {
    entropy_mask: {"top_entropy_quantile": 0.5},
    off_policy_mask: {"off_policy_mask_threshold": 0.5},
}

# Methods of GRPOTrainer, or that ours overrides, which no case has: why what a subclass makes of them counts anyway
WITHOUT_A_CASE = {
    "__init__": "ours calls it with what it was given",
    "_set_signature_columns_if_needed": "the dataset's columns, before the trainer's path; not called by us",
    "get_train_dataloader": "which prompts come, and when; not called by us",
    "_get_train_sampler": "as above",
    "_get_eval_sampler": "as above",
    "get_eval_dataloader": "as above",
    "_log_completion_extra": "what reward functions log; not called by us",
    "_log_metric": "as above",
    "_get_tool_suffix_ids": "inside _generate, which is called whole",
    "_tool_call_loop": "as above",
    "_save_checkpoint": "files, no gradient",
    "_load_optimizer_and_scheduler": "as above",
    "train": "which checkpoint it goes on from; the training is TRL's",
    "evaluate": "no gradient; TRL's, with our head there",
    "predict": "as above",
    "end": "after the last gradient",
}


def test_every_method_has_a_case_or_a_reason():
    """A new one of TRL's, or of ours, wants one."""

    def methods(owner):
        return {name for name, value in vars(owner).items() if callable(getattr(owner, name)) and name != "__doc__"}

    ours = {name for name, method in vars(CurvatureGRPOTrainer).items() if getattr(method, "_is_ours", False)}
    cases = set().union(*(methods(own(GRPOTrainer)) for own in [*CASES, *IN_THE_LOG])) - {"__init__"}
    assert cases & set(WITHOUT_A_CASE) == set()
    assert methods(GRPOTrainer) | ours == cases | set(WITHOUT_A_CASE)


@pytest.mark.parametrize("own", IN_THE_LOG)
def test_a_subclass_is_heard_in_the_log(own, tiny_policy, tmp_path):
    names = ("loss", "reward", "grad_norm", "of_mine", "eval_loss", "eval_reward")

    def logs(base, config, name):
        logs = run(base, config, tiny_policy, tmp_path / name, {**PLAIN, "evaluation": True})[1].logs
        return [{name: log[name] for name in names if name in log} for log in logs]

    ours = logs(own(CurvatureGRPOTrainer), CurvatureGRPOConfig, "ours")
    theirs = logs(own(GRPOTrainer), GRPOConfig, "theirs")
    plain = logs(GRPOTrainer, GRPOConfig, "plain")
    assert ours == [pytest.approx(its, rel=1e-4, abs=1e-6) for its in theirs]
    changed = {
        name for its, was in zip(theirs, plain, strict=True) for name in its
        if name not in was or its[name] != pytest.approx(was[name], rel=0.05)
    }  # fmt: skip
    assert changed == {predicted: {"eval_loss"}, logged: {"reward", "of_mine"}}[own]


def gradients(base, config, policy, folder, setting, **extra):
    return run(base, config, policy, folder, setting, max_grad_norm=0.0, **extra)[1].gradients


@pytest.fixture(scope="module")
def without_it(tiny_policy, tmp_path_factory):
    """TRL's gradients without any subclass, made once for each setting."""
    made = {}

    def get(setting, extra):
        key = str((setting, extra))
        if key not in made:
            made[key] = gradients(
                GRPOTrainer, GRPOConfig, tiny_policy, tmp_path_factory.mktemp("run"), setting, **extra
            )
        return made[key]

    return get


@pytest.mark.parametrize(
    ("own", "setting"),
    [(own, setting) for own in CASES for setting in SETTINGS if setting != "at once" or own in OF_LOG_PROBS],
)
def test_a_subclass_is_heard(own, setting, tiny_policy, tmp_path, without_it):
    setting = {**PLAIN, **SETTINGS[setting], **({"loss_type": "vespo"} if own is gamma_weights else {})}
    extra = OPTIONS.get(own, {})
    ours = gradients(own(CurvatureGRPOTrainer), CurvatureGRPOConfig, tiny_policy, tmp_path / "ours", setting, **extra)
    theirs = gradients(own(GRPOTrainer), GRPOConfig, tiny_policy, tmp_path / "theirs", setting, **extra)
    for mine, its in zip(ours, theirs, strict=True):
        for name, gradient in its.items():
            torch.testing.assert_close(mine[name], gradient, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
    differences = [
        (its[name] - was[name]).norm() / was[name].norm()
        for its, was in zip(theirs, without_it(setting, extra), strict=True)
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
