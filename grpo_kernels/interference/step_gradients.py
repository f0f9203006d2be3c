"""Defines the data of one optimizer step from which interference is measured, and groups it by prompt.

Shapes: B sequences, P prompts, G the most completions of one prompt in the step.

Flow: ``StepGradients`` (inner products of per-sequence gradients, and rewards) -> ``PromptGroups`` (one row per prompt,
in float64) -> ``metrics.py`` and ``curvature.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from grpo_kernels.normalize.group_statistics import masked_statistics

from .inner_products import InnerProducts, as_products, sum_rows

CANCELLED = 1e-7  # a sum with a squared norm below this share of the summed squared norms is rounding only


@dataclass(frozen=True)
class StepGradients:
    """The per-sequence gradients u_i of one optimizer step, by their inner products, and the rewards.

    Attributes:
        gram_BB: (B, B) inner products <u_i, u_j> in any floating dtype, exact or from a sketch; or ``InnerProducts``
            for a step whose matrix would be too large.
        prompt_B: (B,) int64, any number per prompt. A step may hold part of a group.
        reward_B: (B,), NaN where a completion couldn't be scored.
        coefficient_B: (B,) c_i with u_i = c_i s_i and the score s_i = grad log pi(o_i | q_p). It is the product of
            advantage, token weight, accumulation factor, cispo's clamp and a sequence-level ratio; 0 for a dead
            sequence, whose score is then unknown. None if the tokens of a sequence have different coefficients
            (token-level ratios off policy, KL, an entropy mask or bonus); metrics of scores are then left out.
        baseline_size: number of rewards whose mean is an advantage's baseline: G for a group's mean (also without the
            own reward), P * G for the batch's mean, 0 for no baseline.
    """

    gram_BB: torch.Tensor | InnerProducts
    prompt_B: torch.Tensor
    reward_B: torch.Tensor
    coefficient_B: torch.Tensor | None
    baseline_size: int


def check_step(step: StepGradients) -> None:
    """Raises ``ValueError`` that names a wrong field, its value and what is expected."""
    gram, prompt, reward, coefficient = step.gram_BB, step.prompt_B, step.reward_B, step.coefficient_B
    size = (len(gram),)
    for name, value in (("prompt_B", prompt), ("reward_B", reward), ("coefficient_B", coefficient)):
        if value is not None and tuple(value.shape) != size:
            raise ValueError(f"{name} has shape {tuple(value.shape)}: expected {size}, an entry for a row of gram_BB")
    if prompt.dtype != torch.int64:
        raise ValueError(f"prompt_B is {prompt.dtype}: expected int64")
    if reward.isinf().any():
        raise ValueError("reward_B holds an infinite value: expected finite rewards, or NaN where unscorable")
    if coefficient is not None and not coefficient.isfinite().all():
        raise ValueError("coefficient_B holds a value that isn't finite")
    if step.baseline_size < 0 or step.baseline_size == 1:
        raise ValueError(f"baseline_size={step.baseline_size} must be 0 (no baseline) or at least 2 (rewards averaged)")
    if not (gram if isinstance(gram, torch.Tensor) else gram.squares()).isfinite().all():
        raise ValueError("gram_BB holds a value that isn't finite")


@dataclass(frozen=True)
class PromptGroups:
    """A checked step in float64, grouped by prompt in ascending order of the prompts' ids.

    Attributes:
        products: inner products of the per-sequence gradients u_i.
        row_B: (B,) each sequence's index into ``prompt_P``.
        prompt_P: (P,) int64, the prompts' ids.
        index_PG: (P, G) the sequences of each prompt; ``present_PG`` (P, G) bool masks the filling.
        gram_PP: (P, P) inner products of the prompts' gradients g_p = sum of the prompt's u_i.
        trace_P: (P,) sum of |u_i|^2.
        count_P: (P,) number of sequences that are scorable or have a gradient.
        centred_B: (B,) a_i, the reward minus its group's mean; 0 if unscorable, exactly 0 in a group of equal rewards.
        sigma_P: (P,) population std of the group's rewards; NaN if none is scorable.
        live_P: (P,) bool: a coefficient isn't 0 (without coefficients: a gradient isn't 0), and g_p isn't 0 up to
            rounding.
        coefficient_B, baseline_size: as in ``StepGradients``.
    """

    products: InnerProducts
    row_B: torch.Tensor
    prompt_P: torch.Tensor
    index_PG: torch.Tensor
    present_PG: torch.Tensor
    gram_PP: torch.Tensor
    trace_P: torch.Tensor
    count_P: torch.Tensor
    centred_B: torch.Tensor
    sigma_P: torch.Tensor
    live_P: torch.Tensor
    coefficient_B: torch.Tensor | None
    baseline_size: int | torch.Tensor  # (P,) float64 in ``alignment.raw_groups``

    def sum_by_prompt(self, values_B: torch.Tensor) -> torch.Tensor:
        """Sums (B, ...) over the sequences of each prompt, to (P, ...)."""
        return sum_rows(values_B, self.row_B, len(self.prompt_P))


def group_by_prompt(step: StepGradients | PromptGroups) -> PromptGroups:
    """Checks a step (``check_step``) and groups its sequences by prompt; returns ``PromptGroups`` unchanged."""
    if isinstance(step, PromptGroups):
        return step
    check_step(step)
    products = as_products(step.gram_BB)
    prompt_P, row_B, size_P = step.prompt_B.unique(return_inverse=True, return_counts=True)
    n_prompts, most = len(prompt_P), int(size_P.max()) if len(size_P) else 0

    order_B = row_B.argsort(stable=True)
    place_B = torch.arange(len(row_B), device=row_B.device) - (size_P.cumsum(0) - size_P)[row_B[order_B]]
    index_PG = row_B.new_zeros(n_prompts, most)
    index_PG[row_B[order_B], place_B] = order_B
    present_PG = torch.arange(most, device=row_B.device) < size_P[:, None]

    reward_PG = torch.where(present_PG, step.reward_B.double()[index_PG], torch.nan)
    count_P1, mean_P1, std_P1 = _statistics(reward_PG)
    sigma_P = (std_P1 * ((count_P1 - 1).clamp(min=0) / count_P1).sqrt())[:, 0]
    centred_B = (step.reward_B.double() - mean_P1[row_B, 0]).nan_to_num(0.0)

    square_B = products.squares()
    ones_B = torch.ones_like(square_B)
    gram_PP = products.of_sums(row_B, n_prompts, ones_B, ones_B[None])[0]
    trace_P = sum_rows(square_B, row_B, n_prompts)
    could_contribute_B = ~step.reward_B.isnan() | (square_B > 0)
    has_gradient_B = (square_B if step.coefficient_B is None else step.coefficient_B) != 0
    coefficient_live_P = sum_rows(has_gradient_B.double(), row_B, n_prompts) > 0
    return PromptGroups(
        products=products,
        row_B=row_B,
        prompt_P=prompt_P,
        index_PG=index_PG,
        present_PG=present_PG,
        gram_PP=(gram_PP + gram_PP.T) / 2,
        trace_P=trace_P,
        count_P=sum_rows(could_contribute_B.double(), row_B, n_prompts),
        centred_B=centred_B,
        sigma_P=sigma_P,
        live_P=coefficient_live_P & (gram_PP.diagonal() > CANCELLED * trace_P),
        coefficient_B=None if step.coefficient_B is None else step.coefficient_B.double(),
        baseline_size=step.baseline_size,
    )


def _statistics(reward_PG: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if reward_PG.numel() == 0:
        return (reward_PG.new_zeros(len(reward_PG), 1),) * 3
    return masked_statistics(reward_PG, ~reward_PG.isnan(), dim=(1,))
