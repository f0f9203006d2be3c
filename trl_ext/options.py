"""Declares each option that this project adds to TRL's once: type, default, rule and help.

``CurvatureGRPOConfig`` inherits the options. ``check`` applies the rules, ``examples/math.py --help`` prints the help,
``describe`` writes the configuration's docstring, and ``markdown`` the documentation's table. This file imports neither
torch nor TRL.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from textwrap import fill
from typing import Any

from grpo_kernels.normalize.methods import ALIASES, METHODS, canonical, check_normalization

DEFAULT_MAX_ROUNDS = 4  # of resampling
# value of TRL's scale_rewards -> our method that does the same
SCALE_REWARDS_METHOD = {"group": "std", "batch": "batch_std", "none": "mean"}


@dataclass(frozen=True)
class Rule:
    """What a value must be. ``read`` returns the value to store, or raises ``ValueError`` or ``TypeError``."""

    allowed: str
    read: Callable[[Any], Any]


def _refuse(*_: Any) -> Any:
    raise TypeError


def _flag(value: Any) -> bool:
    return value if isinstance(value, bool) else _refuse()


def _integer(least: int) -> Callable[[Any], int]:
    """Returns a reader of integers of any type (also numpy's), which it stores as int."""

    def read(value: Any) -> int:
        integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        return int(value) if integer and int(value) >= least else _refuse()

    return read


def _texts(value: Any) -> list[str]:
    fits = isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)
    return list(value) if fits else _refuse()


def _one_of(*values: Any) -> Callable[[Any], Any]:
    return lambda value: value if value in values else _refuse()


def _optional(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else read(value)


FLAG = Rule("True or False", _flag)
LAYERS = Rule("a list of patterns of layer names, or None", _optional(_texts))
METHOD_NAMES = Rule("a list of names of normalisations, or None", _optional(_texts))
LEVEL = Rule("'critical', 'warning' or None", _one_of(None, "critical", "warning"))
ANY = Rule("", lambda value: value)  # config.py checks these options


def at_least(least: int) -> Rule:
    """Returns the rule for an integer of at least ``least``."""
    return Rule(f"a whole number, {least} or more", _integer(least))


def optional_at_least(least: int) -> Rule:
    """Returns the rule for None, or an integer of at least ``least``."""
    return Rule(f"a whole number, {least} or more, or None", _optional(_integer(least)))


class Help(str):
    """An option's line in ``--help``, with its rule, its ``text`` in the documentation, and its heading in both.

    It is a subclass of str because transformers passes a field's metadata to argparse, which only accepts ``help``.
    """

    rule: Rule
    text: str
    group: str


def option(default: Any, rule: Rule, short: str, text: str, *, group: str) -> Any:
    """Returns a dataclass field with its ``Help``."""
    line = Help(short)
    line.rule, line.text, line.group = rule, text, group
    return field(default=default, metadata={"help": line})


NORMALISATION, WORK = "Normalisation (default: as TRL's)", "Work"
INTERFERENCE, SAFEGUARDS = "Interference", "Safeguards"


@dataclass
class CurvatureOptions:
    """The options that ``CurvatureGRPOConfig`` adds to TRL's ``GRPOConfig``."""

    normalization: str | None = option(
        None,
        ANY,
        f"std, mean, none, loo, max_rl, batch_std and {len(METHODS) - 6} more: docs/normalizations.md.",
        "How a group's rewards become advantages: one of `grpo_kernels.METHODS`, or another name of one "
        f"({', '.join(f'`{alias}`: `{name}`' for alias, name in ALIASES.items())}). None follows `scale_rewards` "
        '("group" is `std`, "batch" is `batch_std`, "none" is `mean`). In Python it may be a function '
        "`f(rewards_PG, context, **normalization_kwargs) -> advantages_PG`. It gets the rewards (P, G) of all ranks, "
        "NaN where unscorable, and returns finite advantages (P, G). `context` has `lengths` (P, G) in tokens, "
        "`function_rewards` (P, G, F), `function_weights` (F,), and `prompt_keys` (P,) int64, equal for equal prompts.",
        group=NORMALISATION,
    )
    normalization_kwargs: dict[str, Any] | str | None = option(
        None,
        ANY,
        "Its options as JSON: '{\"alpha\": 0.5}' for power.",
        'The method\'s options: `{"alpha": 0.5}` for `power`, `{"decay": 0.9}` for `running_std` and `curvature`, '
        '`{"decay": 0.95}` for `rae`, `{"k": 4}` for `pass_at_k` and `max_at_k`, `{"window": 10}` (batches) for '
        "`ha_dw`. For every named method: `eps` (default 1e-4, in units of reward); `clip` limits absolute advantages; "
        "rewards of a prompt that differ by at most `tolerance` count as equal; `keep_variance`, a share, leaves "
        "advantages only to the fewest prompts that hold it of the summed reward variance. A JSON object on a command "
        "line.",
        group=NORMALISATION,
    )

    fused_loss: bool = option(
        True,
        FLAG,
        "Head, loss and gradients in one pass.",
        "Computes the loss and its gradients in one pass over the head (`grpo_kernels.linear_grpo_loss`). If the loss "
        "isn't a sum over single tokens, it computes log-probs by `linear_logprob`. False: TRL's own head.",
        group=WORK,
    )
    skip_zero_advantage: bool = option(
        True,
        FLAG,
        "Don't run sequences without a gradient.",
        "Doesn't run sequences that can't contribute a gradient, and puts the others into few micro-batches of similar "
        "lengths without needless padding. The gradient is the same. If that isn't possible, the log says why, once. "
        "`entropy_live` replaces `entropy`: the entropy of the sequences that run.",
        group=WORK,
    )
    share_prompts: bool = option(
        True,
        FLAG,
        "Run a prompt once for all its answers.",
        "Runs the answers to a prompt in one row with the prompt once and no padding, in forward and backward. The "
        "gradient is the same. If a model or an option doesn't allow it, the log says why, once. Steps that log "
        "interference don't share prompts.",
        group=WORK,
    )
    tokens_per_micro_batch: int | None = option(
        None,
        optional_at_least(1),
        "With share_prompts; default: what fits into a GPU.",
        "With `share_prompts`, the most packed tokens (with a part of each copied prompt) of a micro-batch. None: what "
        "fits into 80 % of the GPU's free memory, measured once before the first step by a rehearsal at two sizes; "
        "on a CPU, under FSDP and with DeepSpeed, as many as the largest micro-batch without sharing has, padding "
        "included. One process that runs out of memory repeats the step at half the size, and stays at it. Checkpoints "
        "keep the size.",
        group=WORK,
    )
    checkpoint_layers: int | None = option(
        None,
        optional_at_least(0),
        "Decoder layers to checkpoint; default: all.",
        "With `gradient_checkpointing`, only the first n decoder layers are checkpointed. The others keep their "
        "activations, which takes memory and saves their second forward pass. None: all are checkpointed.",
        group=WORK,
    )
    compile_layers: bool = option(
        False,
        FLAG,
        "Compile the decoder layers.",
        "Compiles each decoder layer for training forwards. `torch_compile=True` and accelerate's `--dynamo_backend` "
        "do the same here; the model isn't compiled as a whole. `torch_compile_backend` and `torch_compile_mode` say "
        "how. Packed rows are padded to few sizes. Steps that log interference run uncompiled. If layers can't be "
        "compiled, the log says why, once.",
        group=WORK,
    )
    resample_zero_variance: bool = option(
        False,
        FLAG,
        "Replace prompts of equal rewards.",
        "DAPO's dynamic sampling: if fewer than `resample_live_prompts` prompts of a batch have answers with different "
        "rewards, the trainer draws and answers other prompts, at most `resample_max_rounds` times, and replaces the "
        "dead ones. `reward` and similar metrics then include all drawn prompts; `resampling/` counts them. At equal "
        "numbers of generated answers it isn't shown to help (docs/dead-groups.md).",
        group=WORK,
    )
    resample_max_rounds: int = option(
        DEFAULT_MAX_ROUNDS,
        at_least(1),
        "Most extra generations per step.",
        "The most generations of a step that draw other prompts.",
        group=WORK,
    )
    resample_live_prompts: int | None = option(
        None,
        optional_at_least(1),
        "Wanted prompts with unequal rewards; default: all.",
        "How many prompts of a batch should have answers with different rewards. None: all.",
        group=WORK,
    )

    interference_every: int = option(
        10,
        at_least(0),
        "Log interference each n-th step; 0: never.",
        "Every this many optimizer steps the trainer logs how the prompts' gradients interfere, under `interference/`, "
        "`curvature/`, `theory/` and `phase`, and writes a file to the run's folder (`trl_ext.read_interference`). "
        "0: never.",
        group=INTERFERENCE,
    )
    interference_dim: int = option(
        64,
        at_least(0),
        "A gradient's sketch: n x n numbers; 0: exact.",
        "k: a sequence's gradient is sketched to k * k numbers (RMSE of a cosine 0.9 to 1.3 / k). 0: exact gradients, "
        "one of the model's size per sequence, for small models.",
        group=INTERFERENCE,
    )
    interference_layers: list[str] | None = option(
        None,
        LAYERS,
        "Patterns of layer names; default: all trained.",
        "Patterns (`fnmatch`) of layer names. None: every trainable layer that can be tapped.",
        group=INTERFERENCE,
    )
    interference_parts: bool = option(
        False,
        FLAG,
        "Log interference by part of the model too.",
        "Logs interference also for each part of the model, under `parts/`: attention and MLP by thirds of the depth, "
        "norms, embedding with head. Each part has a sketch, so a logged step takes longer.",
        group=INTERFERENCE,
    )
    what_if: list[str] | None = option(
        None,
        METHOD_NAMES,
        "Normalisations to compare with; default: all.",
        "Names in `grpo_kernels.METHODS`. A logged step is compared with the steps of these normalisations, under "
        "`what_if/`. None: all that need no state (`power` with alpha 0.5, unless the run sets it). []: none.",
        group=INTERFERENCE,
    )
    what_if_dead: bool = option(
        False,
        FLAG,
        "Score advantages of 0 for what_if too.",
        "A logged step scores sequences of advantage 0 in an extra pass. Then `what_if` can also compare "
        "normalisations that give groups of equal rewards an advantage (`none`, `global`, ...). Training is the same; "
        "such a step takes about as long as without `skip_zero_advantage`.",
        group=INTERFERENCE,
    )

    stop_on: str | None = option(
        None,
        LEVEL,
        "A verdict that ends a run: critical or warning.",
        '"critical" (or "warning"): a verdict of that level (`python -m trl_ext check` lists all) saves a checkpoint '
        "and stops training. None: verdicts are logged once, and training continues.",
        group=SAFEGUARDS,
    )


DECLARED: tuple[Field[Any], ...] = fields(CurvatureOptions)
# heading -> options below it, as --help and the documentation group them
GROUPS: dict[str, tuple[str, ...]] = {
    heading: tuple(one.name for one in DECLARED if one.metadata["help"].group == heading)
    for heading in (NORMALISATION, WORK, INTERFERENCE, SAFEGUARDS)
}


def check(options: CurvatureOptions) -> None:
    """Raises ``ValueError`` for a value that its option's rule doesn't allow; else stores it as the rule reads it."""
    for one in DECLARED:
        value, rule = getattr(options, one.name), one.metadata["help"].rule
        try:
            setattr(options, one.name, rule.read(value))
        except (TypeError, ValueError):
            raise ValueError(f"{one.name}={value!r} must be {rule.allowed}") from None
    _check_what_if(options.what_if)
    if options.tokens_per_micro_batch is not None and not options.share_prompts:
        raise ValueError(f"tokens_per_micro_batch={options.tokens_per_micro_batch!r} contradicts share_prompts=False")
    for name, default in (("resample_max_rounds", DEFAULT_MAX_ROUNDS), ("resample_live_prompts", None)):
        value = getattr(options, name)
        if value != default and not options.resample_zero_variance:
            raise ValueError(f"{name}={value!r} contradicts resample_zero_variance=False")


def _check_what_if(names: list[str] | None) -> None:
    for name in map(canonical, names or []):
        try:
            check_normalization(name, **({"alpha": 1.0} if name == "power" else {}))
        except ValueError as error:
            raise ValueError(f"what_if={names!r}: {error}") from None
        if METHODS[name].kind == "state":
            raise ValueError(f"what_if={names!r}: {name!r} needs a state from earlier steps")


def read_options(args: Any) -> CurvatureOptions:
    """Returns the current options of ``args``; those that a plain ``GRPOConfig`` lacks have their default."""
    now: dict[str, Any] = {one.name: getattr(args, one.name, one.default) for one in DECLARED}
    return CurvatureOptions(**now)


def describe() -> str:
    """Returns the options as the ``Args`` of a docstring."""
    paragraphs = (f"{one.name}: {one.metadata['help'].text.replace('`', '``')}" for one in DECLARED)
    return "\n".join(fill(text, 120, initial_indent=8 * " ", subsequent_indent=12 * " ") for text in paragraphs)


def markdown() -> str:
    """Returns the options as a table for the documentation."""
    lines = ["| option | default | must be | what it does |", "|---|---|---|---|"]
    for one in DECLARED:
        allowed = one.metadata["help"].rule.allowed or CurvatureOptions.__annotations__[one.name].replace("|", "or")
        lines.append(f"| `{one.name}` | `{one.default!r}` | {allowed} | {one.metadata['help'].text} |")
    return "\n".join(lines)
