"""What is measured to help against dead groups, for the kind of run that a log shows.

Figures are of ``examples/dead_groups/dead_groups.md``: a policy of 1 M parameters, 480 prompts of which a third was
never solved and a third nearly always, each seen about twice. Its tests compare them with the committed results.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .read_run import Run
from .totals import mean, seconds

PAGE = "docs/dead-groups.md"
BOTH_KINDS = 0.1  # least share of the groups that are all right, and all wrong, where the measured setting had both
MOST_VISITS = 5.0  # of a prompt; it had two
PRIMARY = 3.0  # the price by which remedies were judged


@dataclass(frozen=True)
class Measured:
    """A remedy's held-out accuracy less that of leaving dead groups, at equal cost.

    Attributes:
        by_price: price of a generated token, in trained ones -> (mean, low, high), 95 %.
        verdict: "better", "not worse", "unknown" or "worse", at a price of 3, corrected for several comparisons.
    """

    remedy: str
    by_price: dict[float, tuple[float, float, float]]
    verdict: str


MEASURED = (
    Measured(
        "normalization='none'",
        {
            0.5: (0.009, -0.004, 0.021),
            1.0: (0.008, -0.000, 0.017),
            3.0: (0.009, 0.003, 0.016),
            9.0: (0.010, 0.003, 0.016),
        },
        "better",
    ),
    Measured(
        "choosing prompts by their pass rates",
        {
            0.5: (0.008, -0.005, 0.021),
            1.0: (0.007, -0.006, 0.020),
            3.0: (0.008, -0.004, 0.020),
            9.0: (0.008, -0.004, 0.020),
        },
        "not worse",
    ),
    Measured(  # of the screen, four seeds
        "resample_zero_variance=True",
        {
            0.5: (-0.014, -0.045, 0.018),
            1.0: (-0.001, -0.046, 0.044),
            3.0: (-0.010, -0.040, 0.019),
            9.0: (-0.014, -0.038, 0.009),
        },
        "unknown",
    ),
)


@dataclass(frozen=True)
class Kind:
    """What decides whether a measured setting is like this run; None: the log doesn't say.

    Attributes:
        right, wrong: shares of the groups whose answers are all right, all wrong.
        visits: how often each prompt has been seen.
        price: seconds for a generated token over those for a trained one.
    """

    right: float | None
    wrong: float | None
    visits: float | None
    price: float | None

    def __str__(self) -> str:
        parts = [] if None in (self.right, self.wrong) else [f"{self.right:.0%} all right, {self.wrong:.0%} all wrong"]
        parts += [] if self.visits is None else [f"{self.visits:.1f} visits to a prompt"]
        parts += [] if self.price is None else [f"a generated token costs {self.price:.2g} trained ones"]
        return "; ".join(parts)


def kind_of(run: Run) -> Kind:
    """Reads the kind of a run from its log."""
    right, wrong = (run.last(f"normalization/all_{kind}_frac") for kind in ("right", "wrong"))
    spent = seconds(run)
    # trained tokens are those of the sequences that run, once for each iteration
    trained = (1 - mean(run, "compute/sequences_skipped_frac")) * (run.config.get("num_iterations") or 1)
    price = None
    if spent.get("generation") and spent.get("training") and trained > 0.01:
        price = spent["generation"] / spent["training"] * trained
    return Kind(right, wrong, run.last("epoch"), price)


def known_remedy(run: Run) -> str:
    """Returns what is known to help a run like this, with effects and intervals, or that nothing is."""
    kind = kind_of(run)
    seen = f"This run: {kind}. " if str(kind) else ""
    if kind.right is None or kind.wrong is None or min(kind.right, kind.wrong) < BOTH_KINDS:
        side = "" if kind.right is None or kind.wrong is None else " with groups mostly of one kind"
        return f"{seen}Nothing was measured{side}, and nothing is known to help ({PAGE})."
    if kind.visits is not None and kind.visits > MOST_VISITS:
        return f"{seen}Nothing was measured with so many visits, and nothing is known to help ({PAGE})."
    price = min(MEASURED[0].by_price, key=lambda one: abs(math.log(one / (kind.price or PRIMARY))))
    effects, helps = [], []
    for one in MEASURED:
        effect, low, high = one.by_price[price]
        effects.append(f"{one.remedy} {effect:+.3f} [{low:+.3f}, {high:+.3f}] ({one.verdict})")
        if one.verdict == "better" and low > 0:
            helps.append(one.remedy)
    end = f"Try {', '.join(helps)} if the rewards are right" if helps else "Nothing is shown to help"
    return f"{seen}Measured at equal cost, a generated token at {price:g}: {'; '.join(effects)}. {end} ({PAGE})."
