"""Reads what a user wants to compare from the command line: ``--normalization`` and ``--vary``."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

from .study import Variant


def parse_normalization(text: str) -> dict[str, Any]:
    """Returns the options of ``power:alpha=0.5,eps=1e-4``. Raises ``ValueError`` for another form or an unknown one."""
    from grpo_kernels.normalize.methods import canonical, check_normalization

    name, _, listed = text.partition(":")
    numbers: dict[str, float] = {}
    for item in filter(None, listed.split(",")):
        key, _, value = item.partition("=")
        try:
            numbers[key] = int(value) if value.isdigit() else float(value)
        except ValueError:
            raise ValueError(f"--normalization {text}: {item!r} isn't option=number, as in power:alpha=0.5") from None
    try:
        check_normalization(name, **numbers)
    except ValueError as error:
        raise ValueError(f"--normalization {text}: {error}") from None
    return {"normalization": canonical(name), "normalization_kwargs": numbers}


def parse_vary(text: str) -> list[Variant]:
    """Returns a variant for each value of ``beta=0,0.01``, read as ``CurvatureGRPOConfig``'s command line reads it."""
    name, equals, listed = text.partition("=")
    values = [value for value in listed.split(",") if value]
    if not equals or len(values) < 1:
        raise ValueError(f"--vary {text!r} must be option=value,value")
    return [Variant(f"{name}={value}", {name: parse_value(name, value)}) for value in values]


def parse_value(name: str, text: str) -> Any:
    """Returns an option's value, of the type that the option has. Raises ``ValueError`` for an unknown option."""
    from transformers import HfArgumentParser

    from trl_ext import CurvatureGRPOConfig

    class Parser(HfArgumentParser):
        def error(self, message: str) -> Any:
            raise ValueError(f"--vary {name}={text}: {message}")

    if name not in CurvatureGRPOConfig.__dataclass_fields__:
        raise ValueError(f"--vary {name}={text}: CurvatureGRPOConfig has no option {name!r}")
    if name in ("learning_rate", "seed", "output_dir"):
        raise ValueError(
            f"--vary {name}={text}: each run gets its own {name} from the tool (--rates, --seeds, --output_dir)"
        )
    field = CurvatureGRPOConfig.__dataclass_fields__[name]
    if text == "None" and ("None" in str(field.type) or field.default is None):
        return None
    # parsed alone: other checks of the config depend on options that the script sets
    parser = Parser((CurvatureGRPOConfig,))
    return getattr(parser.parse_known_args([f"--{name}={text}"])[0], name)


def make_variants(normalizations: Sequence[str], vary: Sequence[str]) -> list[Variant]:
    """Returns every combination. Raises ``ValueError`` for fewer than two, or one that is given twice."""
    axes: list[list[Variant]] = []
    if normalizations:
        axes.append([Variant(text, parse_normalization(text)) for text in normalizations])
    axes += [parse_vary(text) for text in vary]
    variants = [combined(parts) for parts in product(*axes)]
    same = [[one.name for one in variants if one.options == other.options] for other in variants]
    if twice := next((names for names in same if len(names) > 1), None):
        raise ValueError(f"{' and '.join(dict.fromkeys(twice))}: given twice")
    if len(variants) < 2:
        raise ValueError("nothing to compare: give two values of --normalization or --vary, or more")
    return variants


def combined(parts: Sequence[Variant]) -> Variant:
    """Returns the variant that sets all these options."""
    options: dict[str, Any] = {}
    for part in parts:
        options.update(part.options)
    return Variant(", ".join(part.name for part in parts), options)


def normalizations_of(variants: Sequence[Variant]) -> dict[str, str]:
    """Returns variant -> normalisation of those that are a normalisation without options, as predictions need."""
    return {
        one.name: str(one.options["normalization"])
        for one in variants
        if set(one.options) == {"normalization", "normalization_kwargs"} and not one.options["normalization_kwargs"]
    }
