"""Signatures of a step's numbers: denominators, advantages, gradient norms, the sampler, seconds."""

from __future__ import annotations

import math
import statistics

import numpy as np

from trl_ext.report.evidence import above, state
from trl_ext.report.read_run import Run

from .finding import ADVICE, WARNING, Finding, Found, Unknown, lasting, missing, too_few

TINY = 0.05  # of the mean denominator
HUGE = 10.0  # advantage
SPIKE, SPIKES, LARGE_SPIKE = 20.0, 3, 100.0  # gradient norm over the median of the 50 before
LOG_PROBS_APART = "sampling/sampling_logp_difference/mean"
MISMATCH = 0.05  # nats a token, mean absolute
SLOW_REWARDS = 0.5  # of a step's seconds


def tiny_denominators(run: Run) -> Found:
    steps, smallest = run.series("normalization/scale_min")
    if not steps:
        return missing("normalization/scale_min")
    mean = dict(zip(*run.series("normalization/scale_mean"), strict=True))
    ratios = [value / mean[step] if mean.get(step) else 1.0 for step, value in zip(steps, smallest, strict=True)]

    def evidence(ratio: float) -> str:
        return (
            f"the smallest denominator of a batch is {ratio:.1%} of the mean one: tiny differences count as much as "
            "large ones"
        )

    remedy = (
        "normalization='power' (alpha 0.5), 'batch_std' or 'mean'; a larger eps (normalization_kwargs); rewards "
        "without tiny differences."
    )
    return lasting((steps, ratios), {WARNING: lambda ratio: ratio < TINY}, evidence, remedy)


def coefficient_spikes(run: Run) -> Found:
    name = "normalization/advantage_max"
    steps, values = run.series(name)
    if not steps:
        return missing(name)
    if not run.series("normalization/scale_mean")[0]:
        return Unknown(f"{missing('normalization/scale_mean').reason}: undivided advantages have the reward's unit")
    generations = run.config.get("num_generations")
    border = max(HUGE, 1.5 * math.sqrt(generations)) if isinstance(generations, int) else HUGE
    spikes = [(step, value) for step, value in zip(steps, values, strict=True) if value > border]
    if len(spikes) < SPIKES:
        return None
    largest = max(value for _, value in spikes)
    evidence = f"{len(spikes)} of {len(values)} logged steps have an advantage above {border:g}, up to {largest:.3g}"
    remedy = "Scale or clip the rewards; normalization='std' bounds an advantage by the root of num_generations."
    level = WARNING if spikes[-1][0] > steps[len(steps) // 2] else ADVICE
    return Finding(level, spikes[0][0], evidence, (len(spikes) + 1) / (len(spikes) + 2), remedy)


def gradient_spikes(run: Run) -> Found:
    steps, values = run.series("grad_norm")
    if len(values) < 10:
        return too_few(run, 10, "grad_norm")
    spikes = []
    for i in range(5, len(values)):
        before = [value for value in values[max(0, i - 50) : i] if value > 0]
        median = statistics.median(before) if before else 0.0
        if median > 0 and values[i] > SPIKE * median:
            spikes.append((steps[i], values[i] / median))
    if not spikes:
        return None
    largest = max(ratio for _, ratio in spikes)
    lately = spikes[-1][0] > steps[len(steps) // 2]
    level = WARNING if lately and (largest > LARGE_SPIKE or len(spikes) >= SPIKES) else ADVICE
    evidence = f"the gradient's norm is up to {largest:.0f} times the median before it, {len(spikes)} times"
    remedy = "max_grad_norm (1 or less), a lower learning_rate; look at the rewards and the denominators of that step."
    return Finding(level, spikes[0][0], evidence, (len(spikes) + 1) / (len(spikes) + 2), remedy)


def sampler_mismatch(run: Run) -> Found:
    series = run.series(LOG_PROBS_APART)
    if not series[0]:
        return Unknown(f"{missing(LOG_PROBS_APART).reason} (TRL logs it with use_vllm=True)")
    effective = run.series("sampler/ess")[1]
    share = f"; an effective sample of {np.mean(effective):.0%} of the answers" if effective else ""

    def evidence(nats: float) -> str:
        return f"sampler and trainer differ by {nats:.3f} nats a token in what they sampled{share}"

    remedy = (
        "The same precision in both, no top_p, top_k or min_p (they bias the ratio), "
        "vllm_importance_sampling_correction=True."
    )
    return lasting(series, {WARNING: lambda nats: nats > MISMATCH}, evidence, remedy)


def slow_rewards(run: Run) -> Found:
    parts = {n: run.series(f"compute/seconds_{n}")[1] for n in ("generation", "rewards", "log_probs", "training")}
    steps, rewards = run.series("compute/seconds_rewards")
    if not rewards or not parts["training"]:
        return missing("compute/seconds_rewards")
    whole = sum(float(np.sum(values)) for values in parts.values())
    share = float(np.sum(rewards)) / max(whole, 1e-9)
    if share <= SLOW_REWARDS or len(rewards) < 3:
        return None
    evidence = f"{share:.0%} of the time goes into reward functions ({np.mean(rewards):.1f} s a step)"
    remedy = "Reward functions that work in parallel (async ones run together), or are cheaper."
    found = state(steps, rewards, above(0.0))
    return Finding(ADVICE, steps[0], evidence, found.confidence if found is not None else 0.5, remedy)
