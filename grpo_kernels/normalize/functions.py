"""Defines the normalisations that are one short function each; to add one, add it here and to its test.

A function gets ``Groups`` and returns advantages (P, G). It runs in plain torch on every device. This file doesn't
import torch, because the options' declaration imports it: the functions only use methods of tensors.

Shapes: P prompts, G completions of one prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .method import Groups, Method, Option

if TYPE_CHECKING:
    import torch

HA_DW_SCALE = 1.5  # of the authors' code; a constant factor acts like a learning rate


def _log_choose(n: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Returns log C(n, k); -inf, so that C = 0, for n < k."""
    return (n + 1).lgamma() - (k + 1).lgamma() - (n - k + 1).lgamma()


def value_to_go(groups: Groups) -> torch.Tensor:
    """Returns (r - m) / sqrt(m + 1 / n): it approximates 1 / sqrt(p) for a prompt of pass rate p, and is bounded."""
    return (groups.rewards - groups.mean) / (groups.mean + 1 / groups.count.clamp(min=1)).sqrt()


def pass_at_k(groups: Groups) -> torch.Tensor:
    """Returns the advantages of Pass@k Training in closed form (arXiv 2508.10751, section 2.4).

    With n rewards, w of them 0, the estimate of pass@k is R = 1 - C(w, k) / C(n, k), and::

        A = (1 - R) / (sqrt(R (1 - R)) + eps)                                             for a right answer
        A = (1 - R - C(w - 1, k - 1) / C(n - 1, k - 1)) / (sqrt(R (1 - R)) + eps)         for a wrong one

    A group sums to 0. A group with fewer than k wrong answers gets 0: any k of its answers hold a right one. k is n in
    a group with fewer than k scorable answers.
    """
    wrong_PG = groups.rewards == 0
    if not (wrong_PG | (groups.rewards == 1) | groups.rewards.isnan()).all():
        raise ValueError("normalization 'pass_at_k' needs rewards of 0 or 1; 'max_at_k' takes others")
    n, wrong = groups.count, wrong_PG.sum(1, keepdim=True).to(groups.count)
    k = n.clamp(max=groups.options["k"])
    missed = (_log_choose(wrong, k) - _log_choose(n, k)).exp()
    missed_by_others = (_log_choose(wrong - 1, k - 1) - _log_choose(n - 1, k - 1)).exp()
    spread = (missed * (1 - missed)).clamp(min=0).sqrt() + groups.eps
    return (missed - missed_by_others * wrong_PG) / spread.where(spread > 0, spread + 1)


def max_at_k(groups: Groups) -> torch.Tensor:
    """Returns what an answer adds to the best of k: PKPO's leave-one-out estimate (arXiv 2505.15201, eq. 33).

    For n rewards::

        A_i = sum over sets I of size k with i: (max of I - max of I without i) / C(n, k)

    Summed over the answers, A times the score is an unbiased gradient of max@k, and of pass@k for rewards of 0 and 1.
    With k = n it is the best answer's lead over the second, verl's ``grpo_passk`` without its std (arXiv 2503.19595).
    No advantage is negative. k is n in a group with fewer than k scorable answers.
    """
    reward = groups.rewards.nan_to_num(float("inf"))
    rank = reward.argsort(dim=1, stable=True).argsort(dim=1).to(groups.count)  # 0 for the smallest
    k = groups.count.clamp(max=groups.options["k"])
    # sets in which answer j is the best one besides i: they hold k - 2 of the answers below j, whose number is its rank
    sets = (_log_choose(rank, k - 2) - _log_choose(groups.count, k)).exp()
    lead = (groups.rewards[:, :, None] - groups.rewards[:, None, :]).nan_to_num(0.0).clamp(min=0)
    return (lead * sets[:, None, :]).sum(2)


def ha_dw(groups: Groups) -> torch.Tensor:
    """Returns ``std`` weighted by how a group's pass rate differs from that of recent batches (arXiv 2601.08521)::

        A = 1.5 exp(-(m - h) sign(r - m)) (r - m) / (s + eps),  h = mean reward of the last ``window`` batches

    Right answers to prompts that are harder than usual (m < h) weigh more, wrong ones less. So a group doesn't sum to
    0. This is the authors' code. Their paper moves h by (1 - eta) h + eta m with eta in proportion to h's recent std.
    """
    deviation = groups.rewards - groups.mean
    weight = ((groups.context["recent_mean"] - groups.mean) * deviation.sign()).exp()
    return HA_DW_SCALE * weight * deviation / (groups.std + groups.eps).clamp(min=1e-300)


def rae(groups: Groups) -> torch.Tensor:
    """Returns r minus the moving average of its task's earlier rewards (SPIRAL, arXiv 2506.24119)."""
    return groups.rewards - groups.context["role_baseline"]


K = {"k": Option(2, float("inf"), default=4, open_end=True, whole=True)}
WINDOW = {"window": Option(1, float("inf"), default=10, open_end=True, whole=True)}

FUNCTIONS: dict[str, Method] = {
    "value_to_go": Method(
        "group", "one", "group", "(r - m) / sqrt(m + 1/n)", "a value-to-go argument", unit_rewards=True,
        function=value_to_go,
    ),
    "pass_at_k": Method(
        "group", "one", "group", "closed form of Pass@k Training, r = 0 or 1", "Pass@k Training, arXiv 2508.10751", K,
        unit_rewards=True, function=pass_at_k,
    ),
    "max_at_k": Method(
        "group", "one", "group", "mean lead over the best of k - 1 others", "PKPO, arXiv 2505.15201", K,
        function=max_at_k,
    ),
    "ha_dw": Method(
        "group", "one", "state", "1.5 exp(-(m - h) sign(r - m)) (r - m) / (s + eps), h: recent batches' mean",
        "HA-DW, arXiv 2601.08521", WINDOW, ("recent_mean",),
        unit_rewards=True, function=ha_dw,
    ),
    "rae": Method(
        "zero", "one", "state", "r - moving average of its task's earlier rewards", "RAE of SPIRAL, arXiv 2506.24119",
        {"decay": Option(0, 1, default=0.95, open_end=True)}, ("role_baseline",), zero_if_equal=False, function=rae,
    ),
}  # fmt: skip
