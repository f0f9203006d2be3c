"""The head at one shape: ours, every peer that is there, and the three products at full size.

Values: ms, the median of rounds in which all take turns; TFLOP/s of the operations that the loss needs, (2 + 4 f) N V H
with a trainable head and (2 + 2 f) with a frozen one, whatever a contender computes beyond them; peak MiB beyond inputs
and returned gradients; the ratios to the floor and to ours. Before it is timed each contender's gradients are compared
with float64's, at a small size: they may be three times as far from it as plain torch in the same dtype.

f, the live share: with half of it only contenders of the GRPO loss run, as the others have no weight for each token.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product

import head_contenders as heads
import torch
from compare import alternate
from head_memory import peak_beyond_now

from .record import FLOOR, Record
from .setting import Setting

TOLERANCE, SLACK = 3.0, {torch.float32: 1e-5, torch.bfloat16: 2e-3}
CHECK_TOKENS = 128


@dataclass(frozen=True)
class HeadShape:
    name: str
    tokens: int


def gradients(loss: Callable[[heads.Problem], torch.Tensor], problem: heads.Problem) -> list[torch.Tensor]:
    """Of hidden states and, unless frozen, of the head."""
    leaves = [leaf for leaf in (problem.hidden, problem.weight) if leaf.requires_grad]
    heads.backward(loss, problem)()
    found = [leaf.grad for leaf in leaves]
    assert all(gradient is not None for gradient in found), "a gradient is missing"
    return [gradient.double() for gradient in found]


def in_float64(problem: heads.Problem) -> heads.Problem:
    """The same numbers in float64."""
    twice = [leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in (problem.hidden, problem.weight)]
    return heads.Problem(*twice, problem.targets, problem.sequence, problem.advantages, problem.weights)


def plain(problem: heads.Problem, mean_nll: bool) -> torch.Tensor:
    """Full logits in the inputs' dtype, the rest in float32 or better."""
    logits = problem.hidden @ problem.weight.T
    logp = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
    logprobs = logp.gather(1, problem.targets[:, None])[:, 0]
    return -logprobs.mean() if mean_nll else heads.policy_loss(logprobs, problem)


def check(name: str, problem: heads.Problem) -> float:
    """The contender's largest relative error against float64; an ``AssertionError`` if plain torch's is far less."""
    mean_nll = name in heads.MEAN_NLL
    exact = gradients(lambda p: plain(p, mean_nll), in_float64(problem))
    usual = gradients(lambda p: plain(p, mean_nll), problem)
    found = gradients(heads.CONTENDERS[name], problem)
    worst = 0.0
    for ours, torchs, truth in zip(found, usual, exact, strict=True):
        error, allowed = ((other - truth).norm().item() / truth.norm().item() for other in (ours, torchs))
        allowed = TOLERANCE * allowed + SLACK[problem.hidden.dtype]
        assert error <= allowed, f"its gradient is {error:.2g} from float64's, {allowed:.2g} are allowed"
        worst = max(worst, error)
    return worst


def peak_mib(call: Callable[[], object], problem: heads.Problem) -> float:
    """Beyond inputs and returned gradients."""
    problem.hidden.grad = problem.weight.grad = None
    gc.collect()
    returned = sum(leaf.nbytes for leaf in (problem.hidden, problem.weight) if leaf.requires_grad)
    return (peak_beyond_now(call) - returned) / 2**20


def operations(problem: heads.Problem, vocabulary: int) -> float:
    n, h = problem.hidden.shape
    return (2 * n + (4 if problem.weight.requires_grad else 2) * problem.live_rows) * h * vocabulary


def note_of(name: str, device: str) -> str:
    """What a reader has to know of a peer's figures."""
    if name in heads.MEAN_NLL:
        return "mean negative log-likelihood: no entropies, no weight for each token"
    hopper = device == "cuda" and torch.cuda.get_device_capability() == (9, 0)
    notes = {
        "Liger": "no entropies",
        "Liger FLSCE": "" if hopper else "in torch: its kernels need compute capability 9.0",
        "CCE": "no entropies; skips blocks of small probabilities" if device == "cuda" else "no entropies; in torch",
        "CCE unfiltered": "no entropies" if device == "cuda" else "no entropies; in torch",
    }
    return notes.get(name, "")


def names_for(live: float) -> list[str]:
    return [name for name in heads.CONTENDERS if live == 1 or name not in heads.MEAN_NLL]


def ready_calls(
    record: Record, case: str, problem: heads.Problem, small: heads.Problem, names: Iterable[str]
) -> tuple[dict[str, Callable[[], None]], dict[str, dict[str, float]]]:
    """Returns the contenders whose gradients are right and which fit into memory, with a note on each."""
    calls, values = {}, {}
    for name in record.untried(case, names):
        with record.attempt(case, name):
            error = check(name, small)
            call = heads.backward(heads.CONTENDERS[name], problem)
            call()  # compiles
            values[name] = {"error": error, "peak MiB": peak_mib(call, problem)}
            calls[name] = call
        problem.hidden.grad = problem.weight.grad = None
        release()
    return calls, values


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run_case(record: Record, case: str, problem: heads.Problem, small: heads.Problem, live: float, rounds: int) -> None:
    calls, values = ready_calls(record, case, problem, small, names_for(live))
    calls[FLOOR], values[FLOOR] = heads.bare_products(problem), {}
    for name in record.untried(case, ["timing"]):
        with record.attempt(case, name):
            seconds = alternate(calls, rounds=rounds)
            needed = operations(problem, len(problem.weight))
            for contender, time in seconds.items():
                ratios = {"/ floor": time / seconds[FLOOR]}
                if "ours" in seconds:
                    ratios["/ ours"] = time / seconds["ours"]
                found = {"ms": 1e3 * time, "TFLOP/s": needed / time / 1e12, **values[contender], **ratios}
                record.add(case, contender, found, note_of(contender, problem.hidden.device.type))


def cases(shape: HeadShape, setting: Setting) -> dict[str, tuple[bool, float]]:
    """Whether the head is frozen, and the live share, by the case's name."""
    h, v = heads.SHAPES[shape.name]
    size = f"{shape.tokens} x {h} x {v} {setting.dtype_name}"
    return {
        f"{size} {'frozen' if frozen else 'trainable'}, live {live:g}": (frozen, live)
        for live, frozen in product((1.0, 0.5), (False, True))
    }


def measure(record: Record, setting: Setting, name: str, tokens: int) -> None:
    """``name`` is of ``head_contenders.SHAPES``."""
    shape = HeadShape("tiny", 32) if setting.tiny else HeadShape(name, tokens)
    chosen, options = cases(shape, setting), {"device": setting.device}
    for case in record.open_cases(chosen):
        frozen, live = chosen[case]
        small = heads.make_problem("check", CHECK_TOKENS, setting.dtype, frozen=frozen, live=live, **options)
        problem = heads.make_problem(shape.name, shape.tokens, setting.dtype, frozen=frozen, live=live, **options)
        run_case(record, case, problem, small, live, setting.rounds)
        del problem
        release()
