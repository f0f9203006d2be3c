"""The signatures of sick runs: what each looks at, its threshold, and the remedy. Pure functions of a ``Run``.

Thresholds are rules of thumb, set on the runs of the demo and of the tests, and kept away from what healthy runs do.
A signature of one metric that stays beyond a threshold is a row here; the others are functions.
"""

from ..evidence import above
from . import gradients, learning, rollouts, steps
from .finding import ADVICE, CRITICAL, WARNING, Finding, Signature, Unknown, stays

__all__ = ["SIGNATURES", "Finding", "Signature", "Unknown"]

SIGNATURES = {
    "not_finite": Signature("Numbers that aren't numbers", learning.not_finite),
    "all_wrong": rollouts.all_dead(
        "Every answer gets a low reward",
        "wrong",
        "Too hard, or misjudged: look at some answers and their rewards (log_completions=True); then easier "
        "problems, rewards for parts of an answer, a better start (supervised), or more answers (num_generations).",
    ),
    "all_right": rollouts.all_dead(
        "Every answer gets a high reward",
        "right",
        "If they are right: stop here, or go on with harder problems. If few are right (accuracy, held-out score), the "
        "reward is wrong.",
    ),
    "mostly_dead": Signature("Most groups teach nothing", rollouts.mostly_dead),
    "few_live_prompts": stays(
        "Too few live prompts",
        "interference/live_prompts",
        {ADVICE: lambda count: count < 3},
        lambda mean: f"on average {mean:.1f} prompts of a logged step have a gradient: no phase can be told",
        "More prompts in a step (per_device_train_batch_size, gradient_accumulation_steps).",
    ),
    "unscored": stays(
        "Answers without a reward",
        "normalization/unscorable_frac",
        {WARNING: lambda share: share > 0.1},
        lambda mean: f"{mean:.0%} of the answers get no reward at all (None)",
        "See which reward function returns None, and why.",
    ),
    "fell": Signature("What was learned is being lost", learning.fell, explains=("no_progress",)),
    "no_progress": Signature("The reward doesn't move", learning.no_progress),
    "gap": Signature("Training and held-out score apart", learning.gap),
    "length_limit": Signature("Answers cut off at the limit", rollouts.length_limit),
    "repetition": stays(
        "Answers repeat themselves",
        "completions/repetition",
        {WARNING: lambda share: share > 0.5},
        lambda mean: f"{mean:.0%} of the answers' runs of four tokens occurred before in the same answer",
        "repetition_penalty, a lower temperature; a lower learning_rate or beta > 0 where it began while training.",
    ),
    "entropy_collapse": Signature("Entropy has collapsed", rollouts.entropy_collapse),
    "entropy_rise": Signature("Entropy rises", rollouts.entropy_rise),
    "length_hacking": Signature("Reward by length", rollouts.length_hacking, explains=("length_limit", "all_right")),
    "tiny_denominators": Signature("Tiny denominators", steps.tiny_denominators),
    "coefficient_spikes": Signature("Huge advantages", steps.coefficient_spikes),
    "gradient_spikes": Signature("Spikes of the gradient's norm", steps.gradient_spikes),
    "clip_share": stays(
        "Many tokens clipped",
        "clip_ratio/region_mean",
        {WARNING: lambda share: share > 0.2},
        lambda mean: f"{mean:.0%} of the tokens are clipped: the policy has moved far from the one that answered",
        "Fewer num_iterations or steps_per_generation, or a lower learning_rate; epsilon_high above 0.2.",
    ),
    "divergence": stays(
        "Far from the reference",
        "kl",
        {CRITICAL: above(10.0), WARNING: above(1.0)},
        lambda nats: f"the policy is {nats:.2g} nats a token from its reference",
        "A larger beta, or a lower learning_rate.",
        why=" (with beta=0 there is none)",
    ),
    "sampler_mismatch": Signature("Sampler and trainer differ", steps.sampler_mismatch),
    "slow_rewards": Signature("Time goes into rewards", steps.slow_rewards),
    "uncovered": Signature("The sketch misses a part", gradients.uncovered),
    "unreliable": Signature("Prompts' gradients are mostly noise", gradients.unreliable),
    "contradicts_theory": Signature("Curvature contradicts the theory", gradients.contradicts_theory),
    "dominated": Signature("One prompt dominates", gradients.dominated),
    "task_conflict": Signature("Tasks against one another", gradients.task_conflict),
}
