"""The page's sections, and the curves of each with a title in words and the axis' unit."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Curves:
    """One chart. ``metrics``: name in the log -> label; ``unit``: of the axis; ``log``: a logarithmic one; ``stacked``:
    areas on top of one another. ``reference``: (value, label) lines. ``pattern``: of the names of metrics that are
    found in the log, its group is the label."""

    title: str
    unit: str
    metrics: dict[str, str] = field(default_factory=dict)
    log: bool = False
    stacked: bool = False
    reference: tuple[tuple[float, str], ...] = ()
    pattern: str = ""

    def find(self, names: Iterable[str]) -> Curves:
        """The same with the metrics among ``names`` that match its pattern."""
        matches = {name: match[1] for name in names if (match := re.fullmatch(self.pattern, name))}
        return replace(self, metrics=self.metrics | matches)


@dataclass(frozen=True)
class Section:
    """``sentence``: for a newcomer."""

    heading: str
    sentence: str
    curves: tuple[Curves, ...] = ()


SHARE = "share"
MAIN_CHART = Curves(
    "Reward and held-out score",
    "reward; share right",
    {"reward": "reward in training", "eval_accuracy": "held-out accuracy", "eval_reward": "held-out reward"},
)
SECTIONS: dict[str, Section] = {
    "learning": Section(
        "How it learned",
        "The size of its steps, and each reward function.",
        (
            Curves("Gradient before clipping", "norm", {"grad_norm": "norm"}, log=True),
            Curves("Rewards by function", "mean reward", pattern=r"rewards/(.+)/mean"),
        ),
    ),
    "answers": Section(
        "What the answers are like",
        "How long they are, how many are cut off or go round in circles, and how sure the policy is of each token.",
        (
            Curves(
                "Length of an answer", "tokens",
                {"completions/mean_length": "mean", "completions/min_length": "shortest",
                 "completions/max_length": "longest"},
            ),
            Curves(
                "Cut off, and repeated", SHARE,
                {"completions/clipped_ratio": "cut off at the limit",
                 "completions/repetition": "repeated runs of four"},
            ),
            Curves(
                "Entropy of the next token", "nats",
                {"entropy": "all answers", "entropy_live": "answers that were run"},
            ),
            Curves("Distance from the reference", "nats a token", {"kl": "KL (k3)"}),
            Curves(
                "Clipped tokens", SHARE,
                {"clip_ratio/low_mean": "from below", "clip_ratio/high_mean": "from above"},
            ),
        ),
    ),
    "normalisation": Section(
        "What the normalisation did",
        "A group's rewards are divided by its scale. A group whose answers all got the same reward teaches nothing.",
        (
            Curves(
                "What rewards are divided by", "reward",
                {"normalization/scale_mean": "mean", "normalization/scale_min": "smallest",
                 "normalization/scale_max": "largest"},
            ),
            Curves(
                "Dead groups", "share of groups",
                {"normalization/zero_variance_frac": "all answers alike", "normalization/all_right_frac": "all right",
                 "normalization/all_wrong_frac": "all wrong"},
            ),
            Curves(
                "Advantages", "advantage",
                {"normalization/advantage_abs_mean": "mean size", "normalization/advantage_max": "largest"},
            ),
        ),
    ),
    "what_if": Section(
        "What other normalisations would have done",
        "From the same rollouts, without training anything: a cosine near 1 is the same direction, and the rest of it "
        "a learning rate (a steady factor) or a schedule (a moving one).",
    ),
    "noise": Section(
        "Where the noise comes from",
        "A step's gradient scatters because prompts differ, and because answers are drawn.",
        (
            Curves(
                "Variance of a prompt's gradient", "squared norm",
                {"noise/between": "between prompts", "noise/within": "within (answers)"}, log=True,
            ),
            Curves("Advised answers to a prompt", "answers", {"noise/advised_generations": "by one step"}),
        ),
    ),
    "interference": Section(
        "Do the prompts get in one another's way?",
        "The cosine of two prompts' gradients: near 0 they leave one another alone, below 0 one undoes the other. "
        "The noise of few answers pulls cosines to 0. Alignment is without it, over up to 20 logged steps; where "
        "nothing can be said it is missing.",
        (
            Curves(
                "Cosines over training", "cosine; share",
                {"interference/cos_mean": "mean cosine", "interference/conflict_frac": "share of pairs in conflict",
                 "interference/alignment": "alignment"},
            ),
            Curves("Spread of the cosines", "std of the cosine", {"interference/cos_std": "std"}),
            Curves(
                "Nearly orthogonal pairs", "share of pairs", {"interference/near_orthogonal_frac": "|cosine| below 0.1"}
            ),
        ),
    ),
    "parts": Section(
        "In which part of the model",
        "The prompts' squared gradients by part, and the mean cosine of two prompts there.",
    ),
    "tasks": Section(
        "Do the tasks get in one another's way?",
        "The cosine of two tasks' summed gradients, mean over the logged steps that have both; each task's reward, and "
        "what other normalisations would have given it.",
        (
            Curves("Reward by task", "mean reward", pattern=r"tasks/(.+)/reward"),
            Curves("Live prompts by task", "share of its prompts", pattern=r"tasks/(.+)/live_share"),
            Curves("Who is heard", "share of the step's gradient", pattern=r"tasks/(.+)/heard"),
        ),
    ),
    "curvature": Section(
        "Does the std follow the curvature?",
        "The theory says that sigma, the std of a group's rewards, tracks the curvature of its objective, and that "
        "below C = 1 dividing by it converges faster.",
        (
            Curves("The theorem's constant", "C", {"curvature/speedup_constant": "C"}, reference=((1.0, "C = 1"),)),
            Curves(
                "Sigma against curvature, by step", "correlation",
                {"curvature/directional_corr": "with measured curvature",
                 "curvature/fisher_variance_corr": "Fisher trace and variance"},
                reference=((0.0, "none"),),
            ),
        ),
    ),
    "theory": Section(
        "The theory's constants",
        "How far the theorem's assumptions hold. Dotted: what the paper reports.",
        (
            Curves("Assumption 4: the bound M", "M, 95 % of pairs", {"theory/m_bound_p95": "M"}, log=True),
            Curves("Pairs for which no M does", "share of pairs", {"theory/negative_pairs_frac": "negative pairs"}),
            Curves(
                "Assumption 5: how unlike prompts are", "largest ratio",
                {"theory/r1": "gradient norms (R1)", "theory/r2": "sigmas (R2)"}, log=True,
            ),
        ),
    ),
    "compute": Section(
        "Where the work went",
        "Sequences without a gradient don't run, and a prompt runs once for all its answers.",
        (
            Curves(
                "Seconds of a step", "seconds",
                {"compute/seconds_generation": "generation", "compute/seconds_training": "training",
                 "compute/seconds_log_probs": "old and reference log-probs", "compute/seconds_rewards": "rewards"},
                stacked=True,
            ),
            Curves(
                "Work that was saved", SHARE,
                {"compute/sequences_skipped_frac": "sequences", "compute/tokens_skipped_frac": "tokens",
                 "compute/flops_saved_frac": "token positions"},
            ),
        ),
    ),
    "completions": Section(
        "What it answered",
        "Two prompts of a logged step: one whose answers differ in reward, and one whose don't.",
    ),
}  # fmt: skip
THEORY = ("curvature", "theory")  # folded away
