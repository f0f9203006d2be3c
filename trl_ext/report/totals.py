"""Means and sums over a whole run."""

from __future__ import annotations

import numpy as np

from .read_run import Run


def mean(run: Run, name: str) -> float:
    """Over the whole log; 0 where the metric isn't logged."""
    values = run.series(name)[1]
    return float(np.mean(values)) if values else 0.0


def seconds(run: Run) -> dict[str, float]:
    """Seconds of the logged steps by stage, scaled to the whole run, and of evaluation."""
    stages = {
        name: run.series(f"compute/seconds_{name}")[1] for name in ("generation", "rewards", "log_probs", "training")
    }
    logged = max((len(values) for values in stages.values()), default=0)
    steps = run.last_step / logged if logged else 0.0  # TRL logs means over the steps between two log lines
    found = {name: float(np.sum(values)) * steps for name, values in stages.items() if values}
    evaluation = float(np.sum(run.series("eval_runtime")[1]))
    return {**found, **({"evaluation": evaluation} if evaluation else {})}
