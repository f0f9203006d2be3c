"""The loss and its gradients from hidden states: ours against every peer and the bare matrix products.

Counted (N tokens, V vocabulary, H hidden, f the share of live rows): products (2 + 4 f) N V H, frozen (2 + 2 f); bytes
beside them: a tile's logits written by a product, read and written once by the row arithmetic, read by two products.

Without ``--full`` all is in float32: a CPU without instructions for bfloat16 takes minutes for one of its cases.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import head_contenders as heads
import pytest
import torch
from compare import alternate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Qwen2.5's head is five times SmolLM2's: fewer rounds, or the whole would take an hour on two cores
ROUNDS = {"SmolLM2": 5, "Qwen2.5": 2} if DEVICE == "cpu" else {"SmolLM2": 15, "Qwen2.5": 15, "8B": 7}
SHORT = [  # without --full
    ("SmolLM2", 512, "fp32", False, 1.0),
    ("SmolLM2", 512, "fp32", False, 0.5),
    ("SmolLM2", 512, "fp32", True, 1.0),
    ("Qwen2.5", 512, "fp32", True, 1.0),
]
GRID = [
    (shape, 512, dtype, frozen, live)
    for shape in ("SmolLM2", "Qwen2.5")
    for dtype in DTYPES
    for frozen in (False, True)
    for live in (1.0, 0.5, 0.125)
] + [("SmolLM2", 2048, dtype, frozen, 1.0) for dtype in DTYPES for frozen in (False, True)]
if DEVICE == "cuda":  # 512 tokens are a millisecond there, and the launches' own time
    GRID += [
        (shape, n, "bf16", frozen, live)
        for shape, n in (("Qwen2.5", 4096), ("8B", 8192))
        for frozen in (False, True)
        for live in (1.0, 0.5)
    ]


def name_of(shape, n, dtype, frozen, live):
    return f"{shape} {n:>4} {dtype} {'frozen   ' if frozen else 'trainable'} live {live}"


def check_same_gradient(problem, call, peer, tolerance):
    gradients = []
    for contender in (call, peer):
        contender()
        gradients.append(problem.hidden.grad.float())
    error = (gradients[0] - gradients[1]).norm() / gradients[1].norm().clamp(min=1e-30)
    assert error < tolerance, error


@pytest.mark.parametrize(
    ("shape", "n", "dtype", "frozen", "live"),
    [case if case in SHORT else pytest.param(*case, marks=pytest.mark.full) for case in GRID],
)
def test_against_trl_and_the_floor(benchmark, record, shape, n, dtype, frozen, live):
    problem = heads.make_problem(shape, n, DTYPES[dtype], frozen=frozen, live=live, device=DEVICE)
    calls = {"ours": heads.ours(problem), "trl": heads.trl(problem), "floor": heads.bare_products(problem)}
    check_same_gradient(problem, calls["ours"], calls["trl"], 1e-4 if dtype == "fp32" else 3e-2)
    medians = alternate(calls, rounds=ROUNDS[shape] if n == 512 or DEVICE == "cuda" else 2)
    benchmark.extra_info.update(medians)
    record(
        "head",
        name_of(shape, n, dtype, frozen, live),
        {"TRL / ours": medians["trl"] / medians["ours"], "ours / floor": medians["ours"] / medians["floor"]},
    )
    benchmark.pedantic(calls["ours"], rounds=2)


@pytest.mark.full
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["SmolLM2"])
def test_against_the_other_peers(benchmark, record, full, shape, dtype, frozen):
    problem = heads.make_problem(shape, 512, DTYPES[dtype], frozen=frozen, live=1.0, device=DEVICE)
    calls = {
        "ours": heads.ours(problem),
        "full logits": heads.naive(problem),
        "Liger": heads.liger(problem),
        "torch cross entropy": heads.cross_entropy(problem),
        "floor": heads.bare_products(problem),
    }
    peers = [name for name in calls if name not in ("ours", "floor")]
    calls = {name: call for name, call in calls.items() if call is not None}
    for peer in ("full logits", "Liger"):
        if peer in calls:
            check_same_gradient(problem, calls["ours"], calls[peer], 1e-4 if dtype == "fp32" else 3e-2)
    medians = alternate(calls, rounds=5 if full else 3)
    benchmark.extra_info.update(medians)
    values = {f"{name} / ours": medians[name] / medians["ours"] if name in medians else None for name in peers}
    values["ours / floor"] = medians["ours"] / medians["floor"]
    record("head", name_of(shape, 512, dtype, frozen, 1.0), values)
    benchmark.pedantic(calls["ours"], rounds=2)


@pytest.mark.full
@pytest.mark.parametrize("shape", ("SmolLM2", "Qwen2.5"))
@pytest.mark.parametrize("frozen", [False, True])
def test_peak_memory(benchmark, record, shape, frozen):
    """Beyond inputs and returned gradients, each contender in a fresh process."""

    def measure(contender):
        command = [sys.executable, str(Path(__file__).with_name("head_memory.py")), contender, shape, str(int(frozen))]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        return json.loads(done.stdout.splitlines()[-1])

    peaks = {"trl": measure("trl"), "ours": benchmark.pedantic(measure, args=("ours",), rounds=1)}
    benchmark.extra_info.update(peaks)
    record(
        "head",
        f"{name_of(shape, 512, 'fp32', frozen, 1.0)} peak memory",
        {
            "ours MiB": peaks["ours"] / 2**20,
            "TRL MiB": peaks["trl"] / 2**20,
            "ours / TRL": peaks["ours"] / peaks["trl"],
        },
    )
