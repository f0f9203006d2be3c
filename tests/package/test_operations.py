"""The benchmark that counts operations, at few layers: from one and two follows the number at Qwen2.5-1.5B's 28."""

import sys

import pytest
from processes import ROOT

sys.path.append(str(ROOT / "benchmarks"))

from operations import APART, Case, by_cause, count


def at_28_layers(case: Case) -> int:
    """Operations beside compiled regions: each layer has equally many."""
    one, two = (sum(n for name, n in by_cause(count(case, layers)).items() if name not in APART) for layers in (1, 2))
    return one + 27 * (two - one)


@pytest.mark.parametrize(("compiled", "most"), [(False, 22_000), (True, 2_000)], ids=["eager", "compiled"])
def test_operations_of_a_step_with_lora(compiled, most):
    assert most / 2 < at_28_layers(Case(ours=True, checkpointing=False, compiled=compiled)) <= most
