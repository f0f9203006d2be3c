"""The loss and its gradients from hidden states: ours against every peer and the bare matrix products.

Counted (N tokens, V vocabulary, H hidden, f the share of live rows): products (2 + 4 f) N V H, frozen (2 + 2 f); bytes
beside them: a tile's logits written by a product, read and written once by the row arithmetic, read by two products.

Without ``--full`` all is in float32: a CPU without instructions for bfloat16 takes minutes for one of its cases.
"""

from itertools import product

import head_contenders as heads
import pytest
import torch
from compare import in_fresh_process
from head_memory import head_peak

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
GRID = list(product(("SmolLM2", "Qwen2.5"), (512,), DTYPES, (False, True), (1.0, 0.5)))
if DEVICE == "cuda":  # 512 tokens are a millisecond there, and the launches' own time
    for shape, n in (("SmolLM2", 2048), ("Qwen2.5", 4096), ("8B", 8192)):
        GRID += product((shape,), (n,), ("bf16",), (False, True), (1.0, 0.5))


def name_of(shape, n, dtype, frozen, live):
    return f"{shape} {n:>4} {dtype} {'frozen   ' if frozen else 'trainable'} live {live}"


def calls_of(problem, *names):
    """The contenders that are there, and the floor. Those with the same loss leave the same gradient."""
    there = [name for name in ("ours", *names) if name not in heads.missing()]
    calls = {name: heads.backward(heads.CONTENDERS[name], problem) for name in there}
    gradients = {}
    for name in there:
        calls[name]()
        gradients[name] = problem.hidden.grad.float()
    for name in set(there) - {"torch cross entropy"}:
        error = (gradients["ours"] - gradients[name]).norm() / gradients[name].norm().clamp(min=1e-30)
        assert error < (1e-4 if problem.hidden.dtype == torch.float32 else 3e-2), (name, error)
    return {**calls, "floor": heads.bare_products(problem)}


@pytest.mark.parametrize(
    ("shape", "n", "dtype", "frozen", "live"),
    [case if case in SHORT else pytest.param(*case, marks=pytest.mark.full) for case in GRID],
)
def test_against_trl_and_the_floor(compare, shape, n, dtype, frozen, live):
    problem = heads.make_problem(shape, n, DTYPES[dtype], frozen=frozen, live=live, device=DEVICE)
    values = {"TRL / ours": ("trl", "ours"), "ours / floor": ("ours", "floor")}
    compare("head", name_of(shape, n, dtype, frozen, live), calls_of(problem, "trl"), values, rounds=ROUNDS[shape])


@pytest.mark.full
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_the_other_peers(compare, dtype, frozen):
    problem = heads.make_problem("SmolLM2", 512, DTYPES[dtype], frozen=frozen, live=1.0, device=DEVICE)
    peers = ("full logits", "Liger", "torch cross entropy")
    values = {f"{peer} / ours": (peer, "ours") for peer in peers} | {"ours / floor": ("ours", "floor")}
    compare("head", name_of("SmolLM2", 512, dtype, frozen, 1.0), calls_of(problem, *peers), values, rounds=5)


@pytest.mark.full
@pytest.mark.parametrize("frozen", [False, True])
def test_peak_memory(benchmark, record, frozen, shape="Qwen2.5"):
    """Beyond inputs and returned gradients, each contender in a fresh process."""
    theirs = in_fresh_process(head_peak, "trl", shape, frozen)
    peak = benchmark.pedantic(in_fresh_process, args=(head_peak, "ours", shape, frozen), rounds=1)
    values = {"ours MiB": peak / 2**20, "TRL MiB": theirs / 2**20, "ours / TRL": peak / theirs}
    record("head", f"{name_of(shape, 512, 'fp32', frozen, 1.0)} peak memory", values)
