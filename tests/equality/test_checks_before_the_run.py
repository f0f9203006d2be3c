"""A check before the run looks at stored columns alone, runs no code of the user's and draws no random number; what TRL
trains is trained."""

import logging

import numpy as np
import pytest
import torch
from datasets import Dataset
from harness import build, digits, messages, prompts, question, tokenizer_of, train
from transformers import GPT2Config, GPT2LMHeadModel
from trl import GRPOTrainer

from trl_ext import CurvatureGRPOConfig, CurvatureGRPOTrainer, run_checks


def assert_trains_as_trl(policy, folder, dataset, reward=digits, **options):
    theirs, ours = (
        train(policy, folder / one.__name__, reward, dataset, trainer_class=one, **options)
        for one in (GRPOTrainer, CurvatureGRPOTrainer)
    )
    for its, mine in zip(theirs.model.parameters(), ours.model.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-5)


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
    for trainer_class in (GRPOTrainer, CurvatureGRPOTrainer):
        calls = Calls()
        stored = Dataset.from_dict({"q": texts, "hint": ["!"] * 24, "prompt": [question(t) for t in texts]})
        stored = stored.remove_columns("prompt") if name == "makes_the_column" else stored
        dataset = stored.with_transform(getattr(calls, name))
        trainer = train(tiny_policy, tmp_path / trainer_class.__name__, digits, dataset, trainer_class=trainer_class)
        results.append(list(trainer.model.parameters()))
        counts.append(calls.count)
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-5)
    assert counts[0] == counts[1] > 0


def test_no_random_number_is_drawn_before_the_run(tiny_policy, tmp_path):
    """Building our trainer leaves every generator where TRL's leaves it."""
    states = []
    for trainer_class in (GRPOTrainer, CurvatureGRPOTrainer):
        build(tiny_policy, tmp_path, trainer_class=trainer_class)
        states.append((torch.get_rng_state(), np.random.get_state()[1]))
    assert torch.equal(states[0][0], states[1][0]) and (states[0][1] == states[1][1]).all()


def test_a_bounded_number_of_rows_is_read():
    many = Dataset.from_dict({"prompt": [f"{i}" for i in range(3000)]})
    assert len(list(run_checks._stored_prompts(many))) == run_checks.MAX_ROWS == 1000
    assert len(list(run_checks._stored_prompts(many, None))) == 3000


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


KINDS = {
    "map": lambda values: map(float, values),
    "generator": lambda values: (value for value in values),
    "values": lambda values: dict(enumerate(values)).values(),
    "tuple": tuple,
    "array": np.array,
    "tensor": torch.tensor,
    "iterable": Iterable,
}


@pytest.mark.parametrize("kind", KINDS)
def test_rewards_of_any_kind_that_trl_takes(kind, tiny_policy, tmp_path):
    assert_trains_as_trl(
        tiny_policy, tmp_path, prompts(32), lambda completions, **kwargs: KINDS[kind](digits(completions))
    )


def test_what_an_iterator_raises_is_the_reward_functions(tiny_policy, tmp_path):
    def reward(completions, **kwargs):
        yield from [1.0, 0.0]
        raise KeyError("answer")

    with pytest.raises(RuntimeError, match="reward function 'reward' raised KeyError: 'answer'"):
        train(tiny_policy, tmp_path, reward)


def test_a_long_prompt_of_a_batch_is_named(tiny_policy, tmp_path, caplog):
    """A transform makes it, so that nobody could know before; rotary positions go on, as TRL lets them."""
    texts = ["1 + 1 ="] * 8
    dataset = Dataset.from_dict({"q": texts}).with_transform(
        lambda rows: {"prompt": [question(t * 200) for t in rows["q"]]}
    )
    with caplog.at_level(logging.WARNING, logger="trl_ext"):
        train(tiny_policy, tmp_path, train_dataset=dataset, max_steps=1)
    (said,) = messages(caplog, "of this batch has")
    assert "1 + 1 =1 + 1 =" in said and "no room for an answer" in said


def test_a_prompt_beyond_a_table_of_positions_is_refused(tiny_policy, tmp_path):
    """GPT-2's positions are rows of a table: the model would fail in the middle of the run."""
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer_of(tiny_policy)), **sizes))
    message = r"The prompt of row 1 of train_dataset has \d+ tokens, and the model's context"
    with pytest.raises(ValueError, match=message):
        train(
            tiny_policy, tmp_path, train_dataset=Dataset.from_dict({"prompt": ["1", "1 + 1 = " * 40] * 4}), model=model
        )


def test_an_empty_text_is_trained_on_beside_others(tiny_policy, tmp_path, caplog):
    def reward(completions, **kwargs):
        return [len(completion) % 3 / 2 for completion in completions]

    dataset = Dataset.from_dict({"prompt": ["1 + 1 =", "", "2 + 2 =", "3"] * 8})
    with caplog.at_level(logging.WARNING, logger="trl_ext"):  # a batch of empty texts alone fails, as with TRL
        assert_trains_as_trl(tiny_policy, tmp_path, dataset, reward, shuffle_dataset=False)
    assert len(messages(caplog, "is an empty text")) == 1
