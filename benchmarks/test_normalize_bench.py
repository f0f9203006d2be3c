"""Normalisation: ours against TRL 1.16's torch lines (`nanmean`, `nanstd`, divide), and a copy of the same bytes.

Counted: P * G float32 read once and written once, 8 * P * G bytes; the floor does exactly that and no arithmetic.
"""

import pytest
import torch
from compare import alternate
from conftest import ROWS
from trl.trainer.utils import nanstd

from grpo_kernels import normalize_rewards

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def trl_lines(rewards_PG: torch.Tensor) -> torch.Tensor:
    """What TRL 1.16 computes for ``scale_rewards="group"``, including what it logs from the same std."""
    generations = rewards_PG.shape[1]
    mean = torch.nanmean(rewards_PG, dim=1).repeat_interleave(generations, dim=0)
    std = nanstd(rewards_PG, dim=1).repeat_interleave(generations, dim=0)
    advantages = (rewards_PG.flatten() - mean) / (std + 1e-4)
    torch.isclose(std, torch.zeros_like(std))
    return torch.nan_to_num(advantages, nan=0.0)


@pytest.mark.parametrize(("prompts", "generations"), [(16, 8), (512, 16), (4096, 64)])
def test_normalize(benchmark, prompts, generations):
    rewards_PG = torch.randn(prompts, generations, device=DEVICE)
    torch.testing.assert_close(normalize_rewards(rewards_PG).flatten(), trl_lines(rewards_PG), rtol=1e-4, atol=1e-5)
    medians = alternate(
        {
            "ours": lambda: normalize_rewards(rewards_PG),
            "trl": lambda: trl_lines(rewards_PG),
            "floor": rewards_PG.clone,
        },
        inner=5,
    )
    benchmark.extra_info.update(medians)
    ROWS.append(
        f"normalize {prompts:>5} x {generations:<3} {8 * rewards_PG.numel() / 1e6:7.3f} MB  "
        f"TRL / ours {medians['trl'] / medians['ours']:5.2f}   ours / copy {medians['ours'] / medians['floor']:7.1f}   "
        f"ours {1e6 * medians['ours']:.0f} us"
    )
    benchmark.pedantic(lambda: normalize_rewards(rewards_PG), rounds=20, warmup_rounds=1)
