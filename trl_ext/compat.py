"""Holds everything that this package uses of TRL's undocumented interface; no other module names it.

Other modules import TRL's private helpers from here. ``check_class`` and ``check_trainer`` look for every method,
parameter, attribute and key when a trainer is built, so that a changed TRL raises an error before a model is trained
with the wrong loss. Later stages get frozen copies of the trainer's settings: ``RunSettings`` once, ``LossSettings``
and ``StepPosition`` at each call, because a callback may change ``trainer.beta`` during training.
"""

from __future__ import annotations

import inspect
import logging
import types
from collections.abc import Callable, Iterator, Mapping, MutableSequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import trl
from accelerate.utils import DistributedType, TorchDynamoPlugin
from trl import GRPOTrainer
from trl.trainer import grpo_trainer

from .capabilities import Capabilities, capabilities
from .compilation import Compilation, read_compilation
from .log_once import LogOnce
from .options import CurvatureOptions, read_options

# From TRL 1.15 on, TRL gives models a head that computes log-probs, and calls the model with fused_lm_head=True
TRL_HAS_HEAD = hasattr(grpo_trainer, "add_fused_lm_head")

# By capability: the methods that we override or call, with the parameters that we pass or take
PARAMETERS: dict[str, dict[str, tuple[str, ...]]] = {
    "advantages": {
        "_calculate_rewards": ("inputs", "prompts", "completions", "completion_ids_list"),
        "_generate": ("prompts",),
        "_generate_and_score_completions": ("inputs",),
        "_prepare_inputs": ("generation_batch",),
        "compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch"),
        "training_step": ("model", "inputs", "num_items_in_batch"),
        "_save_checkpoint": ("model", "trial"),
        "train": ("resume_from_checkpoint",),
    },
    "fuse": {"_compute_loss": ("model", "inputs")},
    "defer": {"_get_per_token_logps_and_entropies": ("model",)},
}

# Attributes of a built trainer, in addition to those that read_run_settings and read_loss_settings read
ATTRIBUTES = (
    *("_buffered_inputs", "_tokenizer", "_logs", "_metrics", "reward_funcs", "reward_func_names", "reward_weights"),
    *("ref_model", "num_generations", "num_generations_eval", "multi_objective_aggregation", "scale_rewards"),
    "pad_to_multiple_of",
)
LOG_COLUMNS = ("prompt", "completion", "rewards", "advantages", "extra")  # of the completions table


def arguments_after(name: str) -> list[str]:
    """Returns the names of ``GRPOTrainer``'s arguments after the argument ``name``."""
    names = list(inspect.signature(GRPOTrainer.__init__).parameters)
    return names[names.index(name) + 1 :]


class ChangedTRL(RuntimeError):  # noqa: N818
    """The installed TRL lacks a method, argument, attribute or key that this package uses."""

    def __init__(self, what: str) -> None:
        super().__init__(f"TRL {trl.__version__} isn't as trl_ext knows it: {what}")


class _OnceFilter(logging.Filter):
    """Lets the first message that contains ``part`` through, and drops the later ones."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.part, self.passed = part, False

    def filter(self, record: logging.LogRecord) -> bool:
        if self.part not in record.getMessage():
            return True
        first, self.passed = not self.passed, True
        return first


def limit_unscored_warning() -> None:
    """Limits TRL's warning about completions without a reward, which it logs at every step, to once per trainer."""
    logger = logging.getLogger(grpo_trainer.__name__)
    for earlier in [added for added in logger.filters if isinstance(added, _OnceFilter)]:
        logger.removeFilter(earlier)
    logger.addFilter(_OnceFilter("All reward functions returned None"))


def check_class() -> None:
    """Raises ``ChangedTRL`` if a method of ``GRPOTrainer`` is missing or takes other arguments."""
    now = capabilities()
    needed = {part: methods for part, methods in PARAMETERS.items() if now.has(part)}
    for name, wanted in [pair for methods in needed.values() for pair in methods.items()]:
        method = getattr(GRPOTrainer, name, None)
        if method is None:
            raise ChangedTRL(f"GRPOTrainer has no {name}")
        parameters = list(inspect.signature(method).parameters.values())[1:]
        found = tuple(argument.name for argument in parameters if argument.kind is argument.POSITIONAL_OR_KEYWORD)
        # a wrapper that a user put around TRL's method may take *args
        open_ended = any(argument.kind is argument.VAR_POSITIONAL for argument in parameters)
        if found[: len(wanted)] != (wanted[: len(found)] if open_ended else wanted):
            raise ChangedTRL(f"GRPOTrainer.{name} takes ({', '.join(found)}), not ({', '.join(wanted)})")
    if now.has("fuse") and not hasattr(grpo_trainer, "BaseTunerLayer"):
        raise ChangedTRL("trl.trainer.grpo_trainer has no BaseTunerLayer, by which it refuses an adapter on lm_head")


def check_trainer(trainer: Any) -> None:
    """Raises ``ChangedTRL`` if an attribute of a built trainer, or a key of its logs, is missing."""
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


# Settings that are read from a trainer


def compile_no_whole_model(trainer: Any) -> None:
    """Keeps accelerate from compiling the model as a whole, where this package compiles its layers one by one."""
    if capabilities().has("advantages") and read_compilation(trainer.args) is not None:
        trainer.accelerator.state.dynamo_plugin = TorchDynamoPlugin(backend="no")


@dataclass(frozen=True)
class RunSettings:
    """The settings that stay constant during a run, and the two ways to log.

    Attributes:
        options: this package's options, without what doesn't work with the installed TRL.
        prompts_per_generation: prompts of a generation batch, over all ranks.
        train_batch_size, eval_batch_size: sequences of a micro-batch on each rank.
        temperature: returns the temperature of log-probs; it may change only where TRL has no head of its own.
        compilation: how the decoder layers are compiled; None: they aren't.
        log: ``log(metrics)`` adds metrics to the trainer's log.
        log_once: ``log_once(text)`` logs a message, unless it was logged before.
    """

    options: CurvatureOptions
    accelerator: Any
    seed: int
    output_dir: str
    report_to: tuple[str, ...]
    compilation: Compilation | None
    num_generations: int
    generation_batch_size: int
    prompts_per_generation: int
    pad_token_id: int
    pad_to_multiple_of: int | None
    train_batch_size: int
    eval_batch_size: int
    temperature: Callable[[], float]
    cast_lm_head_to_fp32: bool
    capabilities: Capabilities
    log: Callable[[Mapping[str, float]], None]
    log_once: LogOnce


def allowed_options(args: Any) -> CurvatureOptions:
    """Returns the current options, without what doesn't work with the installed TRL or with ``use_liger_kernel``."""
    options = capabilities().allowed(read_options(args))
    # without TRL's head, TRL computes the loss of use_liger_kernel outside of the model's forward
    liger = not TRL_HAS_HEAD and getattr(args, "use_liger_kernel", False)
    return replace(options, fused_loss=False) if liger else options


def read_run_settings(trainer: Any, log: Any, log_once: Any) -> RunSettings:
    """Reads the settings that stay constant, when the trainer is built."""
    args, fixed = trainer.args, trainer.temperature
    return RunSettings(
        options=allowed_options(args),
        accelerator=trainer.accelerator,
        seed=args.seed,
        output_dir=args.output_dir,
        report_to=tuple(args.report_to or ()),
        compilation=read_compilation(args),
        num_generations=trainer.num_generations,
        generation_batch_size=args.generation_batch_size,
        prompts_per_generation=args.generation_batch_size // trainer.num_generations,
        pad_token_id=trainer._tokenizer.pad_token_id,
        pad_to_multiple_of=trainer.pad_to_multiple_of,
        train_batch_size=args.per_device_train_batch_size,
        eval_batch_size=args.per_device_eval_batch_size,
        temperature=(lambda: fixed) if TRL_HAS_HEAD else (lambda: trainer.temperature),
        cast_lm_head_to_fp32=args.cast_lm_head_to_fp32,
        capabilities=capabilities(),
        log=log,
        log_once=log_once,
    )


@dataclass(frozen=True)
class RewardSettings:
    """The settings by which rewards become advantages, as they are at this step.

    ``n_functions`` is the number of reward functions. The other names are TRL's.
    """

    scale_rewards: str
    aggregation: str
    n_functions: int
    options: CurvatureOptions


def read_reward_settings(trainer: Any) -> RewardSettings:
    """Reads the current reward settings, which a callback may have changed."""
    options = allowed_options(trainer.args)
    return RewardSettings(
        trainer.scale_rewards, trainer.multi_objective_aggregation, len(trainer.reward_funcs), options
    )


@dataclass(frozen=True)
class LossSettings:
    """The settings that a micro-batch's loss depends on, with TRL's names where TRL has one.

    Attributes:
        entropy_coef: used only if ``entropy_bonus``.
        aux_loss_coef: used only if ``aux_loss``, the load-balancing loss of a mixture of experts.
        importance_correction: whether vLLM's importance sampling correction is on.
        own_logprobs: the reason to log if a subclass overrides the computation of log-probs, which the fused loss
            would bypass; else None.
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
    """Reads the current loss settings, which a callback may have changed."""
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
    """The position of a call of ``training_step`` in training.

    Attributes:
        micro_batch: number of earlier calls, as TRL counts them.
        optimizer_step: the trainer state's ``global_step``.
        accumulation: number of calls in this optimizer step; the last step of an epoch may have fewer.
        loss_divisor: by what the loss of a call is divided: by the accumulation, and with an older transformers by
            accelerate once more.
        last: whether this is the step's last call.
        iteration: how often the generation batch was trained on before, below ``num_iterations``.
    """

    micro_batch: int
    optimizer_step: int
    accumulation: int
    loss_divisor: int
    steps_per_generation: int
    last: bool
    iteration: int = 0


def read_position(trainer: Any) -> StepPosition:
    """Reads the position of the current call."""
    accumulation, accelerator = trainer.current_gradient_accumulation_steps, trainer.accelerator
    engine = accelerator.distributed_type == DistributedType.DEEPSPEED  # Trainer turns its division off
    return StepPosition(
        micro_batch=trainer._step,
        optimizer_step=trainer.state.global_step,
        accumulation=accumulation,
        loss_divisor=accumulation * (1 if engine else accelerator.gradient_accumulation_steps),
        steps_per_generation=trainer.args.steps_per_generation,
        last=accelerator.sync_gradients,
        iteration=trainer._step // trainer.args.steps_per_generation % trainer.num_iterations,
    )


def logged_columns(logs: Mapping[str, Any]) -> dict[str, MutableSequence[Any]]:
    """Returns the columns of TRL's completions table that have one entry for each sequence, by name."""
    return {
        **{name: logs[name] for name in ("prompt", "completion")},
        **{f"rewards {name}": column for name, column in logs["rewards"].items()},
        **{f"extra {name}": column for name, column in logs["extra"].items()},
    }


def replace_latest(column: MutableSequence[Any], values: list[Any]) -> None:
    """Replaces the last ``len(values)`` entries, which TRL has just appended, by ``values``."""
    for _ in range(min(len(values), len(column))):
        column.pop()
    column.extend(values)


# Changes of TRL's behaviour


@contextmanager
def within_last_call(trainer: Any) -> Iterator[None]:
    """Sets TRL's count of calls of ``training_step`` back to that of the last call, which runs another micro-batch."""
    trainer._step -= 1
    try:
        yield
    finally:
        trainer._step += 1


class _NoAdapter:
    """Stands in for PEFT's adapter class in TRL's check; nothing is an instance of it."""


@contextmanager
def without_trl_head(trainer: Any, add_to_reference: Callable[[Any], Any]) -> Iterator[None]:
    """Keeps TRL from patching its own head onto the policy while ``trainer`` is built in this context.

    Our head is patched on later, while the trainer trains. ``add_to_reference`` patches the reference model, which TRL
    creates, before accelerate wraps it. TRL also refuses an adapter on ``lm_head``, because its head ignores one; our
    head supports it, so the context disables that check.
    """

    def add(model: Any, *args: Any, **kwargs: Any) -> None:
        if model is trainer.ref_model:
            add_to_reference(model)

    stand_ins = {"BaseTunerLayer": _NoAdapter, **({"add_fused_lm_head": add} if TRL_HAS_HEAD else {})}
    before = {name: getattr(grpo_trainer, name) for name in stand_ins}
    vars(grpo_trainer).update(stand_ins)
    try:
        yield
    finally:
        vars(grpo_trainer).update(before)


def forward_without_trl_head(model: Any) -> Any:
    """Returns ``model.forward`` without the wrapper that an earlier ``GRPOTrainer`` of TRL's may have put around it.

    TRL's wrapper (``add_fused_lm_head``) keeps a reference to the model it was made for. In a deep copy of that model
    it would run the original's weights.
    """
    forward = model.forward
    while True:
        function = getattr(forward, "__func__", None)
        code = getattr(function, "__code__", None)
        if code is None or not code.co_qualname.startswith("add_fused_lm_head."):
            return forward
        cells: Any = getattr(function, "__closure__", None) or ()
        original = dict(zip(code.co_freevars, cells, strict=True)).get("original_forward")
        if original is None:
            return forward
        forward = original.cell_contents
        if isinstance(forward, types.MethodType):
            forward = types.MethodType(forward.__func__, model)
