"""A check before the run looks at stored columns alone, runs no code of the user's and draws no random number; what TRL
trains is trained."""

import logging

import numpy as np
import pytest
import torch
from datasets import Dataset
from test_fused_trainer import digits
from test_trainer_equality import prompts
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
from trl import GRPOConfig, GRPOTrainer

from trl_ext import CurvatureGRPOConfig, CurvatureGRPOTrainer, run_checks

COMMON = {
    "num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 6, "max_steps": 3,
    "learning_rate": 0.05, "optim": "sgd", "bf16": False, "save_strategy": "no", "gradient_checkpointing": False,
    "report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1, "seed": 3,
}  # fmt: skip


def trained(ours, policy, folder, dataset, reward=digits, model=None, **options):
    trainer_class, config_class = (CurvatureGRPOTrainer, CurvatureGRPOConfig) if ours else (GRPOTrainer, GRPOConfig)
    arguments = {"environment_factory": options.pop("environment_factory")} if "environment_factory" in options else {}
    torch.manual_seed(0)
    trainer = trainer_class(
        model=model or str(policy), reward_funcs=reward, train_dataset=dataset,
        args=config_class(output_dir=str(folder), **{**COMMON, **options}),
        processing_class=AutoTokenizer.from_pretrained(policy, padding_side="left"), **arguments,
    )  # fmt: skip
    trainer.train()
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


def question(text):
    return [{"role": "user", "content": text}]


class Calls:
    """Transforms, and how often they were called."""

    def __init__(self):
        self.count = 0

    def makes_the_column(self, rows):
        self.count += 1
        return {"prompt": [question(text) for text in rows["q"]]}

    def reads_another_column(self, rows):
        self.count += 1
        return {"prompt": [question(text + hint) for text, hint in zip(rows["q"], rows["hint"], strict=True)]}

    def draws_at_random(self, rows):
        self.count += 1
        return {"prompt": [question(text + "?" * int(torch.randint(0, 5, ()))) for text in rows["q"]]}


@pytest.mark.parametrize("name", ["makes_the_column", "reads_another_column", "draws_at_random"])
def test_prompts_made_on_the_fly(name, tiny_policy, tmp_path):
    texts = [f"{i} + {i} =" for i in range(24)]
    results, counts = [], []
    for ours in (False, True):
        calls = Calls()
        stored = Dataset.from_dict({"q": texts, "hint": ["!"] * 24, "prompt": [question(t) for t in texts]})
        stored = stored.remove_columns("prompt") if name == "makes_the_column" else stored
        dataset = stored.with_transform(getattr(calls, name))
        results.append(trained(ours, tiny_policy, tmp_path / str(ours), dataset))
        counts.append(calls.count)
    for theirs, mine in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    assert counts[0] == counts[1] > 0


def test_no_random_number_is_drawn_before_the_run(tiny_policy, tmp_path):
    """Building our trainer leaves every generator where TRL's leaves it."""
    states = []
    for ours in (False, True):
        trainer_class, config_class = (CurvatureGRPOTrainer, CurvatureGRPOConfig) if ours else (GRPOTrainer, GRPOConfig)
        torch.manual_seed(0)
        trainer_class(
            model=str(tiny_policy), reward_funcs=digits, train_dataset=prompts(32),
            args=config_class(output_dir=str(tmp_path), **COMMON),
            processing_class=AutoTokenizer.from_pretrained(tiny_policy, padding_side="left"),
        )  # fmt: skip
        states.append((torch.get_rng_state(), np.random.get_state()[1]))
    assert torch.equal(states[0][0], states[1][0]) and (states[0][1] == states[1][1]).all()


def test_a_bounded_number_of_rows_is_read(monkeypatch):
    read = []
    monkeypatch.setattr(run_checks, "_check_prompt", lambda prompt, what: read.append(what))
    many = Dataset.from_dict({"prompt": [f"{i}" for i in range(3000)]})
    run_checks._check_prompts(many, "train_dataset", True)
    assert len(read) == run_checks.MOST_ROWS == 1000
    assert (
        len(list(run_checks._stored_prompts(many))) == 1000
        and len(list(run_checks._stored_prompts(many, None))) == 3000
    )


class Counter:
    """Owns the data: its ``reset`` gives the question."""

    def reset(self, **kwargs):
        return "What is 1 + 1?"

    def add(self, step: int) -> int:
        """
        Adds to the counter.

        Args:
            step: What to add.

        Returns:
            The new count.
        """
        return step


class Scored(Counter):
    def get_reward(self) -> float:
        return 1.0


def test_an_environment_owns_the_data():
    """A dataset without prompts, as TRL's own tests of several environments have it."""
    dataset = Dataset.from_dict({"environment": ["counter", "scored"] * 8})
    config = CurvatureGRPOConfig("unused", report_to="none", use_cpu=True, bf16=False)
    factories = {"counter": Counter, "scored": Scored}
    run_checks.check_before_model(config, (dataset,), {"environment_factory": factories})
    with pytest.raises(ValueError, match="has no column 'prompt'"):
        run_checks.check_before_model(config, (dataset,), {})


class Iterable:
    """Can be iterated, and has no length."""

    def __init__(self, values):
        self.values = values

    def __iter__(self):
        return iter(self.values)


@pytest.mark.parametrize("kind", [map, "generator", "values", "tuple", "array", "tensor", "iterable"])
def test_rewards_of_any_kind_that_trl_takes(kind, tiny_policy, tmp_path):
    def reward(completions, **kwargs):
        values = digits(completions)
        return {
            map: lambda: map(float, values), "generator": lambda: (value for value in values),
            "values": lambda: dict(enumerate(values)).values(), "tuple": lambda: tuple(values),
            "array": lambda: np.array(values), "tensor": lambda: torch.tensor(values),
            "iterable": lambda: Iterable(values),
        }[kind]()  # fmt: skip

    expected = trained(False, tiny_policy, tmp_path / "trl", prompts(32), reward)
    found = trained(True, tiny_policy, tmp_path / "ours", prompts(32), reward)
    for theirs, mine in zip(expected, found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


def test_what_an_iterator_raises_is_the_reward_functions(tiny_policy, tmp_path):
    def reward(completions, **kwargs):
        yield from [1.0, 0.0]
        raise KeyError("answer")

    with pytest.raises(RuntimeError, match="reward function 'reward' raised KeyError: 'answer'"):
        trained(True, tiny_policy, tmp_path, prompts(32), reward)


@pytest.mark.parametrize("name", ["interference_every", "interference_dim", "tokens_per_micro_batch"])
def test_whole_numbers_of_any_kind(name, tmp_path):
    config = CurvatureGRPOConfig(str(tmp_path), **{name: np.int64(64)})
    assert getattr(config, name) == 64 and type(getattr(config, name)) is int
    for wrong in (True, 1.5, -1, np.float64(3)):
        with pytest.raises(ValueError, match=f"{name}=.* must be a whole number"):
            CurvatureGRPOConfig(str(tmp_path), **{name: wrong})


def test_a_long_prompt_of_a_batch_is_named(tiny_policy, tmp_path, caplog):
    """A transform makes it, so that nobody could know before; rotary positions go on, as TRL lets them."""
    texts = ["1 + 1 ="] * 8
    dataset = Dataset.from_dict({"q": texts}).with_transform(
        lambda rows: {"prompt": [question(t * 200) for t in rows["q"]]}
    )
    with caplog.at_level(logging.WARNING, logger="trl_ext"):
        trained(True, tiny_policy, tmp_path, dataset, max_steps=1)
    said = [record.message for record in caplog.records if "of this batch has" in record.message]
    assert len(said) == 1 and "1 + 1 =1 + 1 =" in said[0] and "no room for an answer" in said[0]


def test_a_prompt_beyond_a_table_of_positions_is_refused(tiny_policy, tmp_path):
    """GPT-2's positions are rows of a table: the model would fail in the middle of the run."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy, padding_side="left")
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes))
    with pytest.raises(
        ValueError, match=r"The prompt of row 1 of train_dataset has \d+ tokens, and the model's context"
    ):
        trained(True, tiny_policy, tmp_path, Dataset.from_dict({"prompt": ["1", "1 + 1 = " * 40] * 4}), model=model)


def test_an_empty_text_is_trained_on_beside_others(tiny_policy, tmp_path, caplog):
    def reward(completions, **kwargs):
        return [len(completion) % 3 / 2 for completion in completions]

    dataset = Dataset.from_dict({"prompt": ["1 + 1 =", "", "2 + 2 =", "3"] * 8})
    options = {"shuffle_dataset": False}  # a batch of empty texts alone fails, as with TRL
    expected = trained(False, tiny_policy, tmp_path / "trl", dataset, reward, **options)
    with caplog.at_level(logging.WARNING, logger="trl_ext"):
        found = trained(True, tiny_policy, tmp_path / "ours", dataset, reward, **options)
    for theirs, mine in zip(expected, found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    assert len([one for one in caplog.records if "is an empty text" in one.message]) == 1


def test_a_reward_beyond_float32_is_named(tiny_policy, tmp_path):
    with pytest.raises(ValueError, match=r"reward function '<lambda>' returned 1e\+39 for row 0"):
        trained(True, tiny_policy, tmp_path, prompts(32), lambda completions, **kwargs: [1e39] * len(completions))
