"""Options of ``CurvatureGRPOTrainer``: TRL's, and ours."""

from __future__ import annotations

import json
import numbers
import pickle
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from accelerate.utils import parse_flag_from_env
from transformers.utils import is_torch_bf16_gpu_available
from trl import GRPOConfig

from grpo_kernels.normalize.methods import METHODS, check_normalization, function_name

from .options import MOST_ROUNDS, SCALE_REWARDS_METHOD, CurvatureOptions
from .rejoin import rejoined_in_time


@dataclass
class CurvatureGRPOConfig(CurvatureOptions, GRPOConfig):
    """``GRPOConfig`` plus the options below; everything else means what it means in TRL, but for two defaults that let
    one script run everywhere: without an accelerator (or with ``use_cpu``) ``use_cpu`` is True and ``bf16`` False, and
    on a GPU that has no bf16 ``bf16`` is False. What is set is left as it is.

    Args:
        normalization: how a group's rewards become advantages, one of ``grpo_kernels.METHODS``. None follows
            ``scale_rewards`` ("group" is ``std``, "batch" is ``batch_std``, "none" is ``mean``). From Python also a
            function ``f(rewards_PG, context, **normalization_kwargs) -> advantages_PG``: rewards (P, G) of all
            processes, NaN where unscorable; ``context`` has ``lengths`` (P, G) in tokens, ``function_rewards``
            (P, G, F), ``function_weights`` (F,) and ``prompt_keys`` (P,) int64, the same whenever a prompt comes back;
            (P, G) finite advantages.
        normalization_kwargs: the method's options, ``{"alpha": 0.5}`` for ``power``, ``{"decay": 0.9}`` for
            ``running_std``, ``adaptive`` and ``curvature``, and ``eps`` (default 1e-4, in units of reward). On a
            command line a JSON object.
        fused_loss: the loss and its gradients in one pass over the head (``grpo_kernels.linear_grpo_loss``), and
            log-probs from ``linear_logprob`` where the loss isn't a sum over single tokens. False: TRL's own head.
        skip_zero_advantage: sequences that can't contribute a gradient aren't run through the model, and the others go
            into few, evenly long micro-batches without needless padding; the gradient is the same. The log says once
            where it can't be done, and why. ``entropy`` is then logged of what runs, as ``entropy_live``.
        share_prompts: answers to one prompt run in one row with the prompt once and no padding, forward and backward:
            the same gradient, for less work. Where a model or an option doesn't allow it the log says so once. Steps
            that log interference run without.
        tokens_per_micro_batch: with ``share_prompts``, packed tokens (and a part of each copied prompt) of a
            micro-batch. None: as many as the largest micro-batch would hold without, padding included.
        resample_zero_variance: DAPO's dynamic sampling: where fewer than ``resample_live_prompts`` prompts of a batch
            (None: all) have answers with different rewards, other prompts are drawn and answered, at most
            ``resample_max_rounds`` times, and take the place of dead ones. ``reward`` and the like are then of all that
            was drawn; ``resampling/`` says how much that was.

        interference_every: optimizer steps between two that log how the prompts' gradients interfere, under
            ``interference/``, ``curvature/``, ``theory/`` and ``phase``, and keep a file of it in the run's folder
            (``trl_ext.read_interference``). 0: never.
        interference_dim: k, a sequence's gradient is sketched to k * k numbers (RMSE of a cosine 0.9 to 1.3 / k). 0:
            exact, which holds a gradient of the whole model for each sequence: for small models.
        interference_layers: patterns (``fnmatch``) of layer names; None: every trainable layer that can be tapped.
        interference_parts: also for each part of the model, under ``parts/``: attention and MLP by thirds of the depth,
            norms, embedding with head. A sketch for each, so that a logged step costs more.
        what_if: names in ``grpo_kernels.METHODS`` of which a logged step says what they would have made of it, under
            ``what_if/``; None: all that need no state (``power`` with alpha 0.5, unless it is the run's). []: none.
        what_if_dead: a logged step scores sequences of advantage 0 by a pass of their own, so that normalisations that
            give groups of equal rewards an advantage (``none``, ``global``, ...) can be told too. Training is the
            same; such a step takes about as long as if everything ran.
        stop_on: "critical" (or "warning"): a verdict of that level (``python -m trl_ext check`` has all of them) stops
            training with a checkpoint. None: it is said once, and training goes on.

    Raises:
        ValueError: at construction, before a model is loaded: unknown method (lists them) or option, alpha outside
            [0, 1], an invalid ``scale_rewards`` or ``multi_objective_aggregation``, a ``normalization`` that
            contradicts ``scale_rewards``, ``use_liger_kernel`` without a GPU.
    """

    _VALID_DICT_FIELDS: ClassVar = [*GRPOConfig._VALID_DICT_FIELDS, "normalization_kwargs"]

    def __post_init__(self) -> None:
        if isinstance(self.normalization_kwargs, str):
            try:
                self.normalization_kwargs = json.loads(self.normalization_kwargs)
            except ValueError as error:
                raise ValueError(
                    f"normalization_kwargs={self.normalization_kwargs!r} isn't a JSON object: {error}"
                ) from None
        self._choose_device()
        with rejoined_in_time():
            super().__post_init__()
        resolve_normalization(self)
        check_liger(self)
        for name in ("interference_every", "interference_dim"):
            self._check_whole(name, 0, "0 or more")
        self._check_whole("tokens_per_micro_batch", 1, "above 0, or None", optional=True)
        if self.tokens_per_micro_batch is not None and not self.share_prompts:
            raise ValueError(f"tokens_per_micro_batch={self.tokens_per_micro_batch!r} contradicts share_prompts=False")
        if self.stop_on not in (None, "critical", "warning"):
            raise ValueError(f"stop_on={self.stop_on!r} must be 'critical', 'warning' or None")
        self._check_what_if()
        self._check_resampling()

    def _check_whole(self, name: str, least: int, allowed: str, *, optional: bool = False) -> None:
        """A whole number of any kind (numpy's too), which is kept as an int."""
        value = getattr(self, name)
        if value is None and optional:
            return
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
            raise ValueError(f"{name}={value!r} must be a whole number, {allowed}")
        setattr(self, name, int(value))

    def _check_what_if(self) -> None:
        names = self.what_if
        if names is not None and (not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names)):
            raise ValueError(f"what_if={names!r} must be a list of names of normalisations, or None")
        for name in names or []:
            try:
                check_normalization(name, **({"alpha": 1.0} if name == "power" else {}))
            except ValueError as error:
                raise ValueError(f"what_if={names!r}: {error}") from None
            if METHODS[name].kind == "state":
                raise ValueError(f"what_if={names!r}: {name!r} depends on what earlier steps of its own run left")

    def _choose_device(self) -> None:
        """TRL's default is bf16 wherever it runs, and it stops where there is none; most CPUs only emulate it."""
        if not torch.accelerator.is_available():
            self.use_cpu = True  # else several processes would look for a GPU's backend
        on_cpu = self.use_cpu or parse_flag_from_env("ACCELERATE_USE_CPU")
        if vars(self)["bf16"] is None and (on_cpu or not is_torch_bf16_gpu_available()):
            self.bf16 = False

    def _check_resampling(self) -> None:
        for name in (
            "skip_zero_advantage",
            "resample_zero_variance",
            "share_prompts",
            "interference_parts",
            "what_if_dead",
        ):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False")
        self._check_whole("resample_max_rounds", 1, "1 or more")
        rounds, wanted = self.resample_max_rounds, self.resample_live_prompts
        if rounds != MOST_ROUNDS and not self.resample_zero_variance:
            raise ValueError(f"resample_max_rounds={rounds!r} contradicts resample_zero_variance=False")
        if wanted is not None:
            if not self.resample_zero_variance:
                raise ValueError(f"resample_live_prompts={wanted!r} contradicts resample_zero_variance=False")
            prompts = self.generation_batch_size // self.num_generations
            whole = isinstance(wanted, numbers.Integral) and not isinstance(wanted, bool)
            if not whole or not 1 <= wanted <= prompts:
                raise ValueError(
                    f"resample_live_prompts={wanted!r} must be between 1 and {prompts}, the prompts of a batch"
                )
        method, _ = resolve_normalization(self)
        if self.resample_zero_variance and isinstance(method, str) and not METHODS[method].zero_if_equal:
            raise ValueError(
                f"resample_zero_variance=True contradicts normalization={method!r}, "
                "under which answers of equal rewards have a gradient all the same"
            )

    def to_dict(self) -> dict[str, Any]:
        """As the parent's, for JSON: a function is its name."""
        return {name: function_name(value) if callable(value) else value for name, value in super().to_dict().items()}

    def __getstate__(self) -> dict[str, Any]:
        """For the ``training_args.bin`` of a checkpoint: a function that can't be pickled is its name."""
        state = dict(self.__dict__)
        try:
            pickle.dumps(self.normalization)
        except (pickle.PicklingError, AttributeError, TypeError):
            function: Any = self.normalization
            state["normalization"] = function_name(function)
        return state


def resolve_normalization(args: GRPOConfig) -> tuple[str | Callable[..., Any], dict[str, Any]]:
    """The method and its options that ``args`` ask for; a plain ``GRPOConfig`` gets what TRL would do."""
    trls = trl_method(args.scale_rewards, args.multi_objective_aggregation)
    method = getattr(args, "normalization", None)
    options = getattr(args, "normalization_kwargs", None) or {}
    if not isinstance(options, dict):
        raise ValueError(f"normalization_kwargs={options!r} must be a dictionary")
    if "method" in options:
        raise ValueError(f"normalization_kwargs={options!r}: the method goes into normalization, options here")
    if callable(method) and "eps" in options:
        raise ValueError(f"normalization_kwargs={options!r}: eps is for the named methods, not for a function")
    if method is None:
        method = trls
    elif args.scale_rewards != "group" and SCALE_REWARDS_METHOD[args.scale_rewards] != method:  # "group" is the default
        raise ValueError(
            f"normalization={method if isinstance(method, str) else function_name(method)!r} contradicts "
            f"scale_rewards={args.scale_rewards!r}, which is {SCALE_REWARDS_METHOD[args.scale_rewards]!r}: give one"
        )
    check_normalization(method, **options)
    return method, options


def trl_method(scale_rewards: str, aggregation: str) -> str:
    """The method that TRL's options amount to; ``ValueError`` for values that it doesn't know."""
    if scale_rewards not in SCALE_REWARDS_METHOD:
        raise ValueError(f"scale_rewards={scale_rewards!r} must be one of {', '.join(SCALE_REWARDS_METHOD)}")
    if aggregation not in ("sum_then_normalize", "normalize_then_sum"):
        raise ValueError(
            f"multi_objective_aggregation={aggregation!r} must be sum_then_normalize or normalize_then_sum"
        )
    # TRL ignores scale_rewards when each reward function is normalised by itself
    return "std" if aggregation == "normalize_then_sum" else SCALE_REWARDS_METHOD[scale_rewards]


def check_liger(args: Any) -> None:
    """Raises ``ValueError`` where Liger's kernels would run without a GPU: they patch the model's classes first, so
    that no later model of this process would run either."""
    if getattr(args, "use_liger_kernel", False) and (args.use_cpu or not torch.accelerator.is_available()):
        raise ValueError(
            "use_liger_kernel=True needs a GPU, and this run has none. This package's own head and loss "
            "(fused_loss=True) need less memory than Liger's and run on a CPU too"
        )


@dataclass(frozen=True)
class Options:
    """The options that this package adds, as they stand when a trainer is built."""

    fused_loss: bool
    skip_zero_advantage: bool
    share_prompts: bool
    tokens_per_micro_batch: int | None
    resample_zero_variance: bool
    resample_max_rounds: int
    resample_live_prompts: int | None
    interference_every: int
    interference_dim: int
    interference_layers: list[str] | None
    interference_parts: bool
    what_if: list[str] | None
    what_if_dead: bool
    stop_on: str | None
    normalization: Any
    normalization_kwargs: dict[str, Any] | None


def read_options(args: Any) -> Options:
    """Of ``args``; what they don't have, a plain ``GRPOConfig``, as ``CurvatureGRPOConfig`` has it by default."""
    defaults: dict[str, Any] = {one.name: one.default for one in fields(CurvatureGRPOConfig)}
    return Options(**{one.name: getattr(args, one.name, defaults[one.name]) for one in fields(Options)})
