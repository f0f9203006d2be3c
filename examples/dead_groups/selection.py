"""Chooses prompts before they are answered, by the chance that their answers get different rewards.

A prompt's pass rate has a Beta distribution. Its prior is that of the prompt's task; right and wrong answers seen add
to it, and count for less as the policy changes. A draw takes a pass rate p from each candidate's distribution (Thompson
sampling), and prompts in proportion to the chance of a mixed group, 1 - p^G - (1 - p)^G, but at least to ``FLOOR``. In
proportion, and not the best ones: prompts that are mixed half as often are drawn half as often, as if dead groups had
been generated and thrown away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
Indices = NDArray[np.int64]

MOST_CANDIDATES = 16_384  # of one draw
FLOOR = 0.05  # of a prompt's weight: the exploration
KEPT = 0.97  # share of an answer's weight after another step
PRIOR_KEPT = 0.9  # the same for the prior's groups
PRIOR_GROUPS = 4.0  # what a wider prior counts in a narrower one, in groups
UNIFORM = (1.0, 0.5, 1 / 3)  # groups, E p and E p^2 of Beta(1, 1)
SIZES = (0.1, 50.0)  # of a Beta distribution's a + b


def mixed_chance(pass_rates: Numbers, answers: int) -> Numbers:
    """Returns the chance that ``answers`` answers aren't all right or all wrong."""
    return 1 - pass_rates**answers - (1 - pass_rates) ** answers


def beta_from_moments(mean: float, square: float) -> tuple[float, float]:
    """Returns a and b of the Beta distribution with E p = ``mean`` and E p^2 = ``square``."""
    mean = min(max(mean, 1e-3), 1 - 1e-3)
    spread = max(square - mean**2, 1e-9)
    size = min(max((mean - square) / spread, SIZES[0]), SIZES[1])
    return mean * size, (1 - mean) * size


def weighted_draw(weights: Numbers, count: int, random: np.random.Generator) -> Indices:
    """Draws ``count`` different indices, each next one in proportion to the weights that are left.

    Efraimidis and Spirakis 2006: the largest of u^(1 / weight), u uniform.
    """
    keys = np.log(random.random(len(weights))) / weights
    return np.argpartition(-keys, count - 1)[:count]


class PassRates:
    """What is known of the pass rates of a dataset's prompts; ``tasks``: of each row, a number."""

    def __init__(self, tasks: Sequence[int], answers: int) -> None:
        self.tasks, self.answers = np.asarray(tasks), answers
        self.seen: dict[int, tuple[float, float, int]] = {}  # row -> right, wrong, step
        self.groups: dict[int, tuple[float, float, float, int]] = {}  # task -> groups, sums of p and p^2, step

    def observe(self, row: int, right: float, step: int) -> None:
        """Adds a group of ``answers`` answers, of which ``right`` were right (not whole where rewards are graded)."""
        before, wrong, last = self.seen.get(row, (0.0, 0.0, step))
        kept, n = KEPT ** (step - last), self.answers
        self.seen[row] = (kept * before + right, kept * wrong + n - right, step)
        square = right * (right - 1) / (n * (n - 1)) if right >= 1 else 0.0  # E p^2 without bias
        task = int(self.tasks[row])
        groups, mean, of_square, last = self.groups.get(task, (0.0, 0.0, 0.0, step))
        kept = PRIOR_KEPT ** (step - last)
        self.groups[task] = (kept * groups + 1, kept * mean + right / n, kept * of_square + square, step)

    def priors(self) -> dict[int, tuple[float, float]]:
        """Returns a and b of each task's prior; that of a task without groups is the whole set's, under -1."""
        whole = np.array(UNIFORM) * PRIOR_GROUPS + sum(np.array(one[:3]) for one in self.groups.values())
        moments = whole / whole[0]
        found = {-1: beta_from_moments(*moments[1:])}
        for task, (groups, mean, square, _) in self.groups.items():
            own = (np.array([mean, square]) + PRIOR_GROUPS * moments[1:]) / (groups + PRIOR_GROUPS)
            found[task] = beta_from_moments(*own)
        return found

    def distributions(self, rows: Indices, step: int) -> tuple[Numbers, Numbers]:
        """Returns a and b of these rows' Beta distributions at a step."""
        priors = self.priors()
        a_b = np.array([priors.get(task, priors[-1]) for task in self.tasks[rows].tolist()])
        for place, row in enumerate(rows.tolist()):
            if row in self.seen:
                right, wrong, last = self.seen[row]
                a_b[place] += np.array([right, wrong]) * KEPT ** (step - last)
        return a_b[:, 0], a_b[:, 1]

    def choose(self, count: int, step: int, random: np.random.Generator) -> tuple[Indices, float]:
        """Chooses ``count`` different rows. Returns them, and the share of mixed groups that is expected."""
        rows = np.arange(len(self.tasks))
        if len(rows) > MOST_CANDIDATES:
            rows = random.choice(len(rows), MOST_CANDIDATES, replace=False)
        a, b = self.distributions(rows, step)
        weights = np.maximum(mixed_chance(random.beta(a, b), self.answers), FLOOR)
        drawn = weighted_draw(weights, count, random)
        return rows[drawn], float(self._expected(a[drawn], b[drawn]).mean())

    def _expected(self, a: Numbers, b: Numbers) -> Numbers:
        """The mean of ``mixed_chance`` over Beta distributions."""
        all_right, all_wrong = np.ones_like(a), np.ones_like(b)
        for answer in range(self.answers):
            all_right *= (a + answer) / (a + b + answer)
            all_wrong *= (b + answer) / (a + b + answer)
        return 1 - all_right - all_wrong


def task_numbers(tasks: Sequence[str | None]) -> list[int]:
    """Numbers the tasks of a dataset's rows."""
    names: Mapping[str | None, int] = {name: number for number, name in enumerate(dict.fromkeys(tasks))}
    return [names[name] for name in tasks]
