"""Suggests what to change next: at most three options to set, each with its measured effect, or "not measured"."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trl_ext.options import SCALE_REWARDS_METHOD

from .evidence import ends, sampling_error
from .read_run import Run
from .verdicts import Diagnosis

MOST = 3
UNKNOWN = "not measured"
HARD = 0.2  # pass rate below which prompts are hard
# measured effects on accuracy, from docs/which-normalisation.md
STD = "over mean -0.002 [-0.005, +0.002] on a small policy; +0.009 (8 answers), +0.027 (32) in a simulation"
MAX_RL = "over std +0.021 [-0.010, +0.051] on a small policy with hard prompts, +0.023 ± 0.004 in a simulation"
NONE = (
    "over std +0.009 [+0.003, +0.016] on a small policy, a third of its prompts never and a third nearly always solved"
)
RATE = "a factor of 2 off the best cost 0.01 to 0.11 of mean accuracy (built-in arithmetic, AdamW, four methods)"
DEAD = 0.3  # share of groups from which other prompts are worth a word
MOSTLY_DEAD = 0.5  # where NONE was measured it was 0.7


@dataclass(frozen=True)
class Change:
    """``option``: as it is set in the configuration; ``reason``: what it answers; ``effect``: measured, or not."""

    option: str
    reason: str
    effect: str = UNKNOWN


Suggest = Callable[[Mapping[str, Any]], str | None]  # from the configuration; None where it can't be said


def scaled(name: str, factor: float) -> Suggest:
    """The option times a factor; None where the run's value isn't known or 0."""

    def suggest(config: Mapping[str, Any]) -> str | None:
        value = config.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value:
            return None
        changed = value * factor
        return f"{name}={round(changed)}" if isinstance(value, int) else f"{name}={changed:.3g}"

    return suggest


def fixed(text: str) -> Suggest:
    """The option as it stands; None where the run has it already."""
    name, _, value = text.partition("=")
    return lambda config: None if str(config.get(name)) == value.strip("'") else text


# verdict -> the options that answer it, the first that can be said is taken
ANSWERS: dict[str, tuple[Suggest, ...]] = {
    "length_limit": (scaled("max_completion_length", 2),),
    "fell": (scaled("learning_rate", 0.5),),
    "divergence": (scaled("beta", 4), scaled("learning_rate", 0.5)),
    "entropy_collapse": (scaled("learning_rate", 0.5), fixed("epsilon_high=0.28")),
    "entropy_rise": (scaled("learning_rate", 0.5),),
    "gradient_spikes": (fixed("max_grad_norm=1.0"), scaled("learning_rate", 0.5)),
    "clip_share": (fixed("num_iterations=1"), scaled("learning_rate", 0.5)),
    "tiny_denominators": (fixed("normalization='power'"),),
    "coefficient_spikes": (fixed("normalization='std'"),),
    "dominated": (fixed("normalization='std'"), fixed("normalization='rank'")),
    "repetition": (fixed("repetition_penalty=1.05"),),
    "sampler_mismatch": (fixed("vllm_importance_sampling_correction=True"),),
    "all_wrong": (fixed("log_completions=True"),),
    "few_live_prompts": (scaled("per_device_train_batch_size", 2),),
    "no_progress": (scaled("learning_rate", 3),),
    "unreliable": (scaled("per_device_train_batch_size", 2),),
}


def next_experiment(run: Run, diagnosis: Diagnosis) -> list[Change]:
    """At most three changes: the reward where it is hacked; else what verdicts ask for, other prompts where many groups
    are dead, and where nothing is wrong the normalisation and a sweep of the rate."""
    if hacked(run):
        reason = "the reward rose while the held-out accuracy fell: it pays for something other than being right"
        return [Change("reward_funcs=[another reward]", reason)]
    found = [change for verdict in diagnosis.verdicts if (change := _answer(verdict.name, verdict.title, run))]
    found += _prompts(run)
    if diagnosis.worst in (None, "advice"):
        found += [*_normalisation(run), *_sweep(run)]
    names: dict[str, Change] = {}
    for change in found:
        names.setdefault(change.option.partition("=")[0], change)
    return list(names.values())[:MOST]


def hacked(run: Run) -> bool:
    """Whether the reward rose by a tenth of its range while the held-out accuracy fell by 0.1 and two errors."""
    rewards, accuracies = run.series("reward")[1], run.series("eval_accuracy")[1]
    if len(rewards) < 4 or len(accuracies) < 2:
        return False
    before, after = ends(rewards)
    rose = after - before > max(0.1 * (max(rewards) - min(rewards)), 0.02)
    error = sampling_error(run.evaluated_questions, (accuracies[0], accuracies[-1]))
    return rose and accuracies[0] - accuracies[-1] > max(0.1, 2 * error)


def used_method(config: Mapping[str, Any]) -> str | None:
    """The run's normalisation, also where only TRL's ``scale_rewards`` says it."""
    return config.get("normalization") or SCALE_REWARDS_METHOD.get(str(config.get("scale_rewards", "")))


def untried(changes: list[Change], others: Sequence[Mapping[str, Any]]) -> list[Change]:
    """Leaves out a normalisation that another run on the page has."""
    tried = {f"normalization={used_method(config)!r}" for config in others}
    return [change for change in changes if change.option not in tried]


def _answer(name: str, title: str, run: Run) -> Change | None:
    config = {**run.config, "normalization": used_method(run.config)}
    options = (suggest(config) for suggest in ANSWERS.get(name, ()))
    option = next((one for one in options if one is not None), None)
    return None if option is None else Change(option, title)


def _normalisation(run: Run) -> list[Change]:
    """By docs/which-normalisation.md, for rewards in [0, 1]; the log can't tell whether they are verified."""
    used = used_method(run.config)
    rewards = run.series("accuracy")[1] or run.series("reward")[1]
    if run.last("curvature/speedup_constant") is None or not rewards or used is None:
        return []
    found = []
    if used != "max_rl" and (first := ends(rewards)[0]) < HARD:
        reason = f"hard prompts (pass rate {first:.2f} at first); only if the rewards are verified"
        found.append(Change("normalization='max_rl'", reason, MAX_RL))
    if used in ("mean", "loo"):
        found.append(Change("normalization='std'", "only if the rewards are verified", STD))
    return found


def _prompts(run: Run) -> list[Change]:
    """Harder or easier prompts, where a share of ``DEAD`` of the groups is dead, mostly of one kind; else ``none``."""
    dead, right, wrong = (
        float(np.mean(values)) if (values := run.series(f"normalization/{kind}_frac")[1]) else 0.0
        for kind in ("zero_variance", "all_right", "all_wrong")
    )
    if dead < DEAD:
        return []
    if max(right, wrong) < 2 / 3 * dead:
        reason = f"{dead:.0%} of the groups are dead, of both kinds; only if the rewards are verified"
        applies = dead >= MOSTLY_DEAD and used_method(run.config) == "std"
        return [Change("normalization='none'", reason, NONE)] if applies else []
    kind, share = ("harder", right) if right > wrong else ("easier", wrong)
    reward = "a high" if right > wrong else "a low"
    return [Change(f"train_dataset=[{kind} prompts]", f"in {share:.0%} of the groups all answers got {reward} reward")]


def _sweep(run: Run) -> list[Change]:
    rates = [scaled("learning_rate", factor)(run.config) for factor in (0.25, 0.5, 2, 4)]
    if None in rates:
        return []
    others = ", ".join(str(rate).partition("=")[2] for rate in rates)
    return [Change(f"learning_rate={others}", "with this run's rate a sweep of five", RATE)]
