"""How aligned the prompts' gradients are once the noise of their few answers is removed, with a confidence interval.

Shapes: P prompts of a step.

gamma_p is the gradient that prompt p has in expectation over answers. The alignment of a run is::

    alignment = E <gamma_p, gamma_q> / E |gamma_p|^2        p and q different prompts

It is the mean cosine where all gamma_p have one length, and elsewhere a mean cosine weighed by length: prompts of one
direction reach (E |gamma|)^2 / E |gamma|^2, which is 0.68 where half of the pass rates are 0.5 and half 0.05. A step
of P prompts has the expected squared length P E |gamma|^2 (1 + (P - 1) alignment).

Both expectations have estimates without bias (``signal`` for the second), summed over *all* prompts, those of
equal rewards as zeros. Ratios pair by pair, over live prompts alone, don't estimate it: a prompt is live by chance,
and the product of two lengths counts that chance twice, so that a cosine of 0.3 reads 7 at a pass rate of 0.03.

The interval is Fieller's, of a ratio of two means. The variances of the means within a step are those of U-statistics
(Hoeffding 1948). N is the mean of K_pq over ordered pairs, D the mean of V_p, K12 K13 the product of two pairs that
share a prompt, and each expectation the mean over all such tuples of different prompts::

    var N = (4 (P - 2) (E K12 K13 - E K12 K34) + 2 (E K12^2 - E K12 K34)) / (P (P - 1))
    var D = var V_p / P
    cov(N, D) = 2 (E K12 V1 - E K12 V3) / P

``examples/paper/alignment.py`` simulates how often the interval holds the truth.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields, replace

import torch

from .curvature import ROUNDING
from .step_gradients import PromptGroups

WINDOW = 20  # logged steps
FEWEST_STEPS, FEWEST_IN_ALL = 5, 100  # steps and, over these, prompts
FEWEST_PROMPTS = 4  # for products of two pairs that share no prompt
SIGNAL_ERRORS = 4.0  # standard errors that the mean signal must be above 0; 16 / G with fewer than 4 answers
NORMAL_QUANTILE = 1.959964  # of a 95 % interval


@dataclass(frozen=True)
class StepMoments:
    """What one step adds to the pooled estimate.

    Attributes:
        cross: N, the mean of <g_p, g_q> over pairs of different prompts.
        signal: D, the mean over prompts of V_p, an estimate of |gamma_p|^2.
        cross_variance: estimated variance of ``cross``.
        covariance: of ``cross`` and ``signal``.
        signal_variance: estimated variance of ``signal``.
        prompts: P.
        errors_needed: the standard errors that ``signal`` must be above 0.
    """

    cross: float
    signal: float
    cross_variance: float
    covariance: float
    signal_variance: float
    prompts: float
    errors_needed: float


@dataclass(frozen=True)
class Alignment:
    """A pooled estimate with its 95 % interval."""

    value: float
    low: float
    high: float


def signal(groups: PromptGroups) -> torch.Tensor:
    """Returns (P,) V_p, an unbiased estimate of |E g_p|^2 over rollouts; NaN for a prompt with one sequence.

    With n the prompt's sequences in the step and b the baseline size::

        V_p = n / (n - 1) * (sum of the prompt's block of the Gram matrix - its trace) / (1 + 1 / (b - 1)^2)

    Without the last factor that is the estimate for independent sequences. A baseline that is the mean of b rewards,
    those of both sequences included, adds the factor: 1.11 at b = 4, 1.02 at b = 8. The estimate is exact for r - mean
    and r - mean of the others. Division by the group's own std makes it too small: by 2 % at a pass rate of 1/2 with 8
    answers, by a quarter at 0.05 (see ``trained_groups``).
    """
    between_P = groups.gram_PP.diagonal() - groups.trace_P
    n_P = groups.count_P
    b_P = torch.as_tensor(groups.baseline_size, device=n_P.device).to(n_P)
    factor = torch.where(b_P > 1, 1 + 1 / (b_P - 1).clamp(min=1) ** 2, 1.0)
    return torch.where(n_P > 1, n_P / (n_P - 1).clamp(min=1) * between_P / factor, torch.nan)


def raw_groups(groups: PromptGroups) -> PromptGroups | None:
    """Returns the step with gradients of rewards less their group's mean, whatever the normalisation that trained.

    They are sums of (r_i - mean) s_i / (n - 1), with scores s_i = u_i / c_i and n sequences of the prompt. None where a
    score is missing that they need: coefficients are unknown (KL, token-level ratios), or c_i is 0 although r_i isn't
    the mean (the normalisation ``none``, a sequence masked for its length).
    """
    coefficient_B = groups.coefficient_B
    if coefficient_B is None:
        return None
    sigma_B = groups.sigma_P[groups.row_B].nan_to_num(0.0)
    centred_B = torch.where(groups.centred_B.abs() > ROUNDING * sigma_B, groups.centred_B, 0.0)
    known_B = coefficient_B != 0
    if ((centred_B != 0) & ~known_B).any():
        return None
    others_B = (groups.count_P - 1).clamp(min=1)[groups.row_B]
    factor_B = torch.where(known_B, centred_B / others_B / torch.where(known_B, coefficient_B, 1.0), 0.0)
    return _rescaled(groups, factor_B, groups.count_P)


def trained_groups(groups: PromptGroups, advantage_B: torch.Tensor) -> PromptGroups:
    """Returns the step with its gradients as trained, each prompt's times its group's scale where there is one.

    Division by a group's own std makes V_p too small, as it enlarges groups with a small std. Where advantages are
    rewards less their mean over a number of the group, that number is multiplied back; a group without advantages (a
    KL penalty's gradient) gets the mean of these numbers.

    Args:
        groups: the step.
        advantage_B: (B,) the advantages that were trained with; NaN where tokens have their own.
    """
    centred_B, advantage_B = groups.centred_B, advantage_B.double()
    square_P = groups.sum_by_prompt(advantage_B.square())
    scaled_P = square_P > 0
    scale_P = groups.sum_by_prompt(centred_B * advantage_B) / torch.where(scaled_P, square_P, 1.0)
    rest_P = groups.sum_by_prompt((centred_B - scale_P[groups.row_B] * advantage_B).square())
    if not scaled_P.any() or not (rest_P <= 1e-6 * groups.sum_by_prompt(centred_B.square()))[scaled_P].all():
        return groups
    scale_P = torch.where(scaled_P, scale_P, scale_P[scaled_P].mean())
    return _rescaled(groups, scale_P[groups.row_B], groups.baseline_size)


def _rescaled(groups: PromptGroups, factor_B: torch.Tensor, baseline_size: int | torch.Tensor) -> PromptGroups:
    products = groups.products
    gram_PP = products.of_sums(groups.row_B, len(groups.prompt_P), factor_B, factor_B[None])[0]
    trace_P = groups.sum_by_prompt(products.squares() * factor_B.square())
    return replace(groups, gram_PP=(gram_PP + gram_PP.T) / 2, trace_P=trace_P, baseline_size=baseline_size)


def step_alignment(groups: PromptGroups, advantage_B: torch.Tensor) -> tuple[str, StepMoments | None]:
    """Returns the metric that a step adds to, ``alignment`` or ``alignment_trained``, and its moments, if any."""
    raw = raw_groups(groups)
    if raw is None:
        return "alignment_trained", step_moments(trained_groups(groups, advantage_B))
    return "alignment", step_moments(raw)


def step_moments(groups: PromptGroups) -> StepMoments | None:
    """Returns a step's moments; None with fewer than four prompts of two sequences or more.

    A prompt with one sequence is left out: which prompts a step holds a single sequence of doesn't depend on rewards.

    Args:
        groups: every prompt of the step, those of equal rewards too; gradients of rewards less their group's mean
            (``raw_groups``), or gradients as trained.
    """
    signal_P = signal(groups)
    known_P = ~signal_P.isnan()
    if int(known_P.sum()) < FEWEST_PROMPTS:
        return None
    needed = errors_needed(float(groups.count_P[known_P].min()))
    found = moments(groups.gram_PP[known_P][:, known_P], signal_P[known_P])
    return StepMoments(*[*found.tolist(), float(known_P.sum()), needed])


def errors_needed(answers: float) -> float:
    """The standard errors that the mean signal must be above 0, with so many answers to a prompt."""
    return max(SIGNAL_ERRORS, 16 / answers)


def moments(gram_PP: torch.Tensor, signal_P: torch.Tensor) -> torch.Tensor:
    """Returns (..., 5), the first five of ``StepMoments``, from (..., P, P) and (..., P).

    Raises ``ValueError`` for shapes that don't fit, and below four prompts.
    """
    n = signal_P.shape[-1]
    if gram_PP.shape != (*signal_P.shape, n) or n < FEWEST_PROMPTS:
        shapes = f"{tuple(gram_PP.shape)} and {tuple(signal_P.shape)}"
        raise ValueError(f"gram_PP and signal_P have shapes {shapes}: expected (..., P, P), (..., P), P at least 4")
    gram_PP = gram_PP - torch.diag_embed(gram_PP.diagonal(dim1=-2, dim2=-1))
    row_P = gram_PP.sum(-1)
    total, squares, rows = row_P.sum(-1), gram_PP.square().sum((-1, -2)), row_P.square().sum(-1)
    pairs, triples = n * (n - 1), n * (n - 1) * (n - 2)
    same = squares / pairs  # E K12^2
    one_shared = (rows - squares) / triples  # E K12 K13
    none_shared = (total.square() - 4 * rows + 2 * squares) / (triples * (n - 3))  # E K12 K34
    cross_variance = (4 * (n - 2) * (one_shared - none_shared) + 2 * (same - none_shared)) / pairs
    with_own = (row_P * signal_P).sum(-1)
    covariance = 2 / n * (with_own / pairs - (total * signal_P.sum(-1) - 2 * with_own) / triples)
    return torch.stack([total / pairs, signal_P.mean(-1), cross_variance, covariance, signal_P.var(-1) / n], dim=-1)


def pooled_alignment(steps: Sequence[StepMoments]) -> Alignment | None:
    """Returns the ratio of the steps' mean moments with Fieller's interval.

    None where the mean signal isn't ``errors_needed`` standard errors above 0: nothing can be said then. None, too,
    below ``FEWEST_STEPS`` steps or ``FEWEST_IN_ALL`` prompts in all, and where a variance is estimated below 0: the
    variances are hardly known themselves.
    """
    n = len(steps)
    if n < FEWEST_STEPS or sum(one.prompts for one in steps) < FEWEST_IN_ALL:
        return None
    cross, length, *variances = (sum(column) / n for column in list(zip(*map(astuple, steps), strict=True))[:5])
    cross_variance, covariance, length_variance = (variance / n for variance in variances)
    error = math.sqrt(length_variance)
    if cross_variance <= 0 or length <= 0 or length <= max(one.errors_needed for one in steps) * error:
        return None
    z2 = _quantile((length / error) ** 2 if error else math.inf) ** 2
    a = length**2 - z2 * length_variance
    b = cross * length - z2 * covariance
    c = cross**2 - z2 * cross_variance
    half = math.sqrt(max(b**2 - a * c, 0.0))
    return Alignment(cross / length, (b - half) / a, (b + half) / a)


def _quantile(freedom: float) -> float:
    """Student's 97.5 % quantile (Cornish-Fisher to second order). ``freedom``: the number of prompts of equal signal
    that would have the same relative error."""
    z = NORMAL_QUANTILE
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


class PooledAlignment:
    """The alignment over the latest ``WINDOW`` logged steps, of raw and of trained gradients each by itself."""

    def __init__(self) -> None:
        self.steps: dict[str, deque[StepMoments]] = {}

    def observe(self, name: str, moments: StepMoments | None) -> dict[str, float]:
        """Adds a step (see ``step_alignment``) and returns ``interference/<name>``, with ``_low`` and ``_high``.

        Returns nothing where nothing can be said, and at a step without moments.
        """
        if moments is None:
            return {}
        steps = self.steps.setdefault(name, deque(maxlen=WINDOW))
        steps.append(moments)
        found = pooled_alignment(steps)
        if found is None:
            return {}
        named = {"": found.value, "_low": found.low, "_high": found.high}
        return {f"interference/{name}{end}": value for end, value in named.items()}

    def state_dict(self) -> dict[str, list[dict[str, float]]]:
        """Plain numbers, for JSON."""
        return {name: [asdict(one) for one in steps] for name, steps in self.steps.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
        """Takes over what ``state_dict`` returned."""
        names = {field.name for field in fields(StepMoments)}
        self.steps = {
            name: deque((StepMoments(**one) for one in steps if one.keys() == names), WINDOW)
            for name, steps in state.items()
        }
