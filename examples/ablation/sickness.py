"""Sicknesses of several strengths, injected into the logs of healthy runs, for how often a signature finds them.

Each changes the metrics that one signature reads, by default from step 31 of 60 on. The other metrics stay as the
healthy run logged them, with their noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from grpo_kernels.recorder.files import InterferenceRecord

Line = dict[str, float]
Records = list[InterferenceRecord]
Random = np.random.Generator
Change = Callable[[list[Line], float, Random], list[Line]]
ONSET = 31  # the first sick step
PROMPTS, ANSWERS = 16, 128  # of a step


@dataclass(frozen=True)
class Sickness:
    """``strengths``: weak, medium, strong, of what ``unit`` names. One of ``change`` and ``change_records`` is set."""

    unit: str
    strengths: tuple[float, float, float]
    change: Change | None = None
    change_records: Callable[[Records, float], Records] | None = None

    def inject(self, lines: Sequence[Line], records: Records, strength: float, seed: int) -> tuple[list[Line], Records]:
        """Copies of the log's lines and of the measured steps, made sick."""
        copied, rng = [dict(line) for line in lines], np.random.default_rng(seed)
        changed = self.change(copied, strength, rng) if self.change else copied
        return changed, self.change_records(records, strength) if self.change_records else records


def sick(lines: list[Line], kind: str = "loss") -> list[Line]:
    """The lines since the onset that have ``kind``: by default those of training steps."""
    return [line for line in lines if line["step"] >= ONSET and kind in line]


def each(change: Callable[[Line, float, Random], dict[str, float]], kind: str = "loss") -> Change:
    """Updates every line since the onset."""

    def changed(lines: list[Line], strength: float, rng: Random) -> list[Line]:
        for line in sick(lines, kind):
            line.update(change(line, strength, rng))
        return lines

    return changed


def share(column: str, of: int) -> Change:
    """Draws a share of so many groups or answers."""
    return each(lambda line, share, rng: {column: rng.binomial(of, share) / of})


def around(column: str, spread: float = 0.2) -> Change:
    """A level with multiplicative noise."""
    return each(lambda line, level, rng: {column: level * math.exp(spread * rng.normal())})


def at_some(column: str, count: int, change: Callable[[Line, float], float]) -> Change:
    """Changes ``count`` random steps."""

    def changed(lines: list[Line], strength: float, rng: Random) -> list[Line]:
        steps = [line for line in sick(lines) if column in line]
        for place in rng.choice(len(steps), count, replace=False):
            steps[place][column] = change(steps[place], strength)
        return lines

    return changed


def not_finite(lines: list[Line], count: float, rng: Random) -> list[Line]:
    for line in sick(lines)[: int(count)]:
        line["loss"] = math.nan
    return lines


def dead(*kinds: str) -> Change:
    """Groups whose answers are all right or all wrong."""

    def groups(line: Line, share: float, rng: Random) -> dict[str, float]:
        count = rng.binomial(PROMPTS, share)
        counts = {kind: (count + place) // len(kinds) for place, kind in enumerate(kinds)}
        found = {f"normalization/all_{kind}_frac": count / PROMPTS for kind, count in counts.items()}
        return {**found, "normalization/zero_variance_frac": count / PROMPTS}

    return each(groups)


def fall(lines: list[Line], drop: float, rng: Random) -> list[Line]:
    """Rewards and held-out scores fall by ``drop`` within ten steps."""
    for line in lines:
        lost = drop * min(max(line["step"] - ONSET + 1, 0) / 10, 1)
        for column in ("reward", "accuracy", "eval_reward", "eval_accuracy"):
            if column in line:
                line[column] = max(line[column] - lost, 0.0)
    return lines


def held_out_apart(lines: list[Line], gap: float, rng: Random) -> list[Line]:
    for line in sick(lines, "eval_accuracy"):
        line.update({name: line[name] - gap for name in ("eval_accuracy", "eval_reward")})
    return lines


def flat(lines: list[Line], steps: float, rng: Random) -> list[Line]:
    """So many steps without progress: the first reward, and the residuals' noise in blocks of eight."""
    logged = [line for line in lines if "reward" in line]
    rewards = np.array([line["reward"] for line in logged])
    trend = np.convolve(np.pad(rewards, 5, mode="edge"), np.ones(11) / 11, mode="valid")
    residuals = (rewards - trend) / math.sqrt(1 - 1 / 11)
    starts = rng.integers(0, len(residuals) - 8, math.ceil(steps / 8))
    noise = np.concatenate([residuals[start : start + 8] for start in starts])[: int(steps)]
    spread = logged[0]["reward_std"]
    return [
        {"step": step, "loss": 0.0, "reward": float(np.mean(rewards[:10]) + one), "reward_std": spread}
        for step, one in enumerate(noise, 1)
    ]


def cut_off(line: Line, share: float, rng: Random) -> dict[str, float]:
    cut, longest = rng.binomial(ANSWERS, share) / ANSWERS, 4.0
    length = cut * longest + (1 - cut) * line["completions/mean_length"]
    return {"completions/clipped_ratio": cut, "completions/max_length": longest, "completions/mean_length": length}


def longer(lines: list[Line], factor: float, rng: Random) -> list[Line]:
    """Answers of 40 tokens in place of two, which grow within ten steps; what is held out stays as it was."""
    start = next(line["eval_accuracy"] for line in lines if "eval_accuracy" in line)
    for line in lines:
        grown = min(max(line["step"] - ONSET + 1, 0) / 10, 1)
        if "completions/mean_length" in line:
            line["completions/mean_length"] *= 20 * (1 + (factor - 1) * grown)
        if "eval_accuracy" in line:
            line["eval_accuracy"] = start + 0.02 * float(rng.normal())
    return lines


def slow_rewards(lines: list[Line], share: float, rng: Random) -> list[Line]:
    """From the start on."""
    for line in lines:
        if "compute/seconds_training" in line:
            rest = line.get("compute/seconds_generation", 0.0) + line["compute/seconds_training"]
            line["compute/seconds_rewards"] = share / (1 - share) * rest
    return lines


def against_theory(lines: list[Line], correlation: float, rng: Random) -> list[Line]:
    """The correlations' mean is ``correlation`` from the start on: their own scatter is around it."""
    measured = [line for line in lines if "curvature/directional_corr" in line]
    mean = float(np.mean([line["curvature/directional_corr"] for line in measured])) if measured else 0.0
    for line in measured:
        line["curvature/directional_corr"] += correlation - mean
    return lines


def larger_prompt(records: Records, factor: float) -> Records:
    """The first prompt's gradient is ``factor`` times as large."""
    changed = []
    for record in records:
        gram = record.gram_PP.copy()
        if record.step >= ONSET:
            gram[0, :] *= factor
            gram[:, 0] *= factor
        changed.append(replace(record, gram_PP=gram))
    return changed


def opposed(records: Records, mean: float) -> Records:
    """The cosine of the even and the odd prompts' sums has this mean, from the start on; its scatter is as it was."""
    sums = []
    for record in records:
        a, b, product = (float(record.gram_PP[i::2, j::2].sum()) for i, j in ((0, 0), (1, 1), (0, 1)))
        sums.append((math.sqrt(max(a, 0.0) * max(b, 0.0)), product))
    healthy = float(np.mean([product / norms for norms, product in sums if norms > 0]))
    changed = []
    for record, (norms, _) in zip(records, sums, strict=True):
        gram = record.gram_PP.copy()
        more = (mean - healthy) * norms / gram[::2, 1::2].size
        gram[::2, 1::2] += more
        gram[1::2, ::2] += more
        changed.append(replace(record, gram_PP=gram))
    return changed


def live_prompts(line: Line, mean: float, rng: Random) -> dict[str, float]:
    return {"interference/live_prompts": rng.binomial(PROMPTS, mean / PROMPTS)}


def less_entropy(line: Line, factor: float, rng: Random) -> dict[str, float]:
    return {name: factor * line[name] for name in ("entropy", "entropy_live") if name in line}


def more_entropy(line: Line, nats: float, rng: Random) -> dict[str, float]:
    return {name: line[name] + nats for name in ("entropy", "entropy_live") if name in line}


def small_denominator(line: Line, ratio: float, rng: Random) -> dict[str, float]:
    return {"normalization/scale_min": ratio * line["normalization/scale_mean"]}


def uncovered(line: Line, share: float, rng: Random) -> dict[str, float]:
    return {"interference/coverage": share * line["interference/coverage"]}


SICKNESSES = {
    "not_finite": Sickness("NaN losses", (1, 3, 10), not_finite),
    "all_wrong": Sickness("groups", (0.9, 0.98, 1.0), dead("wrong")),
    "all_right": Sickness("groups", (0.9, 0.98, 1.0), dead("right")),
    "mostly_dead": Sickness("groups", (0.9, 0.98, 1.0), dead("right", "wrong")),
    "few_live_prompts": Sickness("live prompts", (4, 2, 1), each(live_prompts, "interference/live_prompts")),
    "unscored": Sickness("answers", (0.05, 0.15, 0.5), share("normalization/unscorable_frac", ANSWERS)),
    "fell": Sickness("reward lost", (0.1, 0.2, 0.4), fall),
    "no_progress": Sickness("flat steps", (60, 150, 300), flat),
    "gap": Sickness("held-out lower by", (0.1, 0.2, 0.3), held_out_apart),
    "length_limit": Sickness("answers", (0.3, 0.6, 0.98), each(cut_off, "completions/mean_length")),
    "repetition": Sickness("share", (0.3, 0.6, 0.9), around("completions/repetition", 0.05)),
    "entropy_collapse": Sickness("entropy times", (0.2, 0.05, 0.01), each(less_entropy)),
    "entropy_rise": Sickness("nats more", (0.3, 0.8, 2.0), each(more_entropy)),
    "length_hacking": Sickness("length times", (1.5, 2.5, 4.0), longer),
    "tiny_denominators": Sickness(
        "least over mean",
        (0.1, 0.03, 0.003),
        each(small_denominator, "normalization/scale_mean"),
    ),
    "coefficient_spikes": Sickness(
        "three advantages", (6, 15, 100), at_some("normalization/advantage_max", 3, lambda _, size: size)
    ),
    "gradient_spikes": Sickness(
        "norm times", (10, 30, 300), at_some("grad_norm", 1, lambda line, factor: factor * line["grad_norm"])
    ),
    "clip_share": Sickness("tokens", (0.1, 0.3, 0.6), around("clip_ratio/region_mean")),
    "divergence": Sickness("nats a token", (0.5, 2, 20), around("kl")),
    "sampler_mismatch": Sickness("nats a token", (0.02, 0.1, 0.5), around("sampling/sampling_logp_difference/mean")),
    "slow_rewards": Sickness("seconds", (0.3, 0.6, 0.9), slow_rewards),
    "uncovered": Sickness("coverage times", (0.95, 0.8, 0.5), each(uncovered, "interference/coverage")),
    "contradicts_theory": Sickness("correlation", (-0.05, -0.2, -0.5), against_theory),
    "dominated": Sickness("prompt times", (2, 5, 20), change_records=larger_prompt),
    "task_conflict": Sickness("cosine", (-0.05, -0.2, -0.5), change_records=opposed),
}
