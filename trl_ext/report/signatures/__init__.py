"""The signatures of sick runs: what each looks at, its threshold, and the remedy. Pure functions of a ``Run``.

Thresholds are rules of thumb, set on the runs of the demo and of the tests, and kept away from what healthy runs do;
those who know their task better may look at the evidence, which has the numbers.
"""

from . import answers, gradients, groups, learning, steps
from .finding import Finding, Signature, Unknown

__all__ = ["SIGNATURES", "Finding", "Signature", "Unknown"]

CONSEQUENCES = ("mostly_dead", "few_live_prompts", "no_progress")  # of groups that are all dead
SIGNATURES: dict[str, Signature] = {
    "not_finite": Signature("Numbers that aren't numbers", learning.not_finite),
    "all_wrong": Signature("Every answer is wrong", groups.all_wrong, explains=CONSEQUENCES),
    "all_right": Signature("Every answer is right", groups.all_right, explains=CONSEQUENCES),
    "mostly_dead": Signature("Most groups teach nothing", groups.mostly_dead),
    "few_live_prompts": Signature("Too few live prompts", groups.few_live_prompts),
    "unscored": Signature("Answers without a reward", groups.unscored),
    "fell": Signature("What was learned is being lost", learning.fell, explains=("no_progress",)),
    "no_progress": Signature("The reward doesn't move", learning.no_progress),
    "gap": Signature("Training and held-out score apart", learning.gap),
    "length_limit": Signature("Answers cut off at the limit", answers.length_limit),
    "repetition": Signature("Answers repeat themselves", answers.repetition),
    "entropy_collapse": Signature("Entropy has collapsed", answers.entropy_collapse),
    "entropy_rise": Signature("Entropy rises", answers.entropy_rise),
    "length_hacking": Signature("Reward by length", answers.length_hacking),
    "tiny_denominators": Signature("Tiny denominators", steps.tiny_denominators),
    "coefficient_spikes": Signature("Huge advantages", steps.coefficient_spikes),
    "gradient_spikes": Signature("Spikes of the gradient's norm", steps.gradient_spikes),
    "clip_share": Signature("Many tokens clipped", steps.clip_share),
    "divergence": Signature("Far from the reference", steps.divergence),
    "sampler_mismatch": Signature("Sampler and trainer differ", steps.sampler_mismatch),
    "slow_rewards": Signature("Time goes into rewards", steps.slow_rewards),
    "uncovered": Signature("The sketch misses a part", gradients.uncovered),
    "unreliable": Signature("Prompts' gradients are mostly noise", gradients.unreliable),
    "contradicts_theory": Signature("Curvature contradicts the theory", gradients.contradicts_theory),
    "dominated": Signature("One prompt dominates", gradients.dominated),
    "task_conflict": Signature("Tasks against one another", gradients.task_conflict),
}  # fmt: skip
