"""The options that this project adds to TRL's: one declaration each, of type, default, rule and help.

``CurvatureGRPOConfig`` inherits them; ``check`` applies the rules; ``examples/math.py --help`` prints the help;
``describe`` makes the configuration's docstring and the table in the documentation. Imports neither torch nor TRL.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from textwrap import fill
from typing import Any

from grpo_kernels.normalize.methods import METHODS, check_normalization

DEFAULT_MAX_ROUNDS = 4  # of resampling, by default
# what TRL's scale_rewards does, by our name
SCALE_REWARDS_METHOD = {"group": "std", "batch": "batch_std", "none": "mean"}


@dataclass(frozen=True)
class Rule:
    """What a value must be. ``read`` returns the value as it is kept, or raises ``ValueError`` or ``TypeError``."""

    allowed: str
    read: Callable[[Any], Any]


def _refuse(*_: Any) -> Any:
    raise TypeError


def _flag(value: Any) -> bool:
    return value if isinstance(value, bool) else _refuse()


def _whole(least: int) -> Callable[[Any], int]:
    """Whole numbers of any kind (numpy's too), kept as an int."""

    def read(value: Any) -> int:
        whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        return int(value) if whole and int(value) >= least else _refuse()

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
ANY = Rule("", lambda value: value)  # checked together with others, in config.py


def at_least(least: int) -> Rule:
    """A whole number that isn't smaller."""
    return Rule(f"a whole number, {least} or more", _whole(least))


def optional_at_least(least: int) -> Rule:
    """The same, or None."""
    return Rule(f"a whole number, {least} or more, or None", _optional(_whole(least)))


class Help(str):
    """An option's line in ``--help``, with its rule, its ``text`` in the documentation, and its heading in both.

    A text of its own kind, since transformers hands all of a field's metadata to argparse, which knows ``help`` alone.
    """

    rule: Rule
    text: str
    group: str


def option(default: Any, rule: Rule, short: str, text: str, *, group: str) -> Any:
    """A field with its ``Help``."""
    line = Help(short)
    line.rule, line.text, line.group = rule, text, group
    return field(default=default, metadata={"help": line})


NORMALISATION, WORK = "Normalisation (default: as TRL's)", "Work"
INTERFERENCE, SAFEGUARDS = "Interference", "Safeguards"


@dataclass
class CurvatureOptions:
    """What ``CurvatureGRPOConfig`` has beyond TRL's ``GRPOConfig``."""

    normalization: str | None = option(
        None,
        ANY,
        f"{', '.join(METHODS)}.",
        "How a group's rewards become advantages: one of `grpo_kernels.METHODS`. None follows `scale_rewards` "
        '("group" is `std`, "batch" is `batch_std`, "none" is `mean`). From Python also a function '
        "`f(rewards_PG, context, **normalization_kwargs) -> advantages_PG`: rewards (P, G) of all ranks, NaN where "
        "unscorable; `context` has `lengths` (P, G) in tokens, `function_rewards` (P, G, F), `function_weights` (F,) "
        "and `prompt_keys` (P,) int64, the same whenever a prompt comes back; (P, G) finite advantages.",
        group=NORMALISATION,
    )
    normalization_kwargs: dict[str, Any] | str | None = option(
        None,
        ANY,
        "Its options as JSON: '{\"alpha\": 0.5}' for power.",
        'The method\'s options: `{"alpha": 0.5}` for `power`, `{"decay": 0.9}` for `running_std`, `adaptive` and '
        "`curvature`, and `eps` (default 1e-4, in units of reward). On a command line a JSON object.",
        group=NORMALISATION,
    )

    fused_loss: bool = option(
        True,
        FLAG,
        "Head, loss and gradients in one pass.",
        "The loss and its gradients in one pass over the head (`grpo_kernels.linear_grpo_loss`), and log-probs from "
        "`linear_logprob` where the loss isn't a sum over single tokens. False: TRL's own head.",
        group=WORK,
    )
    skip_zero_advantage: bool = option(
        True,
        FLAG,
        "Don't run what has no gradient.",
        "Sequences that can't contribute a gradient aren't run through the model, and the others go into few, evenly "
        "long micro-batches without needless padding; the gradient is the same. The log says once where it can't be "
        "done, and why. `entropy` is then logged of what runs, as `entropy_live`.",
        group=WORK,
    )
    share_prompts: bool = option(
        True,
        FLAG,
        "A prompt and its answers in one row.",
        "Answers to one prompt run in one row with the prompt once and no padding, forward and backward: the same "
        "gradient, for less work. Where a model or an option doesn't allow it the log says so once. Steps that log "
        "interference run without.",
        group=WORK,
    )
    tokens_per_micro_batch: int | None = option(
        None,
        optional_at_least(1),
        "With share_prompts; default: as many as without.",
        "With `share_prompts`, packed tokens (and a part of each copied prompt) of a micro-batch. None: as many as the "
        "largest micro-batch would hold without, padding included.",
        group=WORK,
    )
    resample_zero_variance: bool = option(
        False,
        FLAG,
        "Other prompts for those of equal rewards.",
        "DAPO's dynamic sampling: where fewer than `resample_live_prompts` prompts of a batch have answers with "
        "different rewards, other prompts are drawn and answered, at most `resample_max_rounds` times, and take the "
        "place of dead ones. `reward` and the like are then of all that was drawn; `resampling/` says how much.",
        group=WORK,
    )
    resample_max_rounds: int = option(
        DEFAULT_MAX_ROUNDS,
        at_least(1),
        "Generations for them in a step, at most.",
        "Generations of a step that draw other prompts, at most.",
        group=WORK,
    )
    resample_live_prompts: int | None = option(
        None,
        optional_at_least(1),
        "Prompts with unequal rewards; default: all.",
        "Prompts with different rewards that a batch shall have. None: all.",
        group=WORK,
    )

    interference_every: int = option(
        10,
        at_least(0),
        "Log interference each n-th step; 0: never.",
        "Optimizer steps between two that log how the prompts' gradients interfere, under `interference/`, "
        "`curvature/`, `theory/` and `phase`, and keep a file of it in the run's folder (`trl_ext.read_interference`). "
        "0: never.",
        group=INTERFERENCE,
    )
    interference_dim: int = option(
        64,
        at_least(0),
        "A gradient's sketch: n x n numbers; 0: exact.",
        "k: a sequence's gradient is sketched to k * k numbers (RMSE of a cosine 0.9 to 1.3 / k). 0: exact, which "
        "holds a gradient of the whole model for each sequence: for small models.",
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
        "Also by part of the model.",
        "Also for each part of the model, under `parts/`: attention and MLP by thirds of the depth, norms, embedding "
        "with head. A sketch for each, so that a logged step costs more.",
        group=INTERFERENCE,
    )
    what_if: list[str] | None = option(
        None,
        METHOD_NAMES,
        "Normalisations to compare with; default: all.",
        "Names in `grpo_kernels.METHODS`: a logged step says what they would have made of it, under `what_if/`. None: "
        "all that need no state (`power` with alpha 0.5, unless it is the run's). []: none.",
        group=INTERFERENCE,
    )
    what_if_dead: bool = option(
        False,
        FLAG,
        "Score what has no gradient for it too.",
        "A logged step scores sequences of advantage 0 in an extra pass, so that normalisations that give groups of "
        "equal rewards an advantage (`none`, `global`, ...) can be compared too. Training is the same; such a step "
        "takes about as long as if everything ran.",
        group=INTERFERENCE,
    )

    stop_on: str | None = option(
        None,
        LEVEL,
        "A verdict that ends a run: critical, or warning.",
        '"critical" (or "warning"): a verdict of that level (`python -m trl_ext check` lists all) stops training, with '
        "a checkpoint. None: it is logged once, and training goes on.",
        group=SAFEGUARDS,
    )


DECLARED: tuple[Field[Any], ...] = fields(CurvatureOptions)
# heading -> options below it, as --help and the documentation group them
GROUPS: dict[str, tuple[str, ...]] = {
    heading: tuple(one.name for one in DECLARED if one.metadata["help"].group == heading)
    for heading in (NORMALISATION, WORK, INTERFERENCE, SAFEGUARDS)
}


def check(options: CurvatureOptions) -> None:
    """Raises ``ValueError`` for a value that isn't what its option's rule allows; keeps it as the rule reads it."""
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
    for name in names or []:
        try:
            check_normalization(name, **({"alpha": 1.0} if name == "power" else {}))
        except ValueError as error:
            raise ValueError(f"what_if={names!r}: {error}") from None
        if METHODS[name].kind == "state":
            raise ValueError(f"what_if={names!r}: {name!r} depends on what earlier steps of its own run left")


def read_options(args: Any) -> CurvatureOptions:
    """The options of ``args`` as they are now; what a plain ``GRPOConfig`` doesn't have is its default."""
    now: dict[str, Any] = {one.name: getattr(args, one.name, one.default) for one in DECLARED}
    return CurvatureOptions(**now)


def describe() -> str:
    """The options for a docstring, as its ``Args``."""
    paragraphs = (f"{one.name}: {one.metadata['help'].text.replace('`', '``')}" for one in DECLARED)
    return "\n".join(fill(text, 120, initial_indent=8 * " ", subsequent_indent=12 * " ") for text in paragraphs)


def markdown() -> str:
    """The options as a table for the documentation."""
    lines = ["| option | default | must be | what it does |", "|---|---|---|---|"]
    for one in DECLARED:
        allowed = one.metadata["help"].rule.allowed or CurvatureOptions.__annotations__[one.name].replace("|", "or")
        lines.append(f"| `{one.name}` | `{one.default!r}` | {allowed} | {one.metadata['help'].text} |")
    return "\n".join(lines)
