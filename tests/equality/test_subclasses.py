"""A subclass's own methods count: each that TRL lets one override changes its result, here as in TRL's trainer.

Each case is the same subclass of ``GRPOTrainer`` and of ``CurvatureGRPOTrainer``, on the same rollouts; its gradients
must be the same, and not those without it.
"""

import pytest
import torch
from harness import EVALUATED, NEWEST, PLAIN, train
from trl import GRPOTrainer

from trl_ext import CurvatureGRPOTrainer
from trl_ext.advantages.reward_checks import checked_reward

TWO = {**PLAIN, "loss_type": "dapo", "gradient_accumulation_steps": 2, "steps_per_generation": 2}


def of_result(name, change):
    """A case: a subclass whose method ``name`` returns ``change`` of what the method of its base returned."""

    def case(base):
        def method(self, *arguments, **named):
            return change(getattr(base, name)(self, *arguments, **named))

        return type("Own", (base,), {name: method})

    case.__name__ = name
    return case


def of_batch(change):
    """The same of a scored batch, in which ``change`` replaces some columns."""
    return of_result("_generate_and_score_completions", lambda out: {**out, **change(out)})


def of_static(name, change):
    """The same of a static method, whose first argument are the advantages."""

    def case(base):
        def method(advantages, *arguments, **named):
            return change(getattr(base, name)(advantages, *arguments, **named), advantages)

        return type("Own", (base,), {name: staticmethod(method)})

    case.__name__ = name
    return case


TRLS_KEYS = {
    *("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "num_items_in_batch"),
    *("old_per_token_logps", "ref_per_token_logps"),
}


def first(change):
    """Of a tuple's first element."""
    return lambda found: (change(found[0]), *found[1:])


def without_the_first_token(kept):
    kept[:, 0] = False
    return kept


def two_tokens_masked(found):
    """Two tokens of each completion aren't the model's."""
    prompt_ids, completion_ids, _, *rest = found
    mask = [[int(i not in (1, 2)) for i in range(len(row))] for row in completion_ids]
    return prompt_ids, completion_ids, mask, *rest


log_probs = of_result("_get_per_token_logps_and_entropies", first(lambda logps: 2 * logps))
rewards = of_result("_calculate_rewards", lambda found: (found - 0.3).square())
advantages = of_batch(lambda out: {"advantages": -2 * out["advantages"]})
token_advantages = of_batch(
    lambda out: {"advantages": -2 * out["advantages"][:, None].expand_as(out["completion_ids"])}
)
batch_mask = of_batch(lambda out: {"completion_mask": out["completion_mask"] * (out["completion_mask"].cumsum(1) <= 3)})
trls_keys = of_result(
    "_generate_and_score_completions",
    lambda out: {name: 2 * out[name] if name == "advantages" else out[name] for name in out if name in TRLS_KEYS},
)
generation = of_result("_generate_single_turn", first(lambda ids: [row[:5] for row in ids]))
inputs = of_result("_prepare_inputs", lambda batch: {**batch, "advantages": batch["advantages"] + 0.5})
inner_loss = of_result("_compute_loss", lambda loss: 3 * loss)
outer_loss = of_result("compute_loss", lambda loss: 3 * loss)
entropy_mask = of_result("get_high_entropy_mask", without_the_first_token)
prompt_tokens = of_result("_tokenize_prompts", first(lambda ids: [row[2:] for row in ids]))
shorter = of_result("_generate", lambda found: (found[0], [row[:3] for row in found[1]], *found[2:]))
masked = of_result("_generate", two_tokens_masked)
predicted = of_result("prediction_step", first(lambda loss: loss + 1))
off_policy_mask = of_static("get_off_policy_mask", lambda kept, advantages: torch.where(advantages > 0, kept, 0.0))
gamma_weights = of_static("get_gamma_weights", lambda found, advantages: torch.where(advantages > 0, 2.0, 0.5) * found)


def step(base):
    class Own(base):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = super().training_step(model, inputs, num_items_in_batch)
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(1.5)  # of this micro-batch, and of those before it
            return loss

    return Own


def in_the_loss(base):
    """The inner loss gets other advantages."""

    class Own(base):
        def _compute_loss(self, model, inputs):
            return super()._compute_loss(model, {**inputs, "advantages": -inputs["advantages"]})

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


def logged(base):
    class Own(base):
        def log(self, logs, *args, **kwargs):
            logs["of_mine"] = 7.0
            self._metrics["train"]["reward"].append(100.0)
            super().log(logs, *args, **kwargs)

    return Own


# of old and reference log-probs, which are made before the rewards
OF_LOG_PROBS = [log_probs, prompt_tokens, shorter, masked, other_mask]
OF_THE_LOSS = [inner_loss, outer_loss, entropy_mask, step, off_policy_mask, gamma_weights]
OF_ADVANTAGES = [advantages, token_advantages, trls_keys, batch_mask, in_the_loss]
CASES = [rewards, generation, inputs, *OF_ADVANTAGES, *OF_LOG_PROBS, *OF_THE_LOSS]
IN_THE_LOG = [predicted, logged]
SETTINGS = {
    "on policy": {},
    "KL, twice": {"beta": 0.05, "num_iterations": 2},
    "at once": {"beta": 0.05, "num_iterations": 2, "skip_zero_advantage": False},
}
OPTIONS = {
    entropy_mask: {"top_entropy_quantile": 0.5},
    off_policy_mask: {"off_policy_mask_threshold": 0.5},
    gamma_weights: {"loss_type": "vespo"},
}

# Methods of GRPOTrainer, or that ours overrides, which no case has: why what a subclass makes of them counts anyway
WITHOUT_A_CASE = {
    **{"__init__": "ours calls it with what it was given", "end": "after the last gradient"},
    **dict.fromkeys(["_get_tool_suffix_ids", "_tool_call_loop"], "inside _generate, which is called whole"),
    **dict.fromkeys(["_save_checkpoint", "_load_optimizer_and_scheduler"], "files, no gradient"),
    **dict.fromkeys(["evaluate", "predict"], "no gradient; TRL's, with our head there"),
    **dict.fromkeys(["_log_completion_extra", "_log_metric"], "what reward functions log; not called by us"),
    **dict.fromkeys(
        ["get_train_dataloader", "_get_train_sampler", "_get_eval_sampler", "get_eval_dataloader"],
        "which prompts come, and when; not called by us",
    ),
    "_set_signature_columns_if_needed": "the dataset's columns, before the trainer's path; not called by us",
    "create_accelerator_and_postprocess": "before the first gradient; ours calls it, and compiles layers alone",
    "train": "which checkpoint it goes on from; the training is TRL's",
}


@NEWEST
def test_every_method_has_a_case_or_a_reason():
    """A new one of TRL's, or of ours, wants one."""

    def methods(owner):
        return {name for name, value in vars(owner).items() if callable(getattr(owner, name)) and name != "__doc__"}

    ours = {name for name in methods(CurvatureGRPOTrainer) if hasattr(GRPOTrainer, name)} - {"__init__"}
    cases = set().union(*(methods(own(GRPOTrainer)) for own in [*CASES, *IN_THE_LOG])) - {"__init__"}
    assert cases & set(WITHOUT_A_CASE) == set()
    assert methods(GRPOTrainer) | ours == cases | set(WITHOUT_A_CASE)


@pytest.mark.parametrize("own", IN_THE_LOG)
def test_a_subclasss_method_counts_in_the_log(own, tiny_policy, tmp_path):
    names = ("loss", "reward", "grad_norm", "of_mine", "eval_loss", "eval_reward")

    def logs(trainer_class, name):
        trainer = train(tiny_policy, tmp_path / name, trainer_class=trainer_class, **{**TWO, **EVALUATED})
        return [{name: log[name] for name in names if name in log} for log in trainer.recorder.logs]

    ours, theirs = logs(own(CurvatureGRPOTrainer), "ours"), logs(own(GRPOTrainer), "theirs")
    plain = logs(GRPOTrainer, "plain")
    assert ours == [pytest.approx(its, rel=1e-4, abs=1e-6) for its in theirs]
    pairs = [(name, log[name], was.get(name)) for log, was in zip(theirs, plain, strict=True) for name in log]
    changed = {name for name, value, before in pairs if before is None or value != pytest.approx(before, rel=0.05)}
    assert changed == {predicted: {"eval_loss"}, logged: {"reward", "of_mine"}}[own]


def gradients(trainer_class, policy, folder, options):
    return train(policy, folder, trainer_class=trainer_class, max_grad_norm=0.0, **options).recorder.gradients


@pytest.fixture(scope="module")
def without_it(tiny_policy, tmp_path_factory):
    """TRL's gradients without any subclass, made once for each setting."""
    made = {}

    def get(options):
        if str(options) not in made:
            made[str(options)] = gradients(GRPOTrainer, tiny_policy, tmp_path_factory.mktemp("run"), options)
        return made[str(options)]

    return get


@pytest.mark.parametrize(
    ("own", "setting"),
    [(own, setting) for own in CASES for setting in SETTINGS if setting != "at once" or own in OF_LOG_PROBS],
)
def test_a_subclasss_method_counts(own, setting, tiny_policy, tmp_path, without_it):
    options = {**TWO, **SETTINGS[setting], **OPTIONS.get(own, {})}
    ours = gradients(own(CurvatureGRPOTrainer), tiny_policy, tmp_path / "ours", options)
    theirs = gradients(own(GRPOTrainer), tiny_policy, tmp_path / "theirs", options)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-6)
    differences = [
        (its[name] - was[name]).norm() / was[name].norm()
        for its, was in zip(theirs, without_it(options), strict=True)
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
