"""What a study will train, how long that takes, and what is left out so that it fits into the budget."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .study import Result, Variant

MORE_RATES = 2  # that a sweep tries at most beyond an edge where its best rate lies
FEWEST_SEEDS = 3  # below, no interval is given; seeds are dropped down to it before methods are
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass(frozen=True)
class Plan:
    """The size of a study.

    Attributes:
        variants: in the order given; the first is what the others are compared with.
        rates: learning rates that the sweep tries for each variant; 1: no sweep.
        seeds: of the comparison. tuning_seeds: of the sweep, others.
        placebo_seeds: tuning seeds of the first variant's second sweep; none: no placebo.
        run_seconds: predicted for one run; jobs: runs at the same time.
        run_bytes: of one run's checkpoints, estimated.
        more_rates: how many rates a sweep may add beyond its edge.
        dropped: what the budget left out.
    """

    variants: list[Variant]
    rates: int
    seeds: list[int]
    tuning_seeds: list[int]
    placebo_seeds: list[int]
    run_seconds: float
    jobs: int
    run_bytes: int = 0
    more_rates: int = 0
    dropped: tuple[str, ...] = ()

    @property
    def tuning_runs(self) -> int:
        if self.rates == 1:
            return 0
        return self.rates * (len(self.variants) * len(self.tuning_seeds) + len(self.placebo_seeds))

    @property
    def comparison_runs(self) -> int:
        return (len(self.variants) + bool(self.placebo_seeds and self.rates > 1)) * len(self.seeds)

    @property
    def runs(self) -> int:
        return self.tuning_runs + self.comparison_runs

    @property
    def more_runs(self) -> int:
        """Runs that are added if every best rate lies at an edge."""
        return self.more_rates * (len(self.variants) * len(self.tuning_seeds) + len(self.placebo_seeds))

    @property
    def seconds(self) -> float:
        return self.runs * self.run_seconds / self.jobs

    @property
    def most_seconds(self) -> float:
        return (self.runs + self.more_runs) * self.run_seconds / self.jobs

    def lines(self) -> list[str]:
        """What is printed before anything is trained."""
        names = ", ".join(one.name for one in self.variants)
        sweep = f"{self.tuning_runs} to choose learning rates, " if self.tuning_runs else ""
        timed = f"Predicted from timed steps of {self.variants[0].name}."
        disk = f", up to {self.run_bytes * self.runs / 2**30:.1f} GiB of checkpoints" if self.run_bytes else ""
        return [
            f"{self.runs} runs ({sweep}{self.comparison_runs} to compare) of {duration(self.run_seconds)} each, "
            f"{self.jobs} at a time: {duration(self.seconds)}{disk}. {timed}",
            *(
                [
                    f"  up to {self.more_runs} more where a best rate lies at its sweep's edge: then "
                    f"{duration(self.most_seconds)} at most"
                ]
                if self.more_runs
                else []
            ),
            f"  compared: {names}; seeds {', '.join(map(str, self.seeds))}",
            *(
                [f"  learning rates chosen on seeds {', '.join(map(str, self.tuning_seeds))}"]
                if self.tuning_runs
                else ["  the same learning rate for every method: no sweep"]
            ),
            *(f"  left out, to fit into the budget: {one}" for one in self.dropped),
        ]


def duration(seconds: float) -> str:
    """Formats seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def parse_budget(text: str) -> float:
    """Returns the seconds of ``12h``, ``90m`` or ``2d``. Raises ``ValueError`` for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"--budget {text!r} must be a number above 0 with s, m, h or d, as 12h")
    return float(match[1]) * UNITS[match[2]]


def fit(plan: Plan, budget: float | None) -> Plan:
    """Leaves out whole seeds, then whole methods, until the plan fits into the budget.

    The order is fixed: seeds of the comparison down to three, tuning seeds down to one, methods from the last one down
    to two, then seeds again. Raises ``ValueError`` if two methods with one seed don't fit.
    """
    while budget is not None and plan.most_seconds > budget:
        plan = _smaller(plan, budget)
    return plan


def _smaller(plan: Plan, budget: float) -> Plan:
    if len(plan.seeds) > FEWEST_SEEDS:
        return _without_seed(plan)
    if plan.rates > 1 and len(plan.tuning_seeds) > 1:
        *kept, seed = plan.tuning_seeds
        placebo = plan.placebo_seeds[: len(kept)]
        return replace(plan, tuning_seeds=kept, placebo_seeds=placebo, dropped=(*plan.dropped, f"tuning seed {seed}"))
    if len(plan.variants) > 2:
        *variants, last = plan.variants
        return replace(plan, variants=variants, dropped=(*plan.dropped, f"the method {last.name}"))
    if len(plan.seeds) > 1:
        return _without_seed(plan)
    raise ValueError(
        f"--budget is too small: two methods with one seed take {duration(plan.most_seconds)}, "
        f"and it is {duration(budget)}"
    )


def _without_seed(plan: Plan) -> Plan:
    *seeds, last = plan.seeds
    return replace(plan, seeds=seeds, dropped=(*plan.dropped, f"seed {last}"))


def seconds_of_a_run(timed: Result) -> float:
    """Predicts a run's time: start, steps and evaluations, by those that were timed."""
    steps = int(timed.config["max_steps"])
    evaluations = times("eval", timed) + bool(timed.config.get("eval_on_start"))
    return timed.start + steps * timed.step + evaluations * timed.evaluation


def bytes_of_a_run(timed: Result) -> int:
    """Estimates the bytes of a run's checkpoints."""
    count = times("save", timed)
    return min(count, timed.config.get("save_total_limit") or count) * timed.checkpoint_bytes


def times(what: str, timed: Result) -> int:
    """Returns how often a run evaluates or saves ("eval" or "save"): every so many steps, or after each epoch."""
    steps, strategy = int(timed.config["max_steps"]), timed.config.get(f"{what}_strategy")
    if strategy == "epoch":
        return math.ceil(timed.config.get("num_train_epochs") or 1)
    if strategy != "steps":
        return 0
    interval = whole_steps(timed.config.get(f"{what}_steps"), steps)
    return -(-steps // interval) if what == "save" else steps // interval  # the last step is saved always


def whole_steps(value: float | None, steps: int) -> int:
    """Returns an interval in steps; transformers reads a number below 1 as a share of the run."""
    if not value:
        return steps or 1
    return max(1, math.ceil(value * steps) if value < 1 else int(value))


def tuning_seeds(count: int, seeds: Sequence[int]) -> list[int]:
    """Returns ``count`` seeds from 100 on that the comparison doesn't use."""
    found: list[int] = []
    candidate = 100
    while len(found) < count:
        if candidate not in seeds:
            found.append(candidate)
        candidate += 1
    return found
