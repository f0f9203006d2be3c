"""Suggests what to change next: at most three options to set, each with its measured effect, or "not measured"."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trl_ext.options import SCALE_REWARDS_METHOD

from .evidence import ends
from .read_run import Run
from .verdicts import Diagnosis

MOST = 3
UNKNOWN = "not measured"
HARD = 0.2  # mean reward below which prompts are hard
# measured effects on accuracy, from docs/which-normalisation.md
STD = "over mean, verified rewards: +0.009 with 8 answers, +0.027 with 32; 10 % wrong: about 0 (log-linear policy)"
MAX_RL = "over std, verified rewards: +0.023 ± 0.004; 10 % wrong: -0.006 ± 0.005, at worst -0.066 (log-linear policy)"


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


def overlong_penalty(config: Mapping[str, Any]) -> str | None:
    """TRL's own penalty on length, for the run's limit."""
    limit = config.get("max_completion_length")
    return f"reward_funcs=[yours, get_soft_overlong_punishment({limit}, {limit // 4})]" if limit else None


# verdict -> the options that answer it, the first that can be said is taken
ANSWERS: dict[str, tuple[Suggest, ...]] = {
    "length_limit": (scaled("max_completion_length", 2),),
    "fell": (scaled("learning_rate", 1 / 3),),
    "divergence": (scaled("beta", 4), scaled("learning_rate", 1 / 3)),
    "entropy_collapse": (scaled("learning_rate", 0.5), fixed("epsilon_high=0.28")),
    "entropy_rise": (scaled("learning_rate", 0.5),),
    "gradient_spikes": (fixed("max_grad_norm=1.0"), scaled("learning_rate", 0.5)),
    "clip_share": (fixed("num_iterations=1"), scaled("learning_rate", 0.5)),
    "tiny_denominators": (fixed("normalization='power'"),),
    "coefficient_spikes": (fixed("normalization='std'"),),
    "dominated": (fixed("normalization='std'"), fixed("normalization='rank'")),
    "length_hacking": (overlong_penalty, fixed("loss_type='dr_grpo'")),
    "repetition": (fixed("repetition_penalty=1.05"),),
    "sampler_mismatch": (fixed("vllm_importance_sampling_correction=True"),),
    "all_wrong": (scaled("num_generations", 2),),
    "few_live_prompts": (scaled("per_device_train_batch_size", 2),),
    "no_progress": (scaled("learning_rate", 3),),
    "unreliable": (scaled("num_generations", 2),),
}


def next_experiment(run: Run, diagnosis: Diagnosis) -> list[Change]:
    """At most three changes: what verdicts ask for; where none is critical also the normalisation and the rate."""
    found = [change for verdict in diagnosis.verdicts if (change := _answer(verdict.name, verdict.title, run))]
    if diagnosis.worst != "critical":
        found += _normalisation(run)
        if (rate := scaled("learning_rate", 2)(run.config)) is not None:
            found.append(Change(rate, "the rate moved built-in runs more than the normalisation did: sweep it"))
    names: dict[str, Change] = {}
    for change in found:
        names.setdefault(change.option.partition("=")[0], change)
    return list(names.values())[:MOST]


def _answer(name: str, title: str, run: Run) -> Change | None:
    options = (suggest(run.config) for suggest in ANSWERS.get(name, ()))
    option = next((one for one in options if one is not None), None)
    return None if option is None else Change(option, title)


def _normalisation(run: Run) -> list[Change]:
    """By docs/which-normalisation.md, for rewards in [0, 1]; the log can't tell whether they are verified."""
    used = run.config.get("normalization") or SCALE_REWARDS_METHOD.get(str(run.config.get("scale_rewards", "")))
    rewards = run.series("reward")[1]
    if run.last("curvature/speedup_constant") is None or not rewards or used is None:
        return []
    found = []
    if used != "max_rl" and (first := ends(rewards)[0]) < HARD:
        reason = f"hard prompts (mean reward {first:.2f} at first), only if the rewards are verified"
        found.append(Change("normalization='max_rl'", reason, MAX_RL))
    if used in ("mean", "loo", "none"):
        found.append(Change("normalization='std'", "only if the rewards are verified", STD))
    return found
