"""The options of a run that may leave its machine: numbers and words of an allow-list, neither paths nor addresses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .run_files import Configuration

# what is shown of a configuration: label -> option
CONFIGURATION = {
    "model": "model_name_or_path",
    "adapter": "adapter",
    "normalization": "normalization",
    "answers to a prompt": "num_generations",
    "answers a step": "generation_batch_size",
    "learning rate": "learning_rate",
    "optimizer": "optim",
    "clipped at": "max_grad_norm",
    "loss": "loss_type",
    "beta": "beta",
    "iterations": "num_iterations",
    "tokens of an answer": "max_completion_length",
    "steps": "max_steps",
    "seed": "seed",
    "processes": "num_processes",
}
SHARED = (
    *CONFIGURATION.values(),
    *("scale_rewards", "normalization_kwargs", "multi_objective_aggregation", "reward_weights", "logging_steps"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "lr_scheduler_type"),
    *("epsilon", "epsilon_high", "temperature", "top_p", "top_k", "mask_truncated_completions", "use_vllm"),
    *("resample_zero_variance", "interference_every", "bf16", "fp16"),
    *("repetition_penalty", "vllm_importance_sampling_correction", "log_completions"),  # next_experiment reads them
)
WORD = re.compile(r"[\w.+ -]{1,40}")  # neither a path, nor an address
OWN_FUNCTION = "a function"  # in place of the path of a user's own normalisation

# The configuration that transformers' callbacks log is {**model.config.to_dict(), **args.to_dict()}
# (integration_utils.py:743 and 980, transformers 5.23). A GRPO run of TRL has these:
OF_TRL = ("per_device_train_batch_size", "num_generations")
# these are only our trainer's arguments: in another run such a name is the model's
OURS = ("normalization", "normalization_kwargs", "resample_zero_variance", "interference_every")
NO_ARGUMENTS = ("adapter", "num_processes")


def _plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_plain(name) and _plain(one) for name, one in value.items())
    if isinstance(value, list):
        return all(map(_plain, value))
    return WORD.fullmatch(value) is not None if isinstance(value, str) else isinstance(value, int | float)


def shared_options(config: Configuration) -> Configuration:
    """The options of the allow-list; of the model the last part of its path, of a user's function that it is one."""
    model = str(config.get("model_name_or_path") or "").rstrip("/\\")
    config = {**config, "model_name_or_path": re.split(r"[/\\]", model)[-1]}
    if isinstance(config.get("normalization"), str) and not _plain(config["normalization"] or "std"):
        config["normalization"] = OWN_FUNCTION
    return {name: config[name] for name in SHARED if config.get(name) not in (None, "") and _plain(config[name])}


def trl_options(logged: Mapping[str, Any]) -> Configuration:
    """The shared options of a configuration that W&B or trackio kept; none where the run isn't one of TRL's GRPO."""
    if any(name not in logged for name in OF_TRL):
        return {}
    others = NO_ARGUMENTS if "interference_every" in logged else (*NO_ARGUMENTS, *OURS)
    config = {name: value for name, value in logged.items() if name not in others}
    config["model_name_or_path"] = logged.get("_name_or_path")
    if isinstance(config.get("scale_rewards"), bool):  # earlier TRL
        config["scale_rewards"] = "group" if config["scale_rewards"] else "none"
    return shared_options(config)
