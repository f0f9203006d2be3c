"""The same on a CPU with fewer instructions: oneDNN takes other products for AVX2, AVX512, its bfloat16, and AMX.

A few tests of each kind run here, for AVX2; ``make nightly PARTS=test_instruction_sets`` runs all of them on each.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

INSTRUCTION_SETS = ("AVX2", "AVX512_CORE", "AVX512_CORE_BF16")  # the other tests run on the CPU's best
POISONED = "tests/unit/test_uninitialised_memory.py::test_the_head_reads_nothing_that_it_did_not_write"
FEW = (
    "tests/unit/test_head_precision.py",
    f"{POISONED}[dtype1-products in half-1]",
    f"{POISONED}[dtype2-products in half-1]",
    "tests/unit/test_head.py::test_no_worse_than_plain_torch",
    "tests/equality/test_trainer_equality.py::test_a_plain_grpo_config_does_as_well",
)


def run_tests(instruction_set, *arguments):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {**inherited, "ONEDNN_MAX_CPU_ISA": instruction_set, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def test_a_few_tests_of_each_kind():
    assert " passed" in run_tests(INSTRUCTION_SETS[0], "-n", "0", *FEW)


@pytest.mark.nightly
@pytest.mark.parametrize("instruction_set", [*INSTRUCTION_SETS, "ALL"])
def test_everything(instruction_set):
    assert " passed" in run_tests(instruction_set, "-n", "2", "--dist", "worksteal")
