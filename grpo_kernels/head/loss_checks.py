"""Checks the arguments of ``linear_grpo_loss`` other than the head's; a ``ValueError`` names the wrong value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from grpo_kernels.normalize.methods import METHODS, SHARED_OPTIONS, canonical, check_normalization

from .checks import check_number, check_per_token, check_values
from .token_losses import SURROGATES, GroupRewards, TokenInputs, TokenLoss

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_sequences(sequence_N, weights_B, count: int, device: torch.device) -> None:
    """Raises ``ValueError`` unless ``sequence_N`` is (N,) integers and ``weights_B`` (B,) floats, on ``device``."""
    if not isinstance(weights_B, torch.Tensor) or weights_B.ndim != 1 or not weights_B.is_floating_point():
        raise ValueError(f"weights_B must be a floating-point tensor (B,), got {describe(weights_B)}")
    if not isinstance(sequence_N, torch.Tensor) or sequence_N.shape != (count,) or sequence_N.dtype not in INTEGERS:
        raise ValueError(f"sequence_N must be an integer tensor ({count},), got {describe(sequence_N)}")
    for name, tensor in (("weights_B", weights_B), ("sequence_N", sequence_N)):
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device} and hidden on {device}: they must be on one device")


def describe(value: object) -> str:
    """Returns shape and dtype of a tensor, or the type's name of anything else, for messages."""
    return f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__


def check_loss_options(
    *,
    loss_type: str,
    epsilon: float,
    epsilon_high: float | None,
    delta: float | None,
    sapo_temperatures: tuple[float, float],
    beta: float,
    kl_times_ratio: bool,
) -> TokenLoss:
    """Checks the loss options of ``linear_grpo_loss``; raises a ``ValueError`` that names a wrong one."""
    if not isinstance(loss_type, str) or loss_type not in SURROGATES:
        raise ValueError(f"loss_type={loss_type!r}: choose from {', '.join(SURROGATES)}")
    surrogate = SURROGATES[loss_type]
    check_number("epsilon", epsilon, least=0)
    if surrogate == "clip" and epsilon > 1:
        raise ValueError(f"epsilon={epsilon!r} must be in [0, 1]: ratios are clipped to at least 1 - epsilon")
    high = epsilon if epsilon_high is None else epsilon_high
    check_number("epsilon_high", high, least=0)
    if delta is not None:
        check_number("delta", delta, above=0)
    check_number("beta", beta, least=0)
    try:
        positive, negative = sapo_temperatures
    except (TypeError, ValueError):
        raise ValueError(f"sapo_temperatures={sapo_temperatures!r} must be two numbers") from None
    check_number("sapo_temperatures[0]", positive, above=0)
    check_number("sapo_temperatures[1]", negative, above=0)
    return TokenLoss(surrogate, epsilon, high, delta, positive, negative, beta, bool(kl_times_ratio))


def make_group_rewards(rewards, normalization, n_sequences: int, device: torch.device) -> GroupRewards:
    """Checks ``rewards`` and ``normalization`` of ``linear_grpo_loss``, except the values in the tensors."""
    if not isinstance(rewards, tuple) or len(rewards) != 2:
        raise ValueError("rewards must be a pair: (B, G) each sequence's whole group, (B,) its own place in it")
    rewards_BG, position_B = rewards
    fits = isinstance(rewards_BG, torch.Tensor) and rewards_BG.ndim == 2 and len(rewards_BG) == n_sequences
    if not fits or not rewards_BG.is_floating_point():
        raise ValueError(f"rewards[0] is {describe(rewards_BG)}: expected ({n_sequences}, G), a row for each sequence")
    if (
        not isinstance(position_B, torch.Tensor)
        or position_B.shape != (n_sequences,)
        or position_B.dtype not in INTEGERS
    ):
        raise ValueError(f"rewards[1] is {describe(position_B)}: expected integers ({n_sequences},)")
    for name, tensor in (("rewards[0]", rewards_BG), ("rewards[1]", position_B)):
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device} and hidden on {device}: they must be on one device")
    if normalization is None:
        normalization = ("std", {})
    if not isinstance(normalization, tuple) or len(normalization) != 2 or not isinstance(normalization[1], Mapping):
        raise ValueError(f"normalization={normalization!r} must be a pair: (method, options)")
    method, options = canonical(normalization[0]), normalization[1]
    if "method" in options:
        raise ValueError(f"normalization={normalization!r}: the method comes first, options after it")
    check_normalization(method, **options)
    if callable(method) or not METHODS[method].own_group:
        raise ValueError(f"normalization {method!r} needs more than its own group: give advantages instead of rewards")
    refused = sorted(SHARED_OPTIONS.keys() & options)
    if refused:
        raise ValueError(f"normalization={normalization!r}: {', '.join(refused)} need advantages instead of rewards")
    rewards_BG = rewards_BG if rewards_BG.dtype == torch.float64 else rewards_BG.float()
    eps, alpha = float(options.get("eps", 1e-4)), float(options.get("alpha", 1.0))
    return GroupRewards(rewards_BG.contiguous(), position_B.long(), method, eps, alpha)


class GivenAdvantages(NamedTuple):
    """The arguments of ``linear_grpo_loss`` for advantages: exactly one of the first three must be given."""

    advantages: Any
    advantages_N: Any
    rewards: Any
    normalization: Any

    def check(self) -> None:
        """Raises ``ValueError`` unless exactly one of the three is given."""
        names = [name for name in self._fields[:3] if getattr(self, name) is not None]
        if len(names) != 1:
            raise ValueError(f"give one of advantages, advantages_N and rewards, got {', '.join(names) or 'none'}")
        if self.normalization is not None and self.rewards is None:
            raise ValueError(
                f"normalization={self.normalization!r} goes with rewards: advantages are normalised already"
            )


def read_tokens(
    targets_N: torch.Tensor,
    sequence_N: torch.Tensor,
    weights_B: torch.Tensor,
    given: GivenAdvantages,
    per_token: Mapping[str, torch.Tensor | None],
    vocabulary: int,
) -> TokenInputs:
    """Checks the per-token arguments and returns the inputs of the row arithmetic.

    ``per_token``: old log-probs, reference log-probs and policy scale, in this order.
    """
    count, device = len(targets_N), targets_N.device
    check_sequences(sequence_N, weights_B, count, device)
    ranges = [("targets hold", targets_N, vocabulary), ("sequence_N holds", sequence_N, len(weights_B))]
    for name, tensor in per_token.items():
        check_per_token(name, tensor, count, device)
    given.check()
    advantages, advantages_N, group_rewards = given.advantages, given.advantages_N, None
    if advantages_N is not None:
        check_per_token("advantages_N", advantages_N, count, device)
    elif given.rewards is not None:
        group_rewards = make_group_rewards(given.rewards, given.normalization, len(weights_B), device)
        ranges.append(("rewards[1] holds", group_rewards.position, group_rewards.rewards.shape[1]))
    elif not isinstance(advantages, torch.Tensor) or advantages.shape not in (weights_B.shape, (count,)):
        raise ValueError(f"advantages are {describe(advantages)}: expected ({len(weights_B)},) or ({count},)")
    else:
        check_per_token("advantages", advantages, len(advantages), device)
        advantages_N = advantages
    check_values(ranges, None if group_rewards is None else group_rewards.rewards)
    sequence_N = sequence_N.long()
    if advantages is not None and advantages.shape == weights_B.shape:
        advantages_N = advantages[sequence_N]
    return TokenInputs(
        targets_N.long(),
        sequence_N,
        weights_B.detach()[sequence_N],
        None if advantages_N is None else advantages_N.detach(),
        group_rewards,
        *(None if tensor is None else tensor.detach() for tensor in per_token.values()),
    )
