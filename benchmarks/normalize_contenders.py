"""TRL's lines for a normalisation, and what the trainer hands to ours."""

import torch


def trl_lines(rewards_PG: torch.Tensor) -> torch.Tensor:
    """What TRL 1.16 computes for ``scale_rewards="group"``, including what it logs from the same std."""
    from trl.trainer.utils import nanstd

    generations = rewards_PG.shape[1]
    mean = torch.nanmean(rewards_PG, dim=1).repeat_interleave(generations, dim=0)
    std = nanstd(rewards_PG, dim=1).repeat_interleave(generations, dim=0)
    advantages = (rewards_PG.flatten() - mean) / (std + 1e-4)
    torch.isclose(std, torch.zeros_like(std))
    return torch.nan_to_num(advantages, nan=0.0)


def rewards_of(method: str, rewards_PG: torch.Tensor) -> torch.Tensor:
    """Rewards that the method takes: ``pass_at_k`` takes 0 and 1 alone."""
    return rewards_PG.round() if method == "pass_at_k" else rewards_PG


def context_of(method: str, rewards_PG: torch.Tensor) -> dict[str, torch.Tensor | float]:
    """What the trainer hands to the method."""
    return {
        "lengths": torch.ones_like(rewards_PG),
        "function_rewards": torch.stack([rewards_PG, 1 - rewards_PG.square()], dim=2),
        "running_variance": 0.25,
        "curvature_scale": torch.ones_like(rewards_PG[:, 0]),
        "recent_mean": 0.4,
        "role_baseline": torch.full_like(rewards_PG, 0.4),
    }
