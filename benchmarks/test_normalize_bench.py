"""Every normalisation against TRL 1.16's torch lines for its own (`nanmean`, `nanstd`, divide), and a copy.

Counted: P * G float32 read once and written once, 8 * P * G bytes; the floor does exactly that and no arithmetic.
"""

import pytest
import torch
from normalize_contenders import context_of, rewards_of, trl_lines

from grpo_kernels import METHODS, normalize_rewards

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHORT = ("mean", "std", "batch_std", "median_mad", "rank", "decoupled")  # without --full, at the larger two sizes


@pytest.mark.parametrize(
    "method", [name if name in SHORT else pytest.param(name, marks=pytest.mark.full) for name in METHODS]
)
@pytest.mark.parametrize(
    ("prompts", "generations"), [pytest.param(16, 8, marks=pytest.mark.full), (512, 16), (4096, 64)]
)
def test_normalize(compare, prompts, generations, method):
    rewards_PG = rewards_of(method, torch.rand(prompts, generations, device=DEVICE))
    if method == "std":
        torch.testing.assert_close(normalize_rewards(rewards_PG).flatten(), trl_lines(rewards_PG), rtol=1e-4, atol=1e-5)
    context = context_of(method, rewards_PG)
    options = {"alpha": 0.5} if method == "power" else {}

    def ours() -> torch.Tensor:
        return normalize_rewards(rewards_PG, method, context=context, **options)

    n_functions = 2 if method == "decoupled" else 1  # TRL's lines once for each reward function
    contenders = {
        "ours": ours,
        "trl": lambda: [trl_lines(rewards_PG) for _ in range(n_functions)],
        "floor": rewards_PG.clone,
    }
    case = f"{prompts:>4} x {generations:<2} {8 * rewards_PG.numel() / 1e6:5.3f} MB {method}"
    values = {"TRL's std / ours": ("trl", "ours"), "ours / floor": ("ours", "floor")}
    compare("normalisation", case, contenders, values, rounds=9, inner=3 if prompts < 4096 else 1)
