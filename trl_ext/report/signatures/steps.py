"""Of a step's numbers: denominators, advantages, gradients, ratios, seconds."""

from __future__ import annotations

import math

import numpy as np

from trl_ext.report.evidence import State, above, state
from trl_ext.report.read_run import Run

from .finding import ADVICE, CRITICAL, WARNING, Finding, Unknown, graded, lasting, missing, too_few

TINY = 0.05  # of the mean denominator
HUGE = 10.0  # advantage
SPIKE, SPIKES, LARGE_SPIKE = 20.0, 3, 100.0  # gradient norm over the median of the 50 before
CLIPPED = 0.2  # of tokens
KL, LARGE_KL = 1.0, 10.0  # nats a token
MISMATCH = 0.05  # nats a token, mean absolute
SLOW_REWARDS = 0.5  # of a step's seconds


def tiny_denominators(run: Run) -> Finding | Unknown | None:
    steps, least = run.series("normalization/scale_min")
    mean_steps, mean = run.series("normalization/scale_mean")
    if not steps:
        return missing("normalization/scale_min")
    of_step = dict(zip(mean_steps, mean, strict=True))
    ratios = [value / of_step[step] if of_step.get(step) else 1.0 for step, value in zip(steps, least, strict=True)]
    found = state(steps, ratios, lambda ratio: ratio < TINY, low=True)
    if found is None:
        return None
    evidence = (
        f"the smallest denominator of a batch is {found.mean:.1%} of the mean one: tiny differences count as "
        "much as large ones"
    )
    remedy = (
        "normalization='power' (alpha 0.5), 'batch_std' or 'mean'; a larger eps (normalization_kwargs); rewards "
        "without tiny differences."
    )
    return Finding(WARNING, found.onset, evidence, found.confidence, remedy)


def coefficient_spikes(run: Run) -> Finding | Unknown | None:
    name = "normalization/advantage_max"
    steps, values = run.series(name)
    if not steps:
        return missing(name)
    if not run.series("normalization/scale_mean")[0]:
        return Unknown("the normalisation doesn't divide: advantages have the reward's unit")
    generations = run.config.get("num_generations")
    border = max(HUGE, 1.5 * math.sqrt(generations)) if isinstance(generations, int) else HUGE
    spikes = [(step, value) for step, value in zip(steps, values, strict=True) if value > border]
    if len(spikes) < SPIKES:
        return None
    lately = sum(step > steps[len(steps) // 2] for step, _ in spikes) > 0
    largest = max(value for _, value in spikes)
    evidence = f"{len(spikes)} of {len(values)} logged steps have an advantage above {border:g}, up to {largest:.3g}"
    remedy = "Scale or clip the rewards; normalization='std' bounds an advantage by the root of num_generations."
    level = WARNING if lately else ADVICE
    return Finding(level, spikes[0][0], evidence, (len(spikes) + 1) / (len(spikes) + 2), remedy)


def gradient_spikes(run: Run) -> Finding | Unknown | None:
    steps, values = run.series("grad_norm")
    if len(values) < 10:
        return too_few(run, 10, "grad_norm")
    spikes = []
    for i in range(5, len(values)):
        before = [value for value in values[max(0, i - 50) : i] if value > 0]
        median = float(np.median(before)) if before else 0.0
        if median > 0 and values[i] > SPIKE * median:
            spikes.append((steps[i], values[i] / median))
    large = [one for one in spikes if one[1] > LARGE_SPIKE]
    if not spikes:
        return None
    lately = spikes[-1][0] > steps[len(steps) // 2]
    level = WARNING if lately and (large or len(spikes) >= SPIKES) else ADVICE
    evidence = (
        f"the gradient's norm is up to {max(r for _, r in spikes):.0f} times the median before it, {len(spikes)} times"
    )
    remedy = "max_grad_norm (1 or less), a lower learning_rate; look at the rewards and the denominators of that step."
    return Finding(level, spikes[0][0], evidence, (len(spikes) + 1) / (len(spikes) + 2), remedy)


def clip_share(run: Run) -> Finding | Unknown | None:
    def told(found: State) -> str:
        return f"{found.mean:.0%} of the tokens are clipped: the policy has moved far from the one that answered"

    remedy = "Fewer num_iterations or steps_per_generation, or a lower learning_rate; epsilon_high above 0.2."
    return lasting(run, "clip_ratio/region_mean", lambda share: share > CLIPPED, WARNING, told, remedy)


def divergence(run: Run) -> Finding | Unknown | None:
    steps, values = run.series("kl")
    if not steps:
        return Unknown("kl is not in the log (beta=0)")
    level, found = graded(steps, values, {CRITICAL: LARGE_KL, WARNING: KL})
    if level is None or found is None:
        return None
    evidence = f"the policy is {found.mean:.2g} nats a token from its reference"
    return Finding(level, found.onset, evidence, found.confidence, "A larger beta, or a lower learning_rate.")


def sampler_mismatch(run: Run) -> Finding | Unknown | None:
    name = "sampling/sampling_logp_difference/mean"
    if not run.series(name)[0]:
        return Unknown("no sampler of its own (use_vllm=False)")

    effective = run.series("sampler/ess")[1]

    def told(found: State) -> str:
        share = f"; an effective sample of {np.mean(effective):.0%} of the answers" if len(effective) else ""
        return f"sampler and trainer differ by {found.mean:.3f} nats a token in what they sampled{share}"

    remedy = (
        "The same precision in both, no top_p, top_k or min_p (they bias the ratio), "
        "vllm_importance_sampling_correction=True."
    )
    return lasting(run, name, lambda nats: nats > MISMATCH, WARNING, told, remedy)


def slow_rewards(run: Run) -> Finding | Unknown | None:
    parts = {n: run.series(f"compute/seconds_{n}")[1] for n in ("generation", "rewards", "log_probs", "training")}
    if not parts["rewards"] or not parts["training"]:
        return missing("compute/seconds_rewards")
    whole = sum(float(np.sum(values)) for values in parts.values())
    share = float(np.sum(parts["rewards"])) / max(whole, 1e-9)
    if share <= SLOW_REWARDS or len(parts["rewards"]) < 3:
        return None
    evidence = f"{share:.0%} of the time goes into reward functions ({np.mean(parts['rewards']):.1f} s a step)"
    remedy = "Reward functions that work in parallel (async ones run together), or are cheaper."
    found = state(*run.series("compute/seconds_rewards"), above(0.0))
    sure = found.confidence if found is not None else 0.5
    return Finding(ADVICE, run.series("compute/seconds_rewards")[0][0], evidence, sure, remedy)
