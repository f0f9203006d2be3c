"""Inputs of the kernels that several test files share: odd memory layouts, what a normalisation needs, packed rows."""

import os

import pytest
import torch

from grpo_kernels import linear_grpo_loss, linear_logprob, normalize_rewards
from grpo_kernels.interference.step_gradients import StepGradients
from grpo_kernels.interference.what_if import StepScores

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = [
    "torch",
    pytest.param("triton", marks=pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")),
]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="needs a GPU")


# ---- memory layouts


def with_gaps(x):
    """Every third number of its memory along the last dimension, poison between."""
    wide = x.new_full((*x.shape, 3), 1e4 if x.is_floating_point() else 77)
    wide[..., 1] = x
    return wide[..., 1]


def from_the_middle(x):
    flat = torch.cat([x.new_full((5,), 3), x.flatten(), x.new_full((5,), 3)])
    return flat[5:-5].view(x.shape)


def transposed(x):
    return x.T.contiguous().T if x.ndim == 2 else with_gaps(x)


LAYOUTS = [with_gaps, from_the_middle, transposed]


# ---- calls of the head


N, H, V, B, G = 12, 16, 37, 4, 4


def head_inputs(dtype=torch.float32):
    """Arguments of both functions by name; hidden states, weights and what else is multiplied in this dtype."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    given = {
        "hidden_NH": normal(N, H),
        "weight_VH": normal(V, H) * 0.3,
        "bias": normal(V),
        "targets_N": torch.randint(V, (N,), generator=generator),
        "sequence_N": torch.arange(N) // 3,
        "weights_B": torch.rand(B, generator=generator),
        "old_logprobs_N": normal(N) * 0.1 - 3,
        "ref_logprobs_N": normal(N) * 0.1 - 3,
        "policy_scale_N": torch.rand(N, generator=generator) + 0.5,
        "rewards": normal(B, G),
        "position": torch.arange(B) % G,
        "advantages": normal(B),
        "advantages_N": normal(N),
        "low_inputs": normal(N, 2),
        "low_weight": normal(V, 2),
        "projection": normal(V, 4),
    }
    products = ("hidden_NH", "weight_VH", "bias", "low_inputs", "low_weight", "projection")
    return {name: tensor.to(dtype) if name in products else tensor for name, tensor in given.items()}


OF_TOKENS = ("targets_N", "sequence_N", "bias", "weights_B", "old_logprobs_N", "ref_logprobs_N", "policy_scale_N")


def signal_of(given, signal):
    """The arguments of ``linear_grpo_loss`` that are advantages or rewards."""
    value = (given["rewards"], given["position"]) if signal == "rewards" else given[signal]
    return {"advantages": None, signal: value}


def loss_call(given, signal):
    hidden = given["hidden_NH"].detach().requires_grad_()
    weight = given["weight_VH"].detach().requires_grad_()
    arguments = {**signal_of(given, signal), **{name: given[name] for name in OF_TOKENS}}
    out = linear_grpo_loss(hidden, weight, beta=0.1, entropy_coef=0.01, **arguments)
    out.loss.backward()
    return [out.loss, out.logprobs, out.entropies, out.ratio, out.kl, hidden.grad, weight.grad]


def logprob_call(given, signal):
    hidden = given["hidden_NH"].detach().requires_grad_()
    weight = given["weight_VH"].detach().requires_grad_()
    out = linear_logprob(hidden, weight, given["targets_N"], bias=given["bias"], entropy=True)
    (out[0] @ given["advantages_N"] + out[1].sum()).backward()
    return [*out, hidden.grad, weight.grad]


# call, its signal, and which of its inputs are laid out oddly
CALLS = [
    (loss_call, "rewards", (*OF_TOKENS, "hidden_NH", "weight_VH", "rewards", "position")),
    (loss_call, "advantages", ("advantages",)),
    (loss_call, "advantages_N", ("advantages_N",)),
    (logprob_call, "", ("targets_N", "bias", "hidden_NH", "weight_VH", "advantages_N")),
]


# ---- normalisations


def method_options(method: str, alpha: float = 0.5) -> dict:
    return {"alpha": alpha} if method == "power" else {}


def context_of(method: str, rewards) -> dict:
    """What the method needs besides the rewards, as plain lists: also the reference's arguments."""
    context = {
        # different in every place; the first completion of all is empty
        "length_weighted": lambda: {
            "lengths": [[float((7 * p + 3 * g) % 11) for g in range(len(group))] for p, group in enumerate(rewards)]
        },
        "decoupled": lambda: {
            "function_rewards": [[[r, (2 * g) % 3 - r] for g, r in enumerate(group)] for group in rewards],
            "function_weights": [1.0, 0.5],
        },
        "running_std": lambda: {"running_variance": 0.25},
        "curvature": lambda: {"curvature_scale": [0.5 + p for p in range(len(rewards))]},
    }
    return context.get(method, dict)()


def context_tensors(method: str, rewards_PG) -> dict:
    """The same as ``normalize_rewards`` takes it."""
    context = context_of(method, rewards_PG.tolist())
    shapes = {"lengths": rewards_PG.shape, "function_rewards": (*rewards_PG.shape, 2)}  # of an empty batch too
    return {
        name: torch.tensor(value, dtype=torch.float64, device=rewards_PG.device).reshape(shapes.get(name, (-1,)))
        if isinstance(value, list)
        else value
        for name, value in context.items()
    }


# ---- rows that share prompts

PROMPT_OF, PROMPTS, ANSWERS, WIDTH, LONGEST = [0, 0, 1, 1, 1, 2, 0], [4, 6, 1], [9, 3, 1, 5, 9, 2, 4], 6, 9


def shared_rows():
    """(ids, mask): seven answers, of 1 to 9 tokens, to three prompts, out of order; one prompt of a token."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 97, (length,), generator=generator) for length in PROMPTS]
    ids = torch.zeros(len(ANSWERS), WIDTH + LONGEST, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (prompt, length) in enumerate(zip(PROMPT_OF, ANSWERS, strict=True)):
        first = WIDTH - PROMPTS[prompt]
        ids[row, first:WIDTH], mask[row, first : WIDTH + length] = prompts[prompt], 1
        ids[row, WIDTH : WIDTH + length] = torch.randint(0, 97, (length,), generator=generator)
    return ids, mask


# ---- steps of known gradients


def step_of(vectors, prompts, rewards, coefficients=None, baseline_size=0) -> StepGradients:
    """From the contributions u_i themselves."""
    vectors = torch.as_tensor(vectors, dtype=torch.float64)
    return StepGradients(
        gram_BB=vectors @ vectors.T,
        prompt_B=torch.as_tensor(prompts),
        reward_B=torch.as_tensor(rewards, dtype=torch.float64),
        coefficient_B=None if coefficients is None else torch.as_tensor(coefficients, dtype=torch.float64),
        baseline_size=baseline_size,
    )


def step_of_prompts(gradients) -> StepGradients:
    """Of prompts with one sequence each, and these gradients."""
    count = len(gradients)
    return step_of(gradients, torch.arange(count), torch.zeros(count), torch.ones(count))


def make_scores(score_PGD, reward_PG, method="std", weight=0.25, chosen=None, **options):
    """As a step trained with ``method`` leaves them; ``chosen``: which of the P G sequences it holds."""
    n_prompts, count = reward_PG.shape
    advantage = normalize_rewards(reward_PG, method, **options)
    coefficient = -advantage * weight
    contribution = (coefficient[:, :, None] * score_PGD).flatten(0, 1)
    row = torch.arange(n_prompts * count)
    if chosen is not None:
        row = row[chosen]
    return StepScores(
        gram_BB=(contribution @ contribution.T)[row][:, row],
        coefficient_B=coefficient.flatten()[row],
        score_advantage_B=advantage.flatten()[row],
        advantage_B=advantage.flatten()[row],
        prompt_B=row // count,
        position_B=row % count,
        rewards_PG=reward_PG,
    )


def rollouts(rewards_PG, scores_PGD, normalization="mean") -> StepGradients:
    """A step of whole groups, by its rewards and scores."""
    n_prompts, n = rewards_PG.shape
    advantage_PG = rewards_PG - (0 if normalization == "none" else rewards_PG.mean(1, keepdim=True))
    if normalization == "std":
        advantage_PG = advantage_PG / (rewards_PG.std(1, keepdim=True) + 1e-4)
    vectors = (advantage_PG[:, :, None] / n * scores_PGD).flatten(0, 1)
    prompts = torch.arange(n_prompts).repeat_interleave(n)
    baseline_size = 0 if normalization == "none" else n
    return step_of(vectors, prompts, rewards_PG.flatten(), advantage_PG.flatten() / n, baseline_size)


def bernoulli(n_prompts, n, generator, low=0.5, high=0.5) -> torch.Tensor:
    rate = low + (high - low) * torch.rand(n_prompts, 1, generator=generator, dtype=torch.float64)
    return (torch.rand(n_prompts, n, generator=generator, dtype=torch.float64) < rate).double()


def gaussian(*shape, generator) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)
