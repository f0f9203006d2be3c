"""Kernels compile for GPUs that aren't here, without spills and with 16-byte accesses: in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_kernels import METHODS

pytest.importorskip("triton")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "compile_ahead.py"

# every kernel on sm_90; the two variants of --quick are compiled for every dtype, vocabulary and target besides
EVERY_VARIANT = """
import json, torch
from dataclasses import asdict
from compile_ahead import cases, report
chosen = [case for case in cases() if (case.tile, case.gradient) == (torch.float32, torch.bfloat16)
          or not case.n_vocabulary]
print(json.dumps([asdict(report(case, "sm_90")) for case in chosen if case.n_vocabulary != 49152]))
"""
# a tile whose rows have no padding: the bound of a load isn't known to divide by 16
UNPADDED = """
import torch
from compile_ahead import Case, report
half = torch.bfloat16
for tile, gradient in ((torch.float32, torch.float32), (half, half)):
    print(report(Case("grpo", 50257, tile, gradient, padded=False), "sm_90").narrowest)
    print(report(Case("grpo", 50257, tile, gradient), "sm_90").narrowest)
"""

# what the JIT would compile the row kernels for, by its own binder, at every number of rows
SPECIALISATIONS = """
import json, torch
from unittest.mock import patch
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
import compile_ahead

target = compile_ahead.TARGETS["sm_90"]

def key(variant, rows):
    with patch.object(compile_ahead, "ROWS", rows):
        case = compile_ahead.Case(variant, 4090, torch.float32, torch.bfloat16)
        kernel, launched = compile_ahead._launch(case, target)
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(target))
    return str(bind(*launched.positional, **launched.named)[1])

variants = ("grpo, rewards", "grpo", "softmax")
print(json.dumps([len({key(variant, rows) for rows in range(1, 66)}) for variant in variants]))
"""


def run_compiler(folder, *arguments, interpret="0"):
    """What it prints."""
    path = os.pathsep.join([str(SCRIPT.parent), os.environ.get("PYTHONPATH", "")])
    own = {"TRITON_INTERPRET": interpret, "TRITON_CACHE_DIR": str(folder), "PYTHONPATH": path}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def narrow_accesses(row):
    widths = {int(bits) for loop in row["loops"] for kind in ("loads", "stores") for bits in loop[kind]}
    return sorted(bits for bits in widths if bits < 128)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


ALL = ("sm_80", "sm_90", "sm_100", "sm_103", "sm_120", "gfx942")


@pytest.fixture(scope="module", params=[("sm_90",), pytest.param(ALL, marks=pytest.mark.nightly)], ids=" ".join)
def command(request, cache):
    """Its table and rows, of one target; nightly of all, as it is called without ``--targets``."""
    table = cache / "table.json"
    targets = [] if request.param == ALL else ["--targets", *request.param]
    printed = run_compiler(cache, str(SCRIPT), "--quick", "--json", str(table), *targets)
    return request.param, printed, json.loads(table.read_text())


def test_the_command_covers_targets_vocabularies_and_dtypes(command):
    targets, printed, rows = command
    assert {row["target"] for row in rows} == set(targets)
    assert {row["n_vocabulary"] for row in rows} == {49152, 151936, 50257}
    dtypes = {"float32 -> float32", "float32 -> bfloat16", "bfloat16 -> bfloat16"}
    assert {row["dtypes"] for row in rows} == dtypes
    assert len(printed.splitlines()) == 1 + len(rows) == 1 + len(targets) * 3 * 3 * 2


def test_no_spills_and_only_wide_accesses_on_nvidia(command):
    for row in command[2]:
        assert row["spills"] == 0, row
        if row["target"].startswith("sm_"):
            reading, writing = row["loops"]  # the statistics of a row of logits, then its gradient in its place
            assert reading["loads"] and not reading["stores"], row
            assert writing["loads"] and writing["stores"], row
            assert reading["barriers"] == 0, row
            assert narrow_accesses(row) == [], row


def test_every_kernel_on_sm_90(cache):
    rows = json.loads(run_compiler(cache, "-c", EVERY_VARIANT))
    assert len(rows) == 10 * 2 + len({(method.centre, method.scale) for method in METHODS.values()})
    for row in rows:
        assert row["spills"] == 0, row
        if row["n_vocabulary"]:
            assert narrow_accesses(row) == [], row


def test_a_bound_not_known_to_divide_by_16_is_seen(cache):
    assert run_compiler(cache, "-c", UNPADDED).split() == ["32", "128", "16", "128"]


def test_interpreted_kernels_are_refused(tmp_path):
    with pytest.raises(AssertionError, match=r"^TRITON_INTERPRET=1"):
        run_compiler(tmp_path, str(SCRIPT), "--quick", interpret="1")


def test_one_compilation_whatever_the_number_of_rows(cache):
    """A pointer's alignment is part of what a kernel is compiled for."""
    assert max(json.loads(run_compiler(cache, "-c", SPECIALISATIONS))) <= 2
