"""Checks options, datasets and the length of prompts before a run's first step."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType

from .advantages.resampling import check_dataset, has_transform
from .compat import arguments_after
from .config import CurvatureGRPOConfig, check_liger, resolve_normalization
from .elastic_restart import OWN_STORE, lacks_own_store
from .options import read_options

logger = get_logger(__name__)
MAX_ROWS = 1000  # rows of a dataset that are checked before the run
# The most tokens that a chat template is expected to add. A text has at most as many tokens as bytes, so a short prompt
# needn't be tokenized.
TEMPLATE_TOKENS = 256


def check_before_model(args: Any, positional: Sequence[Any], named: Mapping[str, Any]) -> None:
    """Raises ``ValueError`` for contradicting options and unusable datasets, before a model is loaded.

    It reads the first ``MAX_ROWS`` rows of a dataset's stored columns. It calls no transform and draws no random
    number. ``check_batch`` checks later rows when they are drawn.

    Args:
        positional, named: the trainer's arguments after ``args``.
    """
    options = args or CurvatureGRPOConfig
    resolve_normalization(options)
    check_liger(options)
    given = {**dict(zip(arguments_after("args"), positional, strict=False)), **named}
    train, held_out = given.get("train_dataset"), given.get("eval_dataset")
    prompt_needed = given.get("environment_factory") is None  # an environment makes prompts of its own
    texts = given.get("rollout_func") is None  # a rollout_func may take prompts that aren't text
    _check_prompts(train, "train_dataset", prompt_needed, texts)
    for name, part in held_out.items() if isinstance(held_out, dict) else [("", held_out)]:
        _check_prompts(part, f"eval_dataset[{name!r}]" if name else "eval_dataset", prompt_needed, texts)
    if args is not None:
        _check_rows(train, args)
    if read_options(args).resample_zero_variance:
        check_dataset(train)


def refuse_tensor_parallelism(model: Any, args: Any) -> None:
    """Raises ``ValueError`` if tensor parallelism is on, by environment, option or model. ``model`` may be a name."""
    by_environment = os.environ.get("PARALLELISM_CONFIG_TP_SIZE")  # accelerate launch's
    by_option = getattr(getattr(args, "parallelism_config", None), "tp_size", None)
    size = max(int(number or 1) for number in (by_environment, by_option, getattr(model, "tp_size", None)))
    if size > 1:
        raise ValueError(
            f"tensor parallelism (tp_size={size}) isn't supported: each process has a part of every layer, and the "
            "loss and the sketches would be summed as if it had part of the batch. Use FSDP2 or DeepSpeed to split a "
            "model over GPUs (docs/engines.md)"
        )


def warn_about_engine(args: Any, accelerator: Accelerator, log_once: Callable[[str], None]) -> None:
    """Warns if FSDP is requested but doesn't run, and if restarted ranks may not find each other."""
    if lacks_own_store() and accelerator.num_processes > 1:
        log_once(
            f"torchrun may restart this run, and restarted processes may not find each other: set {OWN_STORE}=1 for "
            "torchrun (docs/engines.md)."
        )
    fsdp = args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if fsdp and accelerator.distributed_type != DistributedType.FSDP:
        log_once(
            f"FSDP is requested, but {accelerator.distributed_type.value} runs: accelerate supports FSDP only on GPUs, "
            "with several processes. Every rank holds the full model."
        )


def warn_about_truncated_sampling(args: Any, log_once: Callable[[str], None]) -> None:
    """Warns if truncated sampling (top-p, top-k, min-p) biases vLLM's importance sampling correction."""
    if not (args.use_vllm and args.vllm_importance_sampling_correction):
        return
    given = {**{name: getattr(args, name) for name in ("top_p", "top_k", "min_p")}, **(args.generation_kwargs or {})}
    cuts = {"top_p": (given["top_p"] or 1) < 1, "top_k": (given["top_k"] or 0) > 0, "min_p": (given["min_p"] or 0) > 0}
    named = ", ".join(f"{name}={given[name]}" for name, truncates in cuts.items() if truncates)
    if named:
        log_once(
            f"{named}: vLLM samples from a truncated distribution, but its importance ratio uses the trainer's full "
            "distribution. The ratio is biased: its mean is below 1 by the truncated share, and it can't correct for "
            "tokens that are never sampled. Set top_p=1.0, top_k=0 and min_p=None, or "
            "vllm_importance_sampling_correction=False (TRL issue 6789)."
        )


def _check_prompts(dataset: Any, name: str, needed: bool, check_numbers: bool = True) -> None:
    columns = getattr(dataset, "column_names", None)
    # no dataset, or one whose columns are known only from its rows: a stream, or a dataset with a transform
    if not isinstance(columns, list) or has_transform(dataset):
        return
    if "prompt" not in columns:
        if not needed:
            return
        raise ValueError(
            f"{name} has no column 'prompt', only {', '.join(map(repr, columns)) or 'none at all'}: "
            "rename one, as in dataset.rename_column('question', 'prompt')"
        )
    if check_numbers:
        for row, prompt in enumerate(_stored_prompts(dataset)):
            _check_prompt(prompt, f"{name}: the prompt of row {row}")


def _check_prompt(prompt: Any, what: str) -> None:
    if isinstance(prompt, int | float):
        raise ValueError(f"{what} is {prompt!r}, neither a text nor a list of messages")
    _refuse_empty(prompt, what)


def _refuse_empty(prompt: Any, what: str) -> None:
    """Raises ``ValueError`` for None and an empty list of messages, at which TRL fails; an empty text is allowed."""
    if prompt is None or (isinstance(prompt, list) and not prompt):
        raise ValueError(f"{what} is empty ({prompt!r}); nothing can be generated from it")


def _stored_prompts(dataset: Any, most: int | None = MAX_ROWS) -> Iterator[Any]:
    """Yields the first ``most`` stored prompts (None: all). A stream or a dataset with a transform yields none."""
    stored = hasattr(dataset, "__len__") and hasattr(dataset, "with_format") and not has_transform(dataset)
    if not stored or "prompt" not in dataset.column_names:
        return
    plain = dataset.with_format(None).select_columns(["prompt"])
    for rows in plain.select(range(min(len(plain), len(plain) if most is None else most))).iter(1000):
        yield from rows["prompt"]


def _check_rows(dataset: Any, args: Any) -> None:
    """Raises ``ValueError`` if the dataset has fewer rows than a batch has prompts: TRL would then train no step."""
    if dataset is None or not hasattr(dataset, "__len__"):
        return
    prompts = args.generation_batch_size // args.num_generations
    if len(dataset) < prompts:
        raise ValueError(
            f"train_dataset has {len(dataset)} rows, and a generation takes {prompts} different prompts "
            f"(generation_batch_size={args.generation_batch_size} / num_generations={args.num_generations}): "
            "no step would be trained. More rows, or a smaller batch"
        )


@dataclass(frozen=True)
class Context:
    """The model's context, which a prompt and its completion must fit into.

    Attributes:
        size: the context in tokens.
        answer: the maximum length of a completion in tokens.
        processing_class: the tokenizer or processor.
        fails_beyond: True if position embeddings are a table of ``size`` rows, so that the model can't run beyond it;
            a model with rotary positions can.
    """

    size: int
    answer: int
    processing_class: Any
    fails_beyond: bool
    log_once: Callable[..., None]

    def check(self, prompts: Iterable[Any], what: Callable[[int], str]) -> None:
        """Checks that prompts and their completions fit into the context; warns once if one doesn't.

        ``what(number)`` names a prompt in messages.

        Raises:
            ValueError: a prompt alone fills the context, and the model can't run beyond it.
        """
        beyond: list[tuple[int, int]] = []
        for number, prompt in enumerate(prompts):
            if _bytes(prompt) + TEMPLATE_TOKENS + self.answer <= self.size:
                continue
            length = _tokens(prompt, self.processing_class)
            if length is None or length + self.answer <= self.size:
                continue
            if length >= self.size and self.fails_beyond:
                raise ValueError(
                    f"{what(number)} has {length} tokens, and the model's context (max_position_embeddings) is "
                    f"{self.size}: no room for an answer. Leave such rows out (dataset.filter), or take a model with a "
                    "longer context"
                )
            beyond.append((length, number))
        if beyond:
            length, number = max(beyond)
            room = "no room for an answer" if length >= self.size else "an answer may go beyond it"
            self.log_once(
                f"{what(number)} has {length} tokens, and the model's context (max_position_embeddings) is "
                f"{self.size}: {room} (max_completion_length={self.answer}; {len(beyond)} such prompts were seen). "
                "The model wasn't trained for what comes after."
            )


def read_context(processing_class: Any, model: Any, args: Any, log_once: Callable[..., None]) -> Context | None:
    """Reads the model's context; None if its configuration has none."""
    size = context_of(model.config)
    if size is None:
        return None
    rotary = any("rotary" in type(module).__name__.lower() for module in model.modules())
    return Context(size, args.max_completion_length or 0, processing_class, not rotary, log_once)


def check_stored_context(dataset: Any, context: Context | None) -> None:
    """Checks that the first ``MAX_ROWS`` stored prompts fit into the context."""
    if context is not None:
        context.check(_stored_prompts(dataset), lambda row: f"The prompt of row {row} of train_dataset")


def check_batch(prompts: Sequence[Any], context: Context | None, log_once: Callable[..., None]) -> None:
    """Checks the prompts of a batch before completions are generated: not empty, and within the context."""

    def what(number: int) -> str:
        return f"The prompt {str(prompts[number])[:200]!r} of this batch"

    for number, prompt in enumerate(prompts):
        _refuse_empty(prompt, what(number))
    if "" in prompts:
        log_once("A prompt of a batch is an empty text: its answers are made from nothing.")
    if context is not None:
        context.check(prompts, what)


def context_of(config: Any) -> int | None:
    """Returns the context of a model's configuration in tokens, or None."""
    context = getattr(getattr(config, "get_text_config", lambda: config)(), "max_position_embeddings", None)
    return context if isinstance(context, int) and context > 0 else None


def rows_within(dataset: Any, processing_class: Any, context: int | None) -> list[int]:
    """Returns the indices of the rows whose prompts leave room for a completion in a context of ``context`` tokens."""
    kept = []
    for row, prompt in enumerate(_stored_prompts(dataset, most=None)):
        if context is not None and _bytes(prompt) + TEMPLATE_TOKENS > context:
            length = _tokens(prompt, processing_class)
            if length is not None and length >= context:
                continue
        kept.append(row)
    return kept


def _bytes(prompt: Any) -> int:
    """Returns an upper bound of the prompt's number of tokens."""
    if isinstance(prompt, str):
        return len(prompt.encode(errors="replace"))
    return sum(len(str(message).encode(errors="replace")) for message in prompt)


def _tokens(prompt: Any, processing_class: Any) -> int | None:
    """Returns the prompt's number of tokens; None if it can't be tokenized here (images, tools)."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    try:
        if isinstance(prompt, str):
            return len(tokenizer(text=prompt, verbose=False)["input_ids"])
        text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        return len(tokenizer(text=text, add_special_tokens=False, verbose=False)["input_ids"])
    except Exception as error:
        logger.debug(f"The length of a prompt isn't known: {type(error).__name__}: {error}")
        return None
