"""What is kept of one optimizer step to see how its prompts' gradients interfere, and its grouping by prompt.

Shapes: B sequences, P prompts, G completions of one prompt (the most that a prompt has in the step).

Flow: ``StepGradients`` (inner products of the sequences' gradients, ``inner_products.py``, and their rewards) ->
``PromptGroups`` (prompts as rows, in float64) -> ``metrics.py`` and ``curvature.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from grpo_kernels.normalize.group_statistics import masked_statistics

from .inner_products import InnerProducts, as_products, sum_rows

SYMMETRY_TOLERANCE = 1e-4  # of the largest diagonal entry: float32 products summed in another order stay far below
CANCELLED = 1e-7  # a squared norm below this share of what was summed is rounding, not a direction


@dataclass(frozen=True)
class StepGradients:
    """Sequence i of an optimizer step contributes u_i to the gradient of the step's objective.

    ``gram_BB``: inner products u_i . u_j, exact or from a sketch, any floating dtype; of a step whose matrix would be
    too large, what answers for it.
    ``prompt_B``: int64, equal where sequences answer the same prompt; any numbers. A step may hold part of a group.
    ``reward_B``: NaN where a completion could not be scored.
    ``coefficient_B``: c_i, the one number in front of the sequence's score s_i = grad log pi(o_i | q_p), so that
    u_i = c_i s_i: advantage, token weight, accumulation factor, cispo's clamp, a sequence-level ratio. 0 where the
    sequence is dead: it has no s_i then. None where the tokens of a sequence don't share one coefficient (token-level
    ratios off policy, KL, an entropy mask or bonus): everything made of scores is left out.
    ``baseline_size``: how many rewards the baseline of an advantage is the mean of: G for a group's mean (and for the
    mean of the others), P*G for the batch's, 0 for none.
    """

    gram_BB: torch.Tensor | InnerProducts
    prompt_B: torch.Tensor
    reward_B: torch.Tensor
    coefficient_B: torch.Tensor | None
    baseline_size: int


def check_step(step: StepGradients) -> None:
    """``ValueError`` naming the field, its value and what is expected."""
    gram, prompt, reward, coefficient = step.gram_BB, step.prompt_B, step.reward_B, step.coefficient_B
    if isinstance(gram, torch.Tensor) and (
        gram.ndim != 2 or len(gram) != gram.shape[1] or not gram.is_floating_point()
    ):
        raise ValueError(f"gram_BB is {gram.dtype} {tuple(gram.shape)}: expected a square floating-point matrix (B, B)")
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
    if not isinstance(gram, torch.Tensor):
        if not gram.squares().isfinite().all():
            raise ValueError("gram_BB holds a squared norm that isn't finite")
        return
    if len(gram) == 0:
        return
    if not gram.isfinite().all():
        i, j = (~gram.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"gram_BB[{i}, {j}] is {gram[i, j].item()}: expected finite inner products")
    if gram.diagonal().min() < 0:
        raise ValueError(f"gram_BB has {gram.diagonal().min().item():g} on its diagonal: squared norms aren't negative")
    asymmetry = (gram - gram.T).abs().max().item()
    if asymmetry > SYMMETRY_TOLERANCE * gram.diagonal().max().item():
        raise ValueError(f"gram_BB is not symmetric: entries differ from their mirror image by up to {asymmetry:g}")


@dataclass(frozen=True)
class PromptGroups:
    """A checked step in float64, grouped. Prompts are in ascending order of ``prompt_P``.

    ``products``: inner products of the u_i. ``row_B``: the prompt's place in ``prompt_P``. ``index_PG``: the sequences
    of a prompt, ``present_PG`` where there is one. ``gram_PP``: inner products of the prompts' gradients g_p = sum of
    its u_i. ``trace_P``: sum of norm(u_i)^2. ``count_P``: sequences that could contribute (not those that are
    unscorable and have no gradient).
    ``centred_B``: a_i, the reward less its group's mean here; 0 where unscorable, exactly 0 in an all-equal group.
    ``sigma_P``: population std of the group's rewards; NaN where none is scorable.
    ``live_P``: some coefficient isn't 0 (coefficients unknown: some gradient), and g_p isn't 0 to rounding.
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
    baseline_size: int

    def sum_by_prompt(self, values_B: torch.Tensor) -> torch.Tensor:
        """(B, ...) becomes (P, ...): summed over the sequences of each prompt."""
        return sum_rows(values_B, self.row_B, len(self.prompt_P))


def group_by_prompt(step: StepGradients | PromptGroups) -> PromptGroups:
    """Checks the step and groups its sequences by prompt; ``ValueError`` as ``check_step``. Groups stay as they are."""
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
    given = (square_B if step.coefficient_B is None else step.coefficient_B) != 0
    coefficient_live_P = sum_rows(given.double(), row_B, n_prompts) > 0
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
