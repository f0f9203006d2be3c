"""How often the interval of ``interference/alignment`` holds the truth: ``python examples/paper/alignment.py``.

Simulates policies whose gradients are known. An answer is right with its prompt's pass rate, else one of nine wrong
ones, all equally likely; its score is its one-hot vector less the probabilities. A prompt's gradient has a part in
directions that all prompts share, of squared length ``cosine``, and a part in random directions of its own. Writes
``results/alignment.csv``, a row for each cell.

Shapes: R runs, T steps of a run, P prompts of a step, G answers to a prompt, V answers there are, D private directions.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch

from grpo_kernels.interference.alignment import Alignment, StepMoments, errors_needed, moments, pooled_alignment

STEPS, PROMPTS, ANSWERS, DIRECTIONS = 20, 16, 10, 64
AT_A_TIME = 50  # runs
GROUP_SIZES, COSINES = (2, 3, 4, 7, 8, 16), (0.0, 0.3, 1.0)
RATES = ("0.5", "0.2", "0.08", "0.05", "0.02", "0.01", "half", "beta")
FEWEST = 0.1  # share of the runs with an interval, below which its coverage isn't given
RESULTS = Path(__file__).parent / "results" / "alignment.csv"


@dataclass(frozen=True)
class Cell:
    """``rates``: the pass rate of all prompts; ``half``: half 0.5, half 0.05; ``beta``: Beta(0.5, 0.5)."""

    answers: int
    rates: str
    cosine: float


@dataclass(frozen=True)
class Found:
    """Of a cell's runs.

    Attributes:
        truth: the alignment; ``cosine`` times the squared mean length over the mean squared length.
        pooled: ratio of the means over all runs.
        speaks: share of the runs in which an interval is given.
        coverage: share of those whose interval holds the truth; NaN without any.
        too_low: share of those whose interval ends below the truth.
        too_high: share of those whose interval begins above it.
        width: median width of the intervals.
    """

    truth: float
    pooled: float
    speaks: float
    coverage: float
    too_low: float
    too_high: float
    width: float


def draw_rates(rates: str, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    if rates == "half":
        return np.where(generator.random(shape) < 0.5, 0.5, 0.05)
    if rates == "beta":
        return generator.beta(0.5, 0.5, shape)
    return np.full(shape, float(rates))


def true_alignment(cell: Cell) -> float:
    """A prompt's expected gradient has length rate (1 - rate) times a constant."""
    rate = draw_rates(cell.rates, (1_000_000,), np.random.default_rng(0))
    length = rate * (1 - rate)
    return cell.cosine * float(length.mean() ** 2 / np.square(length).mean())


def gradients(cell: Cell, runs: int, generator: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(R, T, P, P) inner products of the prompts' gradients, (R, T, P) V_p."""
    n, shape = cell.answers, (runs, STEPS, PROMPTS)
    rate = draw_rates(cell.rates, shape, generator)[..., None]
    right = generator.random((*shape, n)) < rate
    answer = np.where(right, 0, generator.integers(1, ANSWERS, (*shape, n)))
    weight = (right - right.mean(-1, keepdims=True)) / (n - 1)
    probability = np.concatenate([rate, np.repeat((1 - rate) / (ANSWERS - 1), ANSWERS - 1, -1)], -1)
    gradient = np.zeros((*shape, ANSWERS))  # sum of weight (one-hot - probability); the weights sum to 0
    for i in range(n):
        place = answer[..., i : i + 1]
        added = np.take_along_axis(gradient, place, -1) + weight[..., i : i + 1]
        np.put_along_axis(gradient, place, added, -1)
    square_G = 1 - 2 * np.take_along_axis(probability, answer, -1) + np.square(probability).sum(-1, keepdims=True)
    between = np.square(gradient).sum(-1) - (np.square(weight) * square_G).sum(-1)
    signal = n / (n - 1) * between / (1 + 1 / (n - 1) ** 2)  # as grpo_kernels.interference.metrics.signal
    inner = cell.cosine * np.einsum("rtpv,rtqv->rtpq", gradient, gradient)
    if cell.cosine < 1:
        own = generator.standard_normal((*shape, DIRECTIONS, ANSWERS), dtype=np.float32) / DIRECTIONS**0.5
        private = np.einsum("rtpdv,rtpv->rtpd", own, gradient.astype(np.float32))
        inner = inner + (1 - cell.cosine) * np.einsum("rtpd,rtqd->rtpq", private, private)
    return torch.from_numpy(inner), torch.from_numpy(signal)


def estimates(
    cell: Cell, repeats: int, generator: np.random.Generator
) -> Iterator[tuple[np.ndarray, Alignment | None]]:
    """Yields each run's mean moments, and its estimate."""
    needed = errors_needed(cell.answers)
    for _ in range(repeats // AT_A_TIME):
        moments_RT5 = moments(*gradients(cell, AT_A_TIME, generator))
        for steps in moments_RT5.tolist():
            yield np.mean(steps, 0), pooled_alignment([StepMoments(*step, PROMPTS, needed) for step in steps])


def simulate(cell: Cell, repeats: int = 1000, seed: int = 0) -> Found:
    truth = true_alignment(cell)
    means, found = zip(*estimates(cell, repeats, np.random.default_rng(seed)), strict=True)
    cross, signal, *_ = np.mean(means, 0)
    given = [one for one in found if one is not None]

    def share(chosen: list[bool]) -> float:
        return float(np.mean(chosen)) if chosen else float("nan")

    return Found(
        truth=truth,
        pooled=cross / signal,
        speaks=len(given) / len(found),
        coverage=share([one.low <= truth <= one.high for one in given]),
        too_low=share([one.high < truth for one in given]),
        too_high=share([one.low > truth for one in given]),
        width=float(np.median([one.high - one.low for one in given])) if given else float("nan"),
    )


def table(path: Path = RESULTS) -> str:
    """A row for each group size and a column for each kind of pass rates: in how many of the runs an interval is given,
    and the share of those that hold the truth, of cosines 0, 0.3 and 1; no share below ``FEWEST`` runs."""
    with open(path, newline="") as stream:
        rows = list(csv.DictReader(stream))
    lines = [f"| answers | {' | '.join(RATES)} |", "|---" * (len(RATES) + 1) + "|"]
    for answers in GROUP_SIZES:
        cells = []
        for rates in RATES:
            found = [row for row in rows if (row["answers"], row["rates"]) == (str(answers), rates)]
            speaks = sum(float(row["speaks"]) for row in found) / len(found)
            shares = [f"{100 * float(row['coverage']):.0f}" if float(row["speaks"]) > FEWEST else "-" for row in found]
            cells.append(f"{speaks:.0%}: {', '.join(shares)}" if set(shares) != {"-"} else f"{speaks:.1%}")
        lines.append(f"| {answers} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1000, help="runs of a cell")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.repeats < AT_A_TIME or options.repeats % AT_A_TIME:
        parser.error(f"--repeats {options.repeats} must be a multiple of {AT_A_TIME}")
    torch.set_num_threads(1)
    with open(options.output, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow([field.name for kind in (Cell, Found) for field in fields(kind)])
        for cell in (Cell(*one) for one in product(GROUP_SIZES, RATES, COSINES)):
            found = asdict(simulate(cell, options.repeats))
            writer.writerow([*asdict(cell).values(), *(f"{value:.4f}" for value in found.values())])
            print(cell, found, flush=True)
    print(table(options.output))


if __name__ == "__main__":
    main()
