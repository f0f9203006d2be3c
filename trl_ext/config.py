"""Defines ``CurvatureGRPOConfig``: TRL's options and ours."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from accelerate.utils import parse_flag_from_env
from transformers.utils import is_torch_bf16_gpu_available
from trl import GRPOConfig

from grpo_kernels.normalize.methods import METHODS, canonical, check_normalization, function_name

from .elastic_restart import rendezvous_deadline
from .options import SCALE_REWARDS_METHOD, CurvatureOptions, check, describe


@dataclass
class CurvatureGRPOConfig(CurvatureOptions, GRPOConfig):
    __doc__ = f"""``GRPOConfig`` plus the options below; everything else means what it means in TRL.

    Two defaults differ, so that one script runs on every machine. Without an accelerator (or with ``use_cpu``),
    ``use_cpu`` is True and ``bf16`` is False. On a GPU without bf16, ``bf16`` is False. Values that you set are kept.

    Args:
{describe()}

    Raises:
        ValueError: at construction, before a model is loaded, for an unknown method or option, a value that an option
            doesn't allow, an invalid ``scale_rewards`` or ``multi_objective_aggregation``, options that contradict
            each other, and ``use_liger_kernel`` without a GPU.
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
        with rendezvous_deadline():
            super().__post_init__()
        resolve_normalization(self)
        self.normalization = canonical(self.normalization)  # so that logs and files hold one name
        check_liger(self)
        check(self)
        self._check_resampling()
        if self.checkpoint_layers is not None and not self.gradient_checkpointing:
            raise ValueError(f"checkpoint_layers={self.checkpoint_layers!r} contradicts gradient_checkpointing=False")

    def _choose_device(self) -> None:
        """Sets ``use_cpu`` and ``bf16`` for this machine.

        TRL's default is bf16 on every device; it fails on a GPU without bf16, and most CPUs only emulate it.
        """
        if not torch.accelerator.is_available():
            self.use_cpu = True  # otherwise several processes would look for a GPU's communication backend
        on_cpu = self.use_cpu or parse_flag_from_env("ACCELERATE_USE_CPU")
        if vars(self)["bf16"] is None and (on_cpu or not is_torch_bf16_gpu_available()):
            self.bf16 = False

    def _check_resampling(self) -> None:
        """Raises ``ValueError`` for resampling options that contradict TRL's options or the normalisation."""
        wanted, prompts = self.resample_live_prompts, self.generation_batch_size // self.num_generations
        if wanted is not None and wanted > prompts:
            raise ValueError(f"resample_live_prompts={wanted} must be between 1 and {prompts}, the prompts of a batch")
        method, _ = resolve_normalization(self)
        if self.resample_zero_variance and isinstance(method, str) and not METHODS[method].zero_if_equal:
            raise ValueError(
                f"resample_zero_variance=True contradicts normalization={method!r}, "
                "under which answers of equal rewards have a gradient all the same"
            )

    def to_dict(self) -> dict[str, Any]:
        """Returns the options for JSON, with the name of a function in its place."""
        return {name: function_name(value) if callable(value) else value for name, value in super().to_dict().items()}

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state for a checkpoint's ``training_args.bin``; a function that can't be pickled is its name."""
        state = dict(self.__dict__)
        try:
            pickle.dumps(self.normalization)
        except (pickle.PicklingError, AttributeError, TypeError):
            function: Any = self.normalization
            state["normalization"] = function_name(function)
        return state


def resolve_normalization(args: GRPOConfig) -> tuple[str | Callable[..., Any], Mapping[str, Any]]:
    """Returns the normalisation that ``args`` select, and its options; a plain ``GRPOConfig`` selects TRL's own.

    Raises:
        ValueError: the method or an option is invalid, or contradicts ``scale_rewards``.
    """
    method_of_trl = trl_method(args.scale_rewards, args.multi_objective_aggregation)
    method = canonical(getattr(args, "normalization", None))
    options = getattr(args, "normalization_kwargs", None) or {}
    if not isinstance(options, dict):
        raise ValueError(f"normalization_kwargs={options!r} must be a dictionary")
    if "method" in options:
        raise ValueError(f"normalization_kwargs={options!r}: the method goes into normalization, options here")
    if callable(method) and "eps" in options:
        raise ValueError(f"normalization_kwargs={options!r}: eps is for the named methods, not for a function")
    if method is None:
        method = method_of_trl
    elif args.scale_rewards != "group" and SCALE_REWARDS_METHOD[args.scale_rewards] != method:  # "group" is the default
        raise ValueError(
            f"normalization={method if isinstance(method, str) else function_name(method)!r} contradicts "
            f"scale_rewards={args.scale_rewards!r}, which is {SCALE_REWARDS_METHOD[args.scale_rewards]!r}: give one"
        )
    check_normalization(method, **options)
    return method, options


def trl_method(scale_rewards: str, aggregation: str) -> str:
    """Returns the name of our method that equals TRL's for these options. Raises ``ValueError`` for unknown values."""
    if scale_rewards not in SCALE_REWARDS_METHOD:
        raise ValueError(f"scale_rewards={scale_rewards!r} must be one of {', '.join(SCALE_REWARDS_METHOD)}")
    if aggregation not in ("sum_then_normalize", "normalize_then_sum"):
        raise ValueError(
            f"multi_objective_aggregation={aggregation!r} must be sum_then_normalize or normalize_then_sum"
        )
    # TRL ignores scale_rewards when each reward function is normalised by itself
    return "std" if aggregation == "normalize_then_sum" else SCALE_REWARDS_METHOD[scale_rewards]


def check_liger(args: Any) -> None:
    """Raises ``ValueError`` if Liger's kernels would run without a GPU.

    Liger patches the model's classes before it fails, so no later model of this process would run either.
    """
    if getattr(args, "use_liger_kernel", False) and (args.use_cpu or not torch.accelerator.is_available()):
        raise ValueError(
            "use_liger_kernel=True needs a GPU, and this run has none. This package's own head and loss "
            "(fused_loss=True) need less memory than Liger's and run on a CPU too"
        )
