"""What other libraries' metrics are called here. A name is in the table only if it means the same, in the same unit.

Our own names map to themselves. TRL's trainers log them too; transformers' callbacks put ``train/`` before them and
``eval/`` in place of ``eval_`` (``rewrite_logs``, transformers 5.23, integration_utils.py:550).
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..sections import MAIN_CHART, SECTIONS
from .rows import STEPS, Series

# what charts don't show, and signatures, the first screen and comparisons read
MORE = (
    *("loss", "learning_rate", "epoch", "reward_std", "accuracy", "frac_reward_zero_std", "step_time"),
    *("eval_runtime", "eval_samples_per_second", "clip_ratio/region_mean", "normalization/unscorable_frac"),
    *("sampling/sampling_logp_difference/mean", "sampler/ess", "interference/live_prompts", "interference/coverage"),
    *("interference/sketch_rmse", "interference/sketch_check", "interference/reliability", "curvature/sigma_mean"),
)
CURVES = [MAIN_CHART, *(chart for section in SECTIONS.values() for chart in section.curves)]
OURS = {*MORE, *(name for chart in CURVES for name in chart.metrics)}
PATTERNS = [re.compile(chart.pattern) for chart in CURVES if chart.pattern] + [re.compile(r"rewards/.+/std")]

# Their name, a regular expression -> ours. Of two rows with one target the upper one counts.
TABLE = {
    # ---- verl 0.9.1
    # verl/trainer/ppo/metric_utils.py:556. The summed rewards of an answer; critic/rewards/mean has the KL penalty too
    r"critic/score/mean": "reward",
    # metric_utils.py:573-576; clip_ratio: the share of answers as long as max_response_length
    r"response_length/mean": "completions/mean_length",
    r"response_length/max": "completions/max_length",
    r"response_length/min": "completions/min_length",
    r"response_length/clip_ratio": "completions/clipped_ratio",
    # verl/trainer/ppo/ray_trainer.py:1597. By loss_agg_mode: nats a token with the default, token-mean
    r"actor/entropy": "entropy",
    # verl/workers/engine_workers.py:214, before clipping; actor/ by ray_trainer.py:1371
    r"actor/grad_norm": "grad_norm",
    # verl/trainer/ppo/core_algos.py:1372: tokens that the clipped loss takes the gradient from, as TRL's region_mean
    r"actor/pg_clipfrac": "clip_ratio/region_mean",
    # ray_trainer.py:736: of a data source; several sources need a choice (--names)
    r"val-core/.+/acc/mean@\d+": "eval_accuracy",
    r"val-core/.+/reward/mean@\d+": "eval_reward",
    # metric_utils.py:686
    r"perf/time_per_step": "step_time",
    # Left out: actor/kl_loss (until 0.7 the sum over a step's mini-batches, and 0 where there is no reference),
    # actor/pg_loss (the same sum), actor/ppo_kl (from the policy that sampled, not from the reference),
    # training/epoch (counts whole epochs from 0), critic/advantages/* (of tokens),
    # training/rollout_probs_diff_mean (of probabilities, not of their logarithms), timing_s/* (of its own stages).
    # ---- prime-rl, commit 559b44772 (August 2026)
    # src/prime_rl/orchestrator/orchestrator.py:700 and metrics.py:247. "all": every answer of the step, as in TRL;
    # failed ones have reward 0. "effective" has only answers with an advantage (train_sink.py:361): where one of eight
    # answers is right now and then, its reward stays 0.125 while that of all goes to 0. Several agents need a choice
    r"train/agg/all/[^/]+/reward/mean": "reward",
    r"train/agg/all/[^/]+/num_output_tokens/mean": "completions/mean_length",
    r"train/agg/all/[^/]+/num_output_tokens/max": "completions/max_length",
    r"train/agg/all/[^/]+/num_output_tokens/min": "completions/min_length",
    # metrics.py:217; is_truncated/mean counts prompts that were too long as well
    r"train/agg/all/[^/]+/stop_condition/generation_truncated": "completions/clipped_ratio",
    # metrics.py:236-240: groups whose rewards are all 0, and all 1. solved_some isn't the live share of graded rewards
    r"train/agg/all/[^/]+/solved_none": "normalization/all_wrong_frac",
    r"train/agg/all/[^/]+/solved_all": "normalization/all_right_frac",
    # metrics.py:385: the mean reward of an evaluation's answers that didn't fail; environments' names may have slashes
    r"eval/.+/effective/[^/]+/avg@\d+": "eval_reward",
    # src/prime_rl/trainer/rl/train.py:484, 485, 666; over the tokens that are trained on
    r"entropy/all/mean": "entropy",
    r"loss/mean": "loss",
    r"optim/grad_norm": "grad_norm",
    r"optim/lr": "learning_rate",
    # until June 2026 (9f425fffc^), W&B alone: orchestrator/metrics.py:112, 115; until August 2025 (dceaade81),
    # orchestrator.py:388
    r"reward/all/mean": "reward",
    r"reward/mean": "reward",
    r"solve_none/all": "normalization/all_wrong_frac",
    r"solve_all/all": "normalization/all_right_frac",
    # Left out: mismatch_kl/* (a KL estimate, not the mean difference of log-probs), seq_len/* (with the prompt),
    # is_masked/mean (by a difference of probabilities), time/step (trainer and orchestrator write it to one file).
}
SHARES = (0.0, 1.0)
# what our metrics can be: a value beyond is a percentage, a sum, or something else
RANGES = {
    **dict.fromkeys(("completions/clipped_ratio", "frac_reward_zero_std", "eval_accuracy", "accuracy"), SHARES),
    **{name: SHARES for name in OURS if name.endswith("_frac") or name == "clip_ratio/region_mean"},
    "entropy": (0.0, 15.0),  # nats a token; a vocabulary of 3 million has 15
    "entropy_live": (0.0, 15.0),
    "grad_norm": (0.0, math.inf),
    "completions/mean_length": (0.0, math.inf),
}
ROUNDING = 1e-3


def is_ours(name: str) -> bool:
    return name in OURS or any(pattern.fullmatch(name) for pattern in PATTERNS)


def read_names(file: Path) -> dict[str, str]:
    """A user's own table, ``{"their name": "our name"}``; "step" is a name too.

    Raises ``ValueError`` where the file can't be read, or a name isn't one of ours.
    """
    try:
        table = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} can't be read as names: {error}") from None
    if not isinstance(table, dict) or not all(isinstance(ours, str) for ours in table.values()):
        raise ValueError(f'{file} must hold {{"their name": "our name", ...}}')
    for theirs, ours in table.items():
        if ours != "step" and not is_ours(ours):
            near = ", ".join(difflib.get_close_matches(ours, OURS, n=3, cutoff=0.5) or ["reward", "grad_norm"])
            raise ValueError(f"{file}: {theirs!r} can't be {ours!r}, which is no metric of ours; near: {near}")
    return table


def _own(name: str) -> str | None:
    """Our name of one of ours or TRL's, with or without transformers' prefix."""
    for ours in (name, name.removeprefix("train/"), re.sub("^eval/", "eval_", name)):
        if is_ours(ours) or (ours.startswith("eval_") and is_ours(ours.removeprefix("eval_"))):
            return ours
    return None


def _ranked(name: str, chosen: Mapping[str, str]) -> tuple[int, str] | None:
    """(rank, our name), the lowest rank counts: a user's own table, our own names, then the rows of ``TABLE``."""
    if name in chosen:
        return -2, chosen[name]
    if own := _own(name):
        return -1, own
    for row, (pattern, ours) in enumerate(TABLE.items()):
        if re.fullmatch(pattern, name):
            return row, ours
    return None


def translate(names: Iterable[str], chosen: Mapping[str, str]) -> tuple[dict[str, str], list[str], list[str]]:
    """(our name -> theirs, names without one, problems). ``chosen``: a user's own table."""
    by_target: dict[str, dict[int, list[str]]] = {}
    unused = []
    for name in names:
        found = _ranked(name, chosen)
        if found is not None:
            by_target.setdefault(found[1], {}).setdefault(found[0], []).append(name)
        elif not name.startswith("_") and name not in STEPS:
            unused.append(name)
    used, problems = {}, []
    for ours, ranks in by_target.items():
        best = ranks[min(ranks)]
        if len(best) == 1:
            used[ours] = best[0]
        else:
            problems.append(f"{ours} could be any of {', '.join(best)}: choose one by --names")
    return used, unused, problems


def out_of_range(ours: str, series: Series) -> str | None:
    """What is wrong with these values as that metric; None where nothing is."""
    low, high = RANGES.get(ours, (-math.inf, math.inf))
    worst: Sequence[float] = [v for v in series.values() if v < low - ROUNDING or math.inf > v > high + ROUNDING]
    if not worst:
        return None
    return f"it should lie in [{low:g}, {high:g}] and is {worst[0]:g} (a percentage, or a sum?)"
