"""What we lean on in TRL is looked for when a trainer is built, and what has changed is named."""

import pytest
import torch
from harness import build
from tiny_models import HEADS
from transformers.models.auto import AutoModelForCausalLM
from trl import GRPOTrainer
from trl.trainer import grpo_trainer

from trl_ext import CurvatureGRPOTrainer
from trl_ext.compat import TRL_HAS_HEAD, ChangedTRL, check_class, check_trainer
from trl_ext.head.settings import read_settings
from trl_ext.overrides import overridden
from trl_ext.schema import ALWAYS, check_keys


def test_a_method_with_other_arguments_is_named(monkeypatch):
    check_class()
    monkeypatch.setattr(GRPOTrainer, "_calculate_rewards", lambda self, rollouts, prompts: None)
    with pytest.raises(
        ChangedTRL, match=r"_calculate_rewards takes \(rollouts, prompts\), not \(inputs, prompts, comp"
    ):
        check_class()


def test_a_users_wrapper_around_a_method_of_trl_is_none_of_it(monkeypatch):
    original = GRPOTrainer._compute_loss
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", lambda self, *args, **kwargs: original(self, *args, **kwargs))
    check_class()


def test_a_method_that_is_gone_is_named(tiny_policy, tmp_path, monkeypatch):
    monkeypatch.delattr(GRPOTrainer, "_generate")
    with pytest.raises(ChangedTRL, match="GRPOTrainer has no _generate"):
        build(tiny_policy, tmp_path)


GONE = [
    (lambda trainer: trainer._logs.pop("advantages"), "_logs has no advantages"),
    (lambda trainer: delattr(trainer, "epsilon_high"), "no attribute epsilon_high"),  # read for each micro-batch
    (lambda trainer: delattr(trainer, "_buffered_inputs"), "no attribute _buffered_inputs"),
]


@pytest.mark.parametrize(("remove", "message"), GONE)
def test_attributes_and_keys_that_are_gone_are_named(remove, message, tiny_policy, tmp_path):
    trainer = build(tiny_policy, tmp_path)
    check_trainer(trainer)
    remove(trainer)
    with pytest.raises(ChangedTRL, match=message):
        check_trainer(trainer)


def test_a_batch_that_lacks_something_is_named():
    check_keys(dict.fromkeys(ALWAYS))
    with pytest.raises(ChangedTRL, match="makes has no completion_mask, advantages"):
        check_keys({name: None for name in ALWAYS if name not in ("completion_mask", "advantages")})


@pytest.mark.skipif(not TRL_HAS_HEAD, reason="TRL has no head of its own before 1.15")
@pytest.mark.parametrize("name", HEADS)
def test_the_heads_settings_are_those_that_trl_closes_over(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(HEADS[name])
    settings = read_settings(model, temperature=lambda: 0.7, cast_to_fp32=True)
    grpo_trainer.add_fused_lm_head(model, temperature=0.7, cast_lm_head_to_fp32=True)
    function = model.forward.__func__
    cells = (cell.cell_contents for cell in function.__closure__)
    trls = dict(zip(function.__code__.co_freevars, cells, strict=True))
    assert settings.temperature() == trls["temperature"] and settings.cast_to_fp32 == trls["cast_lm_head_to_fp32"]
    assert settings.logit_scale == pytest.approx(trls["logit_scale"], rel=1e-12)
    assert settings.softcap == trls["final_logit_softcapping"]
    assert trls["backbone_attr"] == "base_model"


def test_an_override_is_seen_and_named():
    own = type("Own", (CurvatureGRPOTrainer,), {"_compute_loss": lambda self, model, inputs: None})
    names = ("compute_loss", "_compute_loss")
    assert overridden(object.__new__(type("Ours", (CurvatureGRPOTrainer,), {})), CurvatureGRPOTrainer, *names) is None
    assert overridden(object.__new__(own), CurvatureGRPOTrainer, *names) == "Own overrides _compute_loss"
