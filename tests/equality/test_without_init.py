"""A trainer made without ``__init__``, as TRL's own tests make one: each method that we override is TRL's there."""

from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock

import pytest
import torch
import transformers
from harness import build
from torch.utils._pytree import tree_flatten
from trl import GRPOTrainer

from trl_ext import CurvatureGRPOTrainer
from trl_ext.compat import TRL_HAS_HEAD

# the methods that we override
OURS = {name for name, value in vars(CurvatureGRPOTrainer).items() if callable(value) and hasattr(GRPOTrainer, name)}


def bare(trainer_class, **attributes):
    """With these attributes alone, beside those that most methods of TRL read."""
    trainer = object.__new__(trainer_class)
    trainer.accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        is_main_process=True,
        num_processes=1,
        autocast=nullcontext,
        gather=lambda x: x,
        reduce=lambda x, reduction: x,
        end_training=MagicMock(),
    )
    trainer.args = SimpleNamespace(
        report_to=[], steps_per_generation=2, output_dir="here", hub_model_id=None, delta=None
    )
    trainer.model = SimpleNamespace(training=True)
    trainer.state = SimpleNamespace(global_step=2, num_input_tokens_seen=0)
    trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    trainer._step = 3
    trainer.use_liger_kernel = trainer._entropy_bonus_enabled = False  # TRL reads these four before 1.15
    trainer.model_kwarg_keys, trainer.temperature = (), 1.0
    for name, value in attributes.items():
        setattr(trainer, name, value)
    return trainer


def score(trainer_class, monkeypatch):
    nothing = dict.fromkeys(["environment_factories", "tools", "environments"])
    trainer = bare(trainer_class, **nothing, _generate=Mock(side_effect=KeyError("rollouts")))
    with pytest.raises(KeyError, match="rollouts"):  # the first that it needs
        trainer._generate_and_score_completions([{"prompt": "a"}])
    return trainer._generate.call_args.args


def model(input_ids, attention_mask, labels=None, fused_lm_head=False, use_cache=False):
    assert fused_lm_head or not TRL_HAS_HEAD
    if not fused_lm_head:
        return SimpleNamespace(logits=torch.nn.functional.one_hot(input_ids % 5, 16).float())
    return SimpleNamespace(log_probs=-(input_ids % 5 + 1.0), entropy=input_ids % 3 + 1.0, aux_loss=None)


def log_probs(trainer_class, monkeypatch):
    input_ids = torch.arange(12).view(3, 4)
    return bare(trainer_class)._get_per_token_logps_and_entropies(
        model, input_ids, torch.ones_like(input_ids), 2, batch_size=2, compute_entropy=True
    )


def inputs(trainer_class, monkeypatch):
    buffered = [{"advantages": torch.ones(2)}, {"advantages": torch.zeros(2)}]
    trainer = bare(trainer_class, num_iterations=2, _buffered_inputs=buffered)
    training = trainer._prepare_inputs([{"prompt": "a"}])
    trainer.model.training = False
    trainer._generate_and_score_completions = lambda rows: {"rows": rows}
    return training, trainer._prepare_inputs([{"prompt": "b"}])


def step(trainer_class, monkeypatch):
    monkeypatch.setattr(transformers.Trainer, "training_step", lambda self, model, inputs, number: torch.tensor(2.0))
    trainer = bare(trainer_class, _current_train_step_time=0.0, current_gradient_accumulation_steps=2)
    loss = trainer.training_step(trainer.model, {}, 1)
    return loss, trainer._step, len(trainer._metrics["train"]["step_time"])


BATCH = {
    "prompt_ids": torch.tensor([[1, 2], [3, 4]]),
    "prompt_mask": torch.ones(2, 2, dtype=torch.long),
    "completion_ids": torch.tensor([[5, 6, 7], [8, 9, 0]]),
    "completion_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    "advantages": torch.tensor([1.0, -0.5]),
    "num_items_in_batch": torch.tensor(5),
}
OFF = ("aux_loss_enabled", "use_vllm", "vllm_importance_sampling_correction", "use_adaptive_entropy")
LOSS = {
    **dict.fromkeys([*OFF, "_entropy_bonus_enabled"], False),
    **{"loss_type": "grpo", "importance_sampling_level": "token", "beta": 0.0, "epsilon_low": 0.2, "epsilon_high": 0.2},
    **{"top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "current_gradient_accumulation_steps": 2},
}


def inner_loss(trainer_class, monkeypatch):
    trainer = bare(trainer_class, **LOSS)
    return trainer._compute_loss(model, BATCH), dict(trainer._metrics["train"])


def outer_loss(trainer_class, monkeypatch):
    trainer = bare(trainer_class, **LOSS)
    with pytest.raises(ValueError, match="does not support returning outputs"):
        trainer.compute_loss(model, BATCH, return_outputs=True)
    return trainer.compute_loss(model, BATCH)


def checkpoint(trainer_class, monkeypatch):
    monkeypatch.setattr(transformers.Trainer, "_save_checkpoint", lambda self, model, trial: None)
    trainer = bare(trainer_class, create_model_card=MagicMock(), use_adaptive_entropy=False)
    trainer._save_checkpoint(None, None)
    return trainer.create_model_card.call_args.kwargs


def end(trainer_class, monkeypatch):
    trainer = bare(trainer_class)
    if hasattr(trainer, "end"):  # an older transformers has none
        trainer.end()
    else:
        trainer.accelerator.end_training()
    return trainer.accelerator.end_training.call_count


def of_transformers(name, *arguments, **named):
    """A case: what the method of transformers' Trainer gets."""

    def case(trainer_class, monkeypatch):
        monkeypatch.setattr(transformers.Trainer, name, lambda self, *args, **kwargs: (args, kwargs))
        return getattr(bare(trainer_class), name)(*arguments, **named)

    return case


def accelerator(trainer_class, monkeypatch):
    made = []
    monkeypatch.setattr(transformers.Trainer, "create_accelerator_and_postprocess", lambda self: made.append(self))
    trainer = bare(trainer_class)
    trainer.create_accelerator_and_postprocess()
    return len(made), hasattr(trainer.accelerator, "state")


CASES = {
    "create_accelerator_and_postprocess": accelerator,
    "train": of_transformers("train", "auto", trial=None),  # not looked for
    "evaluate": of_transformers("evaluate", "held out", metric_key_prefix="test"),
    "predict": of_transformers("predict", "held out", metric_key_prefix="test"),
    "_generate_and_score_completions": score,
    "_get_per_token_logps_and_entropies": log_probs,
    "_prepare_inputs": inputs,
    "training_step": step,
    "compute_loss": outer_loss,
    "_compute_loss": inner_loss,
    "_save_checkpoint": checkpoint,
    "end": end,
}


def test_every_method_of_ours_has_a_case():
    assert set(CASES) == (OURS | {"end"}) - {"__init__"}


@pytest.mark.parametrize("name", CASES)
def test_a_bare_trainer_is_trls(name, monkeypatch):
    ours, theirs = (tree_flatten(CASES[name](one, monkeypatch)) for one in (CurvatureGRPOTrainer, GRPOTrainer))
    assert ours[1] == theirs[1] and len(theirs[0]) > 0
    for mine, its in zip(ours[0], theirs[0], strict=True):
        assert torch.equal(mine, its) if isinstance(its, torch.Tensor) else mine == its


def test_a_mock_of_the_class_will_do():
    """TRL's tests call a method of the class with ``Mock(spec=GRPOTrainer)``."""
    trainer = Mock(spec=CurvatureGRPOTrainer)
    trainer.use_liger_kernel = False
    trainer._compute_loss.return_value = 3.0
    assert CurvatureGRPOTrainer.compute_loss(trainer, None, {}) == 3.0


def test_with_all_that_trls_init_makes_it_trains_as_trls(tiny_policy, tmp_path):
    def train(trainer_class, name):
        built = build(tiny_policy, tmp_path / name, trainer_class=GRPOTrainer, save_strategy="steps", save_steps=2)
        trainer = object.__new__(trainer_class)
        vars(trainer).update(vars(built))
        trainer.train()
        if hasattr(trainer, "end"):
            trainer.end()
        return built.recorder.gradients

    ours, theirs = train(CurvatureGRPOTrainer, "ours"), train(GRPOTrainer, "theirs")
    assert len(theirs) == 2 and any(gradient.any() for gradient in theirs[0].values())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
