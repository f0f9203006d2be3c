"""Environments that own their reward, and their tools, through the real trainer: here as in TRL's.

All is TRL's own: its chat template check, its parser with a response template, its loop of tool calls, its reward of
each class of environment. The policy has random weights, so a tool call is what its text happens to hold: whatever
follows a digit 1.
"""

import pytest
from datasets import Dataset
from harness import OLD_TRANSFORMERS, assert_same, by_length, logged, prompts, tokenizer_of
from harness import train as train_tiny
from trl import GRPOTrainer

from trl_ext import CurvatureGRPOTrainer

pytestmark = pytest.mark.skipif(OLD_TRANSFORMERS, reason="an older transformers has no response templates")
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<user>' + message['content'] + '<assistant>' }}"
    "{% elif message['role'] == 'tool' %}{{ '<user>' + message['content'] + '<assistant>' }}"
    "{% else %}{{ message['content'] }}"
    "{% for call in message.get('tool_calls') or [] %}{{ '1' + (call['function'] | tojson) }}{% endfor %}{{ '<eos>' }}"
    "{% endif %}{% endfor %}"
)
RESPONSE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<assistant>",
    "fields": {
        "tool_calls": {
            "open": "1",
            "close_pattern": "<eos>",
            "repeats": True,
            "content": "text",
            "transform": {"type": "function", "function": {"name": "press", "arguments": {"keys": "{content}"}}},
        },
        "content": {"close_pattern": "<eos>", "content": "text"},
    },
}


class Keyboard:
    """Counts what was pressed; its reward is its own."""

    def reset(self, **kwargs):
        self.pressed = []
        return None

    def press(self, keys: str) -> str:
        """
        Presses keys.

        Args:
            keys: Which ones.

        Returns:
            How often keys were pressed.
        """
        self.pressed.append(keys)
        return str(len(self.pressed))

    def get_reward(self):
        return float(len(self.pressed))


class Silent(Keyboard):
    """Owns no reward: a reward function's alone counts."""

    get_reward = None


class Patient(Keyboard):
    """Its judge is asynchronous."""

    async def get_reward(self):
        return 0.5 * len(self.pressed)


class Asks(Keyboard):
    """Owns its questions too: the dataset has none."""

    number = 0

    def reset(self, **kwargs):
        super().reset(**kwargs)
        Asks.number += 1
        return f"What is {Asks.number // 4 % 9} + 1?"


class AsksMore(Asks):
    get_reward = None


def train(trainer_class, policy, folder, factory, reward_funcs, **options):
    tokenizer = tokenizer_of(policy)
    tokenizer.chat_template, tokenizer.response_template = TEMPLATE, RESPONSE
    rows = {"prompt": prompts(32)["prompt"]}
    if isinstance(factory, dict):
        rows["environment"] = [list(factory)[number % len(factory)] for number in range(32)]
        if issubclass(next(iter(factory.values())), Asks):
            del rows["prompt"]
            Asks.number = 0
    calls = {"sequence_bias": [[[1], 4.0], [[tokenizer.encode("1")[0]], 4.0]]}
    options |= {"gradient_accumulation_steps": 2, "max_completion_length": 20, "max_steps": 3}
    options |= {"generation_kwargs": calls, "max_tool_calling_iterations": 2, "trainer_class": trainer_class}
    dataset = Dataset.from_dict(rows)
    options |= {"environment_factory": factory, "processing_class": tokenizer}
    return train_tiny(policy, folder, reward_funcs, dataset, **options)


CASES = {
    "its own": (Keyboard, None, {}),
    "and a function's": (Keyboard, by_length, {}),
    "asynchronous": (Patient, None, {}),
    "several": ({"scores": Keyboard, "waits": Patient}, by_length, {}),
    "one of two": ({"scores": Keyboard, "doesn't": Silent}, by_length, {}),
    "their own questions": ({"asks": Asks, "more": AsksMore}, by_length, {}),
    "KL, twice": (Keyboard, None, {"beta": 0.05, "num_iterations": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_environments_are_trls(case, tiny_policy, tmp_path):
    factory, functions, options = CASES[case]
    theirs = train(GRPOTrainer, tiny_policy, tmp_path / "trl", factory, functions, **options)
    options = {**options, "interference_every": 1}
    ours = train(CurvatureGRPOTrainer, tiny_policy, tmp_path / "ours", factory, functions, **options)
    assert_same(ours, theirs)
    logs = logged(theirs, "loss")
    assert sum(log["grad_norm"] > 0 for log in logs) >= 2
    assert any(0 < log["tools/call_frequency"] for log in logs), "no tool was called"
    for name in {type(one).__name__ for one in theirs.environments} - {"Silent", "AsksMore"}:
        assert any(log[f"rewards/{name}/mean"] > 0 for log in logs), "an environment's reward is always 0"
    assert logged(ours, "interference/cos_mean")


def test_an_environment_whose_reward_fails_is_named(tiny_policy, tmp_path):
    class Stuck(Keyboard):
        def get_reward(self):
            return float("inf")

    with pytest.raises(ValueError, match="'Stuck' returned inf for row 0"):
        train(CurvatureGRPOTrainer, tiny_policy, tmp_path, Stuck, None)
