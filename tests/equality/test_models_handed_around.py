"""A model is its user's: between runs nothing of ours hangs on it, and it goes from one trainer to the next."""

import copy
import io
import pickle

import pytest
import torch
from datasets import Dataset
from harness import EVALUATED, OPTIONS, build, digits, parameters, tokenizer_of, train
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import GRPOTrainer, SFTConfig, SFTTrainer

from trl_ext import read_interference

LOGGED = {"interference_every": 1, "learning_rate": 0.05}


def load(policy, **options):
    return AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32, **options)


def trained(kind, model, policy, folder, **options):
    """The trainer after some steps of ``ours``, ``trl`` or ``sft`` on this model."""
    if kind != "sft":
        options = {**LOGGED, "model": model, **options}
        return train(policy, folder, **options, **({"trainer_class": GRPOTrainer} if kind == "trl" else {}))
    names = ("max_steps", "optim", "bf16", "save_strategy", "report_to", "disable_tqdm", "use_cpu", "seed")
    args = SFTConfig(str(folder), **{name: OPTIONS[name] for name in names}, learning_rate=0.05, max_length=32)
    data = Dataset.from_dict({"text": ["What is 1 + 1? 2", "What is 2 + 2? 4"] * 8})
    torch.manual_seed(0)
    trainer = SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer_of(policy))
    trainer.train()
    return trainer


def assert_trains_as_a_copy(model, policy, folder, kind="ours"):
    """As a freshly loaded model with the same weights does; the trainer of ``model``."""
    fresh = load(policy)
    fresh.load_state_dict(model.state_dict())
    trainer = trained(kind, model, policy, folder / "model")
    trained(kind, fresh, policy, folder / "fresh")
    same(parameters(model), parameters(fresh))
    assert model.config._attn_implementation == fresh.config._attn_implementation
    return trainer


def same(found, expected):
    torch.testing.assert_close(dict(found), dict(expected), rtol=0, atol=1e-6)


def marks(model):
    """What hangs on a model beside its own: forwards of instances, hooks, attributes of ours."""
    found = []
    for name, module in model.named_modules():
        if "forward" in vars(module):
            found.append(f"{name}.forward")
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
        found += [f"{name}{hook}" for hook in hooks if getattr(module, hook)]
        found += [f"{name}.{key}" for key in vars(module) if "curvature" in key]
    return found


@pytest.mark.parametrize("options", [{}, {"share_prompts": False}, {"beta": 0.05}, {"bf16": True}], ids=str)
def test_nothing_hangs_on_a_model_between_runs(options, tiny_policy, tmp_path):
    """While the trainer lives: it can be saved, pickled, copied and asked, before training and after."""
    model = load(tiny_policy)
    trainer = build(tiny_policy, tmp_path, model=model, **{**LOGGED, **EVALUATED, "eval_steps": 100, **options})
    ids = torch.tensor([[5, 6, 7]])
    for act in (lambda: None, trainer.evaluate, trainer.train, trainer.evaluate):
        act()
        if not options.get("bf16"):  # accelerate leaves its own wrapper of the forward, for TRL's trainer too
            assert marks(model) == []
        torch.save(model, io.BytesIO())
        twin = copy.deepcopy(model)
        again = pickle.loads(pickle.dumps(model))
        with torch.no_grad():
            logits = model(input_ids=ids).logits
            for other in (twin, again):
                torch.testing.assert_close(other(input_ids=ids).logits, logits, rtol=1e-2, atol=1e-2)
            next(twin.parameters()).mul_(2.0)  # a copy's forward is the copy's, not the original's
            assert not torch.allclose(twin(input_ids=ids).logits, logits, atol=1e-2)
        model.generate(ids, max_new_tokens=2, do_sample=False)
    assert len(read_interference(tmp_path)) == 2


def test_a_model_goes_from_trainer_to_trainer(tiny_policy, tmp_path):
    """Ours, ours, TRL's, ours, SFT in turn on one model: each step is what it is on a fresh copy of the weights."""
    model, alive = load(tiny_policy), []
    for number, kind in enumerate(("ours", "ours", "trl", "ours", "sft", "ours")):
        alive.append(assert_trains_as_a_copy(model, tiny_policy, tmp_path / str(number), kind))


@pytest.mark.parametrize("first", ["ours", "trl"])
def test_a_deep_copy_of_a_trained_model_trains_its_own_weights(first, tiny_policy, tmp_path):
    """TRL's patch of the original would run the original's weights in the copy."""
    trainer = trained(first, load(tiny_policy), tiny_policy, tmp_path / "first")
    twin = copy.deepcopy(trainer.model)
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with torch.no_grad():  # what the original does from here on is of no account
        for parameter in trainer.model.parameters():
            parameter.zero_()
    same(twin.state_dict(), weights)
    assert_trains_as_a_copy(twin, tiny_policy, tmp_path)


def test_rounds_of_adapters_on_one_model(tiny_policy, tmp_path):
    """An adapter is trained and merged, and the next one after it."""
    model = load(tiny_policy)
    for number in range(3):
        before = parameters(model)
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        trainer = trained("ours", model, tiny_policy, tmp_path / str(number), peft_config=config)
        model = trainer.model.merge_and_unload()
        assert marks(model) == []
        changed = [name for name, values in parameters(model).items() if not torch.equal(values, before[name])]
        assert changed and all("q_proj" in name or "v_proj" in name for name in changed)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("share", [True, False], ids=["shared", "unshared"])
def test_a_head_that_peft_saves_is_followed(tied, share, tiny_policy, tmp_path):
    """``modules_to_save=["lm_head"]`` trains a copy of the head: it is the one that is used, and sketched."""
    model = load(tiny_policy, tie_word_embeddings=tied)
    adapter = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, modules_to_save=["lm_head"])
    options = {"interference_dim": 0, "share_prompts": share}
    trained("ours", model, tiny_policy, tmp_path, peft_config=adapter, **options)
    records = read_interference(tmp_path)
    assert len(records) == 2
    for record in records:
        assert record.metrics["interference/coverage"] > 0.99
        assert record.metrics["interference/sketch_check"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_run_that_breaks_off_leaves_the_model_as_it_was(error, tiny_policy, tmp_path):
    """In the middle of a step whose interference is logged, in a generation: the next trainer goes on with it."""

    def broken(completions, trainer_state, **kwargs):
        calls.append(trainer_state.global_step)
        if len(calls) > 1:
            raise error("stop")
        return digits(completions)

    calls, model = [], load(tiny_policy)
    options = {**LOGGED, "gradient_accumulation_steps": 4, "steps_per_generation": 2}
    trainer = build(tiny_policy, tmp_path, broken, model=model, **options)
    with pytest.raises((error, RuntimeError)):
        trainer.train()
    assert marks(model) == []
    pickle.dumps(model)
    assert_trains_as_a_copy(model, tiny_policy, tmp_path)


def other_trainer(model, policy, folder, **options):
    return build(policy, folder, model=model, **EVALUATED | {"eval_steps": 100} | options)


@pytest.mark.parametrize("case", ["built", "evaluates", "built and evaluates"])
def test_another_trainer_on_the_model_while_one_trains(case, tiny_policy, tmp_path):
    """In a callback: the training that goes on ends as without it."""

    class Other(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            with torch.random.fork_rng(devices=[]):
                other = earlier if case == "evaluates" else other_trainer(model, tiny_policy, tmp_path / "inner")
                if "evaluates" in case:
                    other.evaluate()

    model, alone = load(tiny_policy), load(tiny_policy)
    earlier = other_trainer(model, tiny_policy, tmp_path / "earlier")
    outer = other_trainer(model, tiny_policy, tmp_path / "outer")
    outer.add_callback(Other())
    for trainer in (outer, other_trainer(alone, tiny_policy, tmp_path / "alone")):
        torch.manual_seed(0)
        trainer.train()
    assert outer.state.global_step == 2 and marks(model) == []
    assert model.config._attn_implementation == alone.config._attn_implementation
    model(input_ids=torch.tensor([[5, 6]]))
    if case == "evaluates":  # a trainer that is built seeds everything, TRL's too
        same(parameters(model), parameters(alone))


def test_a_snapshot_taken_while_training_is_a_whole_model(tiny_policy, tmp_path):
    """The best model so far, kept by a callback: saved, asked, and trained on."""

    class Best(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            self.model = copy.deepcopy(model)

    best, model = Best(), load(tiny_policy)
    train(tiny_policy, tmp_path / "first", model=model, callbacks=[best])
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(best.model(input_ids=ids).logits, model(input_ids=ids).logits)
    torch.save(best.model, io.BytesIO())
    pickle.dumps(best.model)
    assert_trains_as_a_copy(best.model, tiny_policy, tmp_path)


@pytest.mark.parametrize("by", ["compute_loss", "training_step"])
@pytest.mark.parametrize("options", [{}, {"beta": 0.04, "num_iterations": 2}], ids=["plain", "old and reference"])
def test_a_backward_of_ones_own_outside_of_training(by, options, tiny_policy, tmp_path):
    """With checkpointing, which computes layers again in the backward; with old and reference log-probs."""
    trainer = other_trainer(load(tiny_policy), tiny_policy, tmp_path, **options)
    trainer.args.gradient_checkpointing = True
    trainer.train()
    trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    trainer.model.train()
    trainer.model.zero_grad()
    before = marks(trainer.model)  # checkpointing's own hook
    batch = next(iter(trainer.get_train_dataloader()))
    if by == "training_step":
        trainer.training_step(trainer.model, batch, None)
    else:
        trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch)).backward()
    assert any(p.grad is not None and p.grad.isfinite().all() for p in trainer.model.parameters())
    assert marks(trainer.model) == before and len(before) == 1
