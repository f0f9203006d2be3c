"""Options have one declaration: what it refuses, and what is made of it."""

import pytest
from trl import GRPOConfig

from trl_ext import CurvatureGRPOConfig, options


def config(**given):
    return CurvatureGRPOConfig("nowhere", report_to="none", **given)


WRONG = [
    *((name, "no") for name in options.GROUPS[options.WORK][:3]),
    ("fused_loss", 1),
    ("tokens_per_micro_batch", 0),
    ("tokens_per_micro_batch", True),
    ("checkpoint_layers", -1),
    ("checkpoint_layers", "all"),
    ("compile_layers", 1),
    ("resample_zero_variance", None),
    ("resample_max_rounds", 0),
    ("resample_live_prompts", 1.5),
    ("interference_every", -1),
    ("interference_dim", "64"),
    ("interference_layers", 5),
    ("interference_layers", "*.mlp.*"),
    ("interference_parts", "true"),
    ("what_if", "std"),
    ("what_if", [1]),
    ("what_if_dead", 0),
    ("stop_on", "error"),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_value_that_its_option_does_not_allow_is_refused_with_what_is_allowed(name, value):
    with pytest.raises(ValueError, match=rf"^{name}={value!r} must be ".replace("[", r"\[").replace("*", r"\*")):
        config(**{name: value})


def test_every_option_has_a_rule_that_refuses_something():
    """But for the two that are checked together."""
    refused = {name for name, _ in WRONG}
    assert {one.name for one in options.DECLARED} - refused == {"normalization", "normalization_kwargs"}


def test_values_are_kept_as_their_rule_reads_them():
    numpy = pytest.importorskip("numpy")
    made = config(interference_every=numpy.int64(3), interference_layers=("*.mlp.*",))
    assert made.interference_every == 3 and type(made.interference_every) is int
    assert made.interference_layers == ["*.mlp.*"]


def test_docstring_and_table_hold_every_option():
    table = options.markdown()
    for one in options.DECLARED:
        assert f"        {one.name}: " in CurvatureGRPOConfig.__doc__
        assert f"| `{one.name}` | `{one.default!r}` |" in table
    assert max(map(len, CurvatureGRPOConfig.__doc__.splitlines())) <= 120


def test_a_plain_configuration_has_the_defaults():
    assert options.read_options(GRPOConfig("nowhere", report_to="none", bf16=False)) == options.CurvatureOptions()
