"""Environments that own their reward, and their tools, through the real trainer: here as in TRL's.

All is TRL's own: its chat template check, its parser with a response template, its loop of tool calls, its reward of
each class of environment. The policy has random weights, so a tool call is what its text happens to hold: whatever
follows a digit 1.
"""

import pytest
import torch
from datasets import Dataset
from test_trainer_equality import Recorder, assert_same
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from trl_ext import CurvatureGRPOConfig, CurvatureGRPOTrainer
from trl_ext.tasks.arithmetic import generate_problems

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
            "open": "1", "close_pattern": "<eos>", "repeats": True, "content": "text",
            "transform": {"type": "function", "function": {"name": "press", "arguments": {"keys": "{content}"}}},
        },
        "content": {"close_pattern": "<eos>", "content": "text"},
    },
}  # fmt: skip


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


def by_length(completion_ids, **kwargs):
    return [(len(ids) % 3) / 2 for ids in completion_ids]


def train(trainer_class, config_class, policy, folder, factory, reward_funcs, **options):
    tokenizer = AutoTokenizer.from_pretrained(policy, padding_side="left")
    tokenizer.chat_template, tokenizer.response_template = TEMPLATE, RESPONSE
    recorder = Recorder()
    torch.manual_seed(0)
    rows = {"prompt": [[{"role": "user", "content": one.question}] for one in generate_problems(32)]}
    if isinstance(factory, dict):
        rows["environment"] = [list(factory)[number % len(factory)] for number in range(32)]
        if issubclass(next(iter(factory.values())), Asks):
            del rows["prompt"]
            Asks.number = 0
    trainer = trainer_class(
        model=str(policy),
        reward_funcs=reward_funcs,
        args=config_class(
            output_dir=str(folder), num_generations=4, per_device_train_batch_size=8, gradient_accumulation_steps=2,
            max_completion_length=20, max_steps=3, optim="sgd", learning_rate=0.02, logging_steps=1, seed=7,
            generation_kwargs={"sequence_bias": [[[1], 4.0], [[tokenizer.encode("1")[0]], 4.0]]},
            lr_scheduler_type="constant", report_to="none", disable_tqdm=True, use_cpu=True, bf16=False,
            gradient_checkpointing=False, save_strategy="no", max_tool_calling_iterations=2, **options,
        ),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
        environment_factory=factory,
        callbacks=[recorder],
    )  # fmt: skip
    trainer.train()
    parameters = {name: one.detach().clone() for name, one in trainer.model.named_parameters()}
    return trainer, recorder, parameters


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
    theirs = train(GRPOTrainer, GRPOConfig, tiny_policy, tmp_path / "trl", factory, functions, **options)
    ours = train(
        CurvatureGRPOTrainer, CurvatureGRPOConfig, tiny_policy, tmp_path / "ours", factory, functions,
        interference_every=1, **options,
    )  # fmt: skip
    assert_same(ours, theirs)
    logs = [log for log in theirs[1].logs if "loss" in log]
    assert sum(log["grad_norm"] > 0 for log in logs) >= 2
    assert any(0 < log["tools/call_frequency"] for log in logs), "no tool was called"
    for name in {type(one).__name__ for one in theirs[0].environments} - {"Silent", "AsksMore"}:
        assert any(log[f"rewards/{name}/mean"] > 0 for log in logs), "an environment's reward is always 0"
    assert any("interference/cos_mean" in log for log in ours[1].logs)


def test_an_environment_whose_reward_fails_is_named(tiny_policy, tmp_path):
    class Stuck(Keyboard):
        def get_reward(self):
            return float("inf")

    with pytest.raises(ValueError, match="'Stuck' returned inf for row 0"):
        train(CurvatureGRPOTrainer, CurvatureGRPOConfig, tiny_policy, tmp_path, Stuck, None)
