"""Signatures of the prompts' gradients: what can be trusted, and who opposes whom."""

from __future__ import annotations

import math

import numpy as np

from trl_ext.report.evidence import above, interval, state
from trl_ext.report.read_run import Run

from .finding import ADVICE, WARNING, Finding, Found, Unknown, lasting, missing, no_files, too_few

UNCOVERED, UNCHECKED = 0.9, 0.15
DOMINATED, ALMOST_ALL, PROMPTS = 0.5, 0.9, 5  # of the squared gradients, by one of so many live prompts
LEAST_STEPS = 4
ENOUGH_STEPS, MANY_PROMPTS = 15, 8  # logged, for an alignment
AGAINST = -0.02  # mean cosine of two tasks, upper end
NEGATIVE, CORRELATIONS = -0.2, 8  # upper end of the mean of so many; below 0 it was in 7 of 16 healthy seeds


def uncovered(run: Run) -> Found:
    coverage = run.series("interference/coverage")
    if not coverage[0]:
        return missing("interference/coverage")
    allowed = UNCHECKED + 3 * (run.last("interference/sketch_rmse") or 0.0)
    return lasting(
        coverage,
        {WARNING: lambda share: share < UNCOVERED},
        lambda mean: f"the sketch sees {mean:.0%} of the squared gradient: what interference says is of that part",
        "The log names the parameters that are left out; interference_layers; fused_loss=True covers the head.",
    ) or lasting(
        run.series("interference/sketch_check"),
        {WARNING: lambda ratio: abs(ratio - 1) > allowed},
        lambda mean: f"the sketch's norm is {mean:.2f} of the gradient's: its figures are off",
        "A larger interference_dim; please report the model.",
    )


def unreliable(run: Run) -> Finding | Unknown | None:
    """No alignment after steps and prompts enough: the signal in the prompts' gradients may be 0."""
    if any(run.series(f"interference/{name}")[0] for name in ("alignment", "alignment_trained")):
        return None
    if run.series("interference/reliability")[0] or run.config.get("resample_zero_variance"):
        return Unknown("alignment isn't logged with resample_zero_variance, nor by earlier versions")
    if not run.records:
        return no_files()
    many = [record for record in run.records if len(record.prompt_id_P) >= MANY_PROMPTS]
    steps = [record.step for record in many if (np.unique(record.prompt_B, return_counts=True)[1] > 1).all()]
    if len(steps) < ENOUGH_STEPS:
        return Unknown(f"{ENOUGH_STEPS} logged steps of {MANY_PROMPTS} prompts are needed, {len(steps)} are there")
    evidence = f"after {len(steps)} logged steps the prompts' gradients can't be told from noise: cosines say nothing"
    remedy = "More answers to a prompt (num_generations), or more prompts in a step."
    return Finding(ADVICE, steps[0], evidence, 0.95, remedy)


def contradicts_theory(run: Run) -> Found:
    """The theory says that sigma follows curvature, and that below C = 1 dividing by it helps."""
    steps, values = run.series("curvature/directional_corr")
    constant = run.last("curvature/speedup_constant")
    if constant is None:
        return missing("curvature/speedup_constant")
    if len(values) < CORRELATIONS:
        return too_few(run, CORRELATIONS, "curvature/directional_corr")
    mean, low, high = interval(values)
    if high >= NEGATIVE or constant >= 1:
        return None
    evidence = (
        f"C = {constant:.2f} predicts that std helps as sigma tracks curvature; measured, their correlation is "
        f"{mean:+.2f} [{low:+.2f}, {high:+.2f}] over {len(values)} steps"
    )
    remedy = (
        "python -m trl_ext what-if RUN: is std more than a learning rate here? If not, normalization='mean' "
        "at its factor."
    )
    return Finding(ADVICE, steps[0], evidence, 0.95, remedy)


def dominated(run: Run) -> Found:
    """One prompt that makes up most of the step, where several have a gradient."""
    steps, shares, texts = [], [], []
    for record in run.records:
        square = np.diag(record.gram_PP).astype(float)
        if np.count_nonzero(square > 1e-12 * max(square.max(initial=0.0), 1e-300)) < PROMPTS:
            continue
        share = square / square.sum()
        most = int(np.argmax(share))
        steps.append(record.step)
        shares.append(float(share[most]))
        texts.append((record.prompt_text_P or [""] * len(share))[most])
    if not run.records:
        return no_files()
    if not steps:
        return Unknown(f"no logged step with {PROMPTS} live prompts")
    found = state(steps, shares, above(DOMINATED))
    if found is None:
        return None
    level = WARNING if found.mean > ALMOST_ALL else ADVICE
    text = " ".join(texts[int(np.argmax(shares))].split())[:60]
    evidence = (
        f"one prompt has {found.mean:.0%} of the squared gradients of a step, up to {found.largest:.0%}"
        f"{f' ({text!r})' if text else ''}"
    )
    remedy = "normalization='std' or 'rank' levels the prompts; does its reward have another scale?"
    return Finding(level, found.onset, evidence, found.confidence, remedy)


def task_conflict(run: Run) -> Found:
    """Two tasks, the dataset's column ``task``, whose gradients oppose one another."""
    pairs = task_cosines(run)
    if not run.records:
        return no_files()
    if not pairs:
        return Unknown("no logged step has two tasks (a column 'task' in the dataset)")
    against = {}
    for names, (steps, values) in pairs.items():
        mean, low, high = interval(values, looks=len(pairs))
        if len(values) >= LEAST_STEPS and high < AGAINST:
            against[names] = (mean, low, high, steps)
    if not against:
        return None
    names, (mean, low, high, steps) = min(against.items(), key=lambda item: item[1][0])
    evidence = f"{names[0]} and {names[1]}: cosine {mean:+.2f} [{low:+.2f}, {high:+.2f}] over {len(steps)} steps"
    evidence += f", and {len(against) - 1} other pairs" if len(against) > 1 else ""
    remedy = "Train them one after the other, or weigh them; does one's reward punish what the other's asks for?"
    return Finding(WARNING, steps[0], evidence, 0.95, remedy)


def task_cosines(run: Run) -> dict[tuple[str, str], tuple[list[int], list[float]]]:
    """(task, task) -> steps and cosines of the two tasks' summed gradients, in logged steps that have both."""
    found: dict[tuple[str, str], tuple[list[int], list[float]]] = {}
    for record in run.records:
        if record.task_P is None:
            continue
        tasks = sorted(set(record.task_P) - {""})
        of = {task: np.array([one == task for one in record.task_P]) for task in tasks}
        gram = record.gram_PP.astype(float)
        for i, one in enumerate(tasks):
            for other in tasks[i + 1 :]:
                a, b = (gram[np.ix_(of[t], of[t])].sum() for t in (one, other))
                if a > 0 and b > 0:
                    steps, values = found.setdefault((one, other), ([], []))
                    steps.append(record.step)
                    values.append(float(gram[np.ix_(of[one], of[other])].sum() / math.sqrt(a * b)))
    return found
