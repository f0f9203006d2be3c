"""``normalize_rewards`` and its reference on nested lists, with what each method needs."""

import math

import numpy as np
import torch
from kernel_inputs import context_of, context_tensors, method_options
from reference import normalize_rewards_reference

from grpo_kernels import METHODS, normalize_with_statistics

NAN = float("nan")
# methods that are functions: test_normalize_functions.py
IN_KERNEL = {name: method for name, method in METHODS.items() if method.function is None}
ZERO_IF_EQUAL = [name for name, method in IN_KERNEL.items() if method.zero_if_equal]
UNIT = [name for name, method in IN_KERNEL.items() if method.unit_rewards]
# two prompts with different rewards; and pass rates 1/4 and 3/4
REWARDS = [[1.0, 0.0, 0.0, 0.0], [0.0, 2.0, 4.0, 6.0]]
PASSED = [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 1.0]]


def run(rewards, method, *, alpha=0.5, dtype=torch.float32, device="cpu", statistics=False, **arguments):
    """``normalize_rewards`` on nested lists or a tensor, with what the method needs."""
    tensor = torch.as_tensor(rewards, dtype=dtype, device=device)
    context = context_tensors(method, tensor)
    result = normalize_with_statistics(tensor, method, context=context, **method_options(method, alpha), **arguments)
    return result if statistics else result.advantages


def reference(rewards, method, *, alpha=0.5, eps=1e-4) -> torch.Tensor:
    rewards = torch.as_tensor(rewards, dtype=torch.float64).tolist()
    arguments = {"alpha": alpha, **context_of(method, rewards)}
    return torch.tensor(normalize_rewards_reference(rewards, method, eps=eps, **arguments), dtype=torch.float64)


def at_a_threshold(rewards, method) -> bool:
    """Returns whether a group's MAD or IQR is so near its threshold that rounding decides if the std replaces it."""
    for group in rewards:
        known = np.array([x for x in group if not math.isnan(x)])
        if method not in ("median_mad", "iqr") or len(known) < 2:
            continue
        mad = np.median(np.abs(known - np.median(known)))
        spread = mad if method == "median_mad" else np.subtract(*np.quantile(known, [0.75, 0.25]))
        if abs(spread - 0.01 * known.std(ddof=1)) <= 1e-4 * known.std(ddof=1):
            return spread > 0 and known.std() > 0
    return False
