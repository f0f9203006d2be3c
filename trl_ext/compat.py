"""Everything of TRL that is no documented interface and that this package leans on; no other module names it.

Private helpers are imported from here. ``check_class`` and ``check_trainer`` look for every method, parameter,
attribute and key when a trainer is built, so that a TRL that has changed is named before a model is trained with the
wrong loss. What later stages read of a trainer they get frozen: ``RunSettings`` once, ``LossSettings`` and
``StepPosition`` anew each time, since a callback may change ``trainer.beta`` while training.
"""

from __future__ import annotations

import inspect
import logging
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import trl
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer import grpo_trainer
from trl.trainer.utils import (
    FusedCausalLMOutput,
    get_callable_name,
    is_async_callable,
    maybe_gather_lm_head_ctx,
    pad,
    use_adapter,
)

from .options import CurvatureOptions, read_options
from .say_once import SayOnce

__all__ = [
    "FusedCausalLMOutput",
    "disable_gradient_checkpointing",
    "get_callable_name",
    "is_async_callable",
    "maybe_gather_lm_head_ctx",
    "pad",
    "use_adapter",
]


# Methods that we override or call, with the parameters that we pass or take

PARAMETERS = {
    "_calculate_rewards": ("inputs", "prompts", "completions", "completion_ids_list"),
    "_generate": ("prompts",),
    "_generate_and_score_completions": ("inputs",),
    "_get_per_token_logps_and_entropies": (
        "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy",
    ),
    "_prepare_inputs": ("generation_batch",),
    "_compute_loss": ("model", "inputs"),
    "compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch"),
    "training_step": ("model", "inputs", "num_items_in_batch"),
    "_save_checkpoint": ("model", "trial"),
    "train": ("resume_from_checkpoint",),
}  # fmt: skip

# Attributes of a built trainer, beside those that the two readers below read
ATTRIBUTES = (
    "_buffered_inputs", "_tokenizer", "_logs", "_metrics", "reward_funcs", "reward_func_names", "reward_weights",
    "ref_model", "num_generations", "num_generations_eval", "multi_objective_aggregation", "scale_rewards",
    "pad_to_multiple_of",
)  # fmt: skip
LOG_COLUMNS = ("prompt", "completion", "rewards", "advantages", "extra")  # of the completions table


def arguments_after(name: str) -> list[str]:
    """Those of ``GRPOTrainer`` that stand after this one."""
    names = list(inspect.signature(GRPOTrainer.__init__).parameters)
    return names[names.index(name) + 1 :]


class ChangedTRL(RuntimeError):  # noqa: N818
    """TRL isn't as this package knows it."""

    def __init__(self, what: str) -> None:
        super().__init__(f"TRL {trl.__version__} isn't as trl_ext knows it: {what}")


class _SaidOnce(logging.Filter):
    """Lets a message of TRL that holds ``part`` pass once."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.part, self.said = part, False

    def filter(self, record: logging.LogRecord) -> bool:
        if self.part not in record.getMessage():
            return True
        said, self.said = self.said, True
        return not said


def say_unscored_once() -> None:
    """TRL tells of completions without any reward at every step, with all that it knows of the first of them."""
    logger = logging.getLogger(grpo_trainer.__name__)
    for earlier in [one for one in logger.filters if isinstance(one, _SaidOnce)]:
        logger.removeFilter(earlier)
    logger.addFilter(_SaidOnce("All reward functions returned None"))


def check_class() -> None:
    """Raises ``ChangedTRL`` where a method of ``GRPOTrainer`` is gone or takes other arguments."""
    for name, wanted in PARAMETERS.items():
        method = getattr(GRPOTrainer, name, None)
        if method is None:
            raise ChangedTRL(f"GRPOTrainer has no {name}")
        parameters = list(inspect.signature(method).parameters.values())[1:]
        found = tuple(one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD)
        open_ended = any(one.kind is one.VAR_POSITIONAL for one in parameters)  # a user's wrapper around TRL's
        if found[: len(wanted)] != (wanted[: len(found)] if open_ended else wanted):
            raise ChangedTRL(f"GRPOTrainer.{name} takes ({', '.join(found)}), not ({', '.join(wanted)})")
    for name in ("BaseTunerLayer", "add_fused_lm_head"):
        if not hasattr(grpo_trainer, name):
            raise ChangedTRL(f"trl.trainer.grpo_trainer has no {name}, with which it gives a model its head")


def check_trainer(trainer: Any) -> None:
    """Raises ``ChangedTRL`` where an attribute of a built trainer, or a key of its logs, is gone."""
    for name in ATTRIBUTES:
        if not hasattr(trainer, name):
            raise ChangedTRL(f"GRPOTrainer has no attribute {name}")
    for name, keys in (("_metrics", ("train", "eval")), ("_logs", LOG_COLUMNS)):
        if missing := [key for key in keys if key not in getattr(trainer, name)]:
            raise ChangedTRL(f"GRPOTrainer.{name} has no {', '.join(missing)}")
    try:
        read_run_settings(trainer, None, None)
        read_loss_settings(trainer)
        trainer._step, trainer.accelerator.sync_gradients  # noqa: B018
    except AttributeError as error:
        raise ChangedTRL(f"{error.obj.__class__.__name__} has no attribute {error.name}") from None


# What is read of a trainer


@dataclass(frozen=True)
class RunSettings:
    """What stays as it is in a run, and where to say things: ``log(metrics)`` in training, ``say_once(text)``.

    ``options``: ours. ``prompts_per_generation``: of all processes. ``pad_token_id``: the tokenizer's.
    ``train_batch_size``, ``eval_batch_size``: sequences of each process at a time.
    """

    options: CurvatureOptions
    accelerator: Any
    seed: int
    output_dir: str
    report_to: tuple[str, ...]
    torch_compile: bool
    num_generations: int
    generation_batch_size: int
    prompts_per_generation: int
    pad_token_id: int
    pad_to_multiple_of: int | None
    train_batch_size: int
    eval_batch_size: int
    temperature: float
    cast_lm_head_to_fp32: bool
    log: Callable[[Mapping[str, float]], None]
    say_once: SayOnce


def read_run_settings(trainer: Any, log: Any, say_once: Any) -> RunSettings:
    """When the trainer is built."""
    args = trainer.args
    return RunSettings(
        options=read_options(args),
        accelerator=trainer.accelerator,
        seed=args.seed,
        output_dir=args.output_dir,
        report_to=tuple(args.report_to or ()),
        torch_compile=args.torch_compile,
        num_generations=trainer.num_generations,
        generation_batch_size=args.generation_batch_size,
        prompts_per_generation=args.generation_batch_size // trainer.num_generations,
        pad_token_id=trainer._tokenizer.pad_token_id,
        pad_to_multiple_of=trainer.pad_to_multiple_of,
        train_batch_size=args.per_device_train_batch_size,
        eval_batch_size=args.per_device_eval_batch_size,
        temperature=trainer.temperature,
        cast_lm_head_to_fp32=args.cast_lm_head_to_fp32,
        log=log,
        say_once=say_once,
    )


@dataclass(frozen=True)
class RewardSettings:
    """What TRL reads at each step between rewards and advantages, by TRL's names, and our own options as they are now.

    ``n_functions``: of the reward functions.
    """

    scale_rewards: str
    aggregation: str
    n_functions: int
    options: CurvatureOptions


def read_reward_settings(trainer: Any) -> RewardSettings:
    """As they are now: a callback may have changed them."""
    options = read_options(trainer.args)
    return RewardSettings(
        trainer.scale_rewards, trainer.multi_objective_aggregation, len(trainer.reward_funcs), options
    )


@dataclass(frozen=True)
class LossSettings:
    """What a micro-batch's loss depends on beside the batch: TRL's options by TRL's names, or what they come to.

    ``entropy_coef`` counts where ``entropy_bonus``, ``aux_loss_coef`` where ``aux_loss``. ``importance_correction``:
    vLLM's. ``own_logprobs``: what to say of log-probs that a subclass makes, which the one pass wouldn't ask for, or
    None.
    """

    loss_type: str
    epsilon_low: float
    epsilon_high: float
    delta: float | None
    sapo_temperatures: tuple[float, float]
    beta: float
    kl_times_ratio: bool
    importance_sampling_level: str
    importance_correction: bool
    top_entropy_quantile: float
    off_policy_mask_threshold: float | None
    use_adaptive_entropy: bool
    entropy_bonus: bool
    entropy_coef: float
    aux_loss: bool
    aux_loss_coef: float
    max_completion_length: int
    num_processes: int
    steps_per_generation: int
    own_logprobs: str | None


def read_loss_settings(trainer: Any, own_logprobs: str | None = None) -> LossSettings:
    """As they are now."""
    args = trainer.args
    return LossSettings(
        loss_type=trainer.loss_type,
        epsilon_low=trainer.epsilon_low,
        epsilon_high=trainer.epsilon_high,
        delta=args.delta,
        sapo_temperatures=(args.sapo_temperature_pos, args.sapo_temperature_neg),
        beta=trainer.beta,
        kl_times_ratio=args.use_bias_correction_kl,
        importance_sampling_level=trainer.importance_sampling_level,
        importance_correction=trainer.use_vllm and trainer.vllm_importance_sampling_correction,
        top_entropy_quantile=trainer.top_entropy_quantile,
        off_policy_mask_threshold=trainer.off_policy_mask_threshold,
        use_adaptive_entropy=trainer.use_adaptive_entropy,
        entropy_bonus=trainer._entropy_bonus_enabled,
        entropy_coef=trainer.entropy_coef,
        aux_loss=trainer.aux_loss_enabled,
        aux_loss_coef=trainer.router_aux_loss_coef if trainer.aux_loss_enabled else 0.0,
        max_completion_length=trainer.max_completion_length,
        num_processes=trainer.accelerator.num_processes,
        steps_per_generation=args.steps_per_generation,
        own_logprobs=own_logprobs,
    )


@dataclass(frozen=True)
class StepPosition:
    """Where in training a call of ``training_step`` is.

    ``micro_batch``: how many calls TRL has counted before it. ``optimizer_step``: the state's ``global_step``.
    ``accumulation``: calls of this optimizer step (the last of an epoch may have fewer). ``last``: of them.
    """

    micro_batch: int
    optimizer_step: int
    accumulation: int
    steps_per_generation: int
    last: bool


def read_position(trainer: Any) -> StepPosition:
    """As it is now."""
    return StepPosition(
        micro_batch=trainer._step,
        optimizer_step=trainer.state.global_step,
        accumulation=trainer.current_gradient_accumulation_steps,
        steps_per_generation=trainer.args.steps_per_generation,
        last=trainer.accelerator.sync_gradients,
    )


def logged_columns(logs: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of TRL's completions table that have an entry for each sequence, flat, by name."""
    return {
        **{name: logs[name] for name in ("prompt", "completion")},
        **{f"rewards {name}": column for name, column in logs["rewards"].items()},
        **{f"extra {name}": column for name, column in logs["extra"].items()},
    }


def replace_latest(column: Any, values: list[Any]) -> None:
    """Puts ``values`` where TRL has just appended as many of its own."""
    for _ in range(min(len(values), len(column))):
        column.pop()
    column.extend(values)


# What is changed of TRL


class _NoAdapter:
    """Nothing is an instance of this."""


@contextmanager
def without_trl_head(trainer: Any, add_to_reference: Callable[[Any], Any]) -> Iterator[None]:
    """``trainer``, built within, gives the policy no head of TRL's: ours is there while it trains.

    The reference model, which is TRL's own, gets what ``add_to_reference`` gives it before accelerate wraps it.
    TRL also refuses an adapter on ``lm_head``, which its head would ignore. Ours doesn't: the check is passed over.
    """

    def add(model: Any, *args: Any, **kwargs: Any) -> None:
        if model is trainer.ref_model:
            add_to_reference(model)

    before = grpo_trainer.BaseTunerLayer, grpo_trainer.add_fused_lm_head
    grpo_trainer.BaseTunerLayer, grpo_trainer.add_fused_lm_head = _NoAdapter, add
    try:
        yield
    finally:
        grpo_trainer.BaseTunerLayer, grpo_trainer.add_fused_lm_head = before


def forward_without_trl_head(model: Any) -> Any:
    """``model.forward`` without what TRL's ``add_fused_lm_head`` put around it, for a trainer of its own before ours.

    TRL's patch calls the model that it was made for: in a deep copy of that model it would run the other one's weights.
    """
    forward = model.forward
    while True:
        function = getattr(forward, "__func__", None)
        code = getattr(function, "__code__", None)
        if code is None or not code.co_qualname.startswith("add_fused_lm_head."):
            return forward
        cells: Any = getattr(function, "__closure__", None) or ()
        there = dict(zip(code.co_freevars, cells, strict=True)).get("original_forward")
        if there is None:
            return forward
        forward = there.cell_contents
        if isinstance(forward, types.MethodType):
            forward = types.MethodType(forward.__func__, model)
