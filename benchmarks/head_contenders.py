"""The fused head and its peers on one set of inputs: each is a function that returns the loss.

Shapes: N tokens of B sequences, H hidden, V vocabulary. All compute gradients of hidden states and, unless frozen, the
head. The loss is the same on-policy GRPO loss, but for ``MEAN_NLL``: those take no weight for each token, so their loss
is the mean negative log-likelihood. Entropies: ours, TRL, full logits and Liger's scaled cross entropy compute them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch

from grpo_kernels import linear_grpo_loss

SHAPES = {
    "SmolLM2": (576, 49152),
    "Qwen2.5": (896, 151936),
    "Qwen2.5-1.5B": (1536, 151936),
    "8B": (4096, 151936),
    "check": (128, 512),  # the smallest that every peer's kernels take
    "tiny": (32, 64),
}
SEQUENCES = 16


@dataclass
class Problem:
    """Inputs: a share ``live`` of the sequences has an advantage, as groups with mixed rewards do."""

    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    sequence: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor

    @property
    def live_rows(self) -> int:
        return int((self.advantages != 0)[self.sequence].sum())


def make_problem(shape: str, n: int, dtype: torch.dtype, *, frozen: bool, live: float, device: str = "cpu") -> Problem:
    h, v = SHAPES[shape]
    torch.manual_seed(0)
    hidden = torch.randn(n, h, device=device).to(dtype).requires_grad_()
    weight = torch.empty(v, h, device=device, dtype=dtype).normal_(std=0.05).requires_grad_(not frozen)
    sequence = torch.arange(n, device=device) * SEQUENCES // n
    advantages = torch.randn(SEQUENCES, device=device)
    advantages[torch.arange(SEQUENCES, device=device) >= round(live * SEQUENCES)] = 0
    weights = torch.full((SEQUENCES,), 1 / n, device=device)
    return Problem(hidden, weight, torch.randint(v, (n,), device=device), sequence, advantages, weights)


def policy_loss(logprobs: torch.Tensor, problem: Problem) -> torch.Tensor:
    """TRL's lines for an on-policy token-level loss."""
    ratio = torch.exp(logprobs - logprobs.detach())
    advantage = problem.advantages[problem.sequence]
    per_token = -torch.min(ratio * advantage, torch.clamp(ratio, 0.8, 1.2) * advantage)
    return (per_token * problem.weights[problem.sequence]).sum()


def ours(problem: Problem) -> torch.Tensor:
    p = problem
    return linear_grpo_loss(p.hidden, p.weight, p.targets, p.sequence, p.advantages, p.weights).loss


def trl(problem: Problem) -> torch.Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    logprobs, *_ = ChunkedLogProbFunction.apply(
        problem.hidden, problem.weight, None, problem.targets, 1.0, 32768, None, 1.0, ("log_probs", "entropy")
    )
    return policy_loss(logprobs, problem)


def naive(problem: Problem) -> torch.Tensor:
    logp = (problem.hidden @ problem.weight.T).float().log_softmax(-1)
    with torch.no_grad():
        -(logp.exp() * logp).sum(-1)
    return policy_loss(logp.gather(1, problem.targets[:, None])[:, 0], problem)


def liger(problem: Problem) -> torch.Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    compiled = problem.hidden.is_cuda  # its default; a CPU has no compiler everywhere
    loss = LigerFusedLinearGRPOLoss(beta=0.0, compiled=compiled, use_ref_model=False, loss_type="bnpo")
    targets = problem.targets.view(SEQUENCES, -1)
    hidden = problem.hidden.view(*targets.shape, -1)
    mask = torch.ones(targets.shape, device=targets.device)
    return loss(hidden, problem.weight, targets, mask, problem.advantages)[0]


def cross_entropy(problem: Problem) -> torch.Tensor:
    """torch's own fused head for a scalar loss (every token the same weight)."""
    options = torch.nn.LinearCrossEntropyOptions()
    return torch.nn.functional.linear_cross_entropy(problem.hidden, problem.weight, problem.targets, options=options)


def liger_scaled(problem: Problem) -> torch.Tensor:
    """Liger's fused linear scaled cross entropy (FLSCE): log-probs and entropies of tokens.

    Its CuTe kernels run on compute capability 9.0 alone; elsewhere it multiplies chunks of 512 tokens in torch.
    """
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Function

    nll, _entropies = Function.apply(problem.hidden, problem.weight, problem.targets, 1.0, -100, 1, True)
    return policy_loss(-nll, problem)


def liger_cross_entropy(problem: Problem) -> torch.Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(problem.hidden, problem.weight, problem.targets)


def quack(problem: Problem) -> torch.Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(problem.hidden, problem.weight, problem.targets)


def quack_on_logits(problem: Problem) -> torch.Tensor:
    from quack.cross_entropy import cross_entropy as on_logits

    return on_logits(problem.hidden @ problem.weight.T, problem.targets, inplace_backward=True)


def cut(problem: Problem, filter_eps: float | str | None = "auto") -> torch.Tensor:
    """Cut cross-entropy: log-probs of tokens. By default its backward skips blocks of small probabilities.

    Its kernels run on a GPU alone, not in Triton's interpreter either; a CPU takes its torch version, which skips none.
    """
    from cut_cross_entropy import linear_cross_entropy

    options = {
        "reduction": "none",
        "filter_eps": filter_eps,
        "impl": "cce" if problem.hidden.is_cuda else "torch_compile",
    }
    nll = linear_cross_entropy(problem.hidden, problem.weight, problem.targets, **options)
    return policy_loss(-nll, problem)


CONTENDERS = {
    "ours": ours,
    "trl": trl,
    "full logits": naive,
    "Liger": liger,
    "Liger FLSCE": liger_scaled,
    "CCE": cut,
    "CCE unfiltered": partial(cut, filter_eps=None),
    "Liger cross entropy": liger_cross_entropy,
    "QuACK": quack,
    "QuACK on logits": quack_on_logits,
    "torch cross entropy": cross_entropy,
}
MEAN_NLL = {"Liger cross entropy", "QuACK", "QuACK on logits", "torch cross entropy"}


def missing() -> set[str]:
    """The contenders of ``pytest benchmarks/`` that aren't installed here; torch has its own from 2.13 on."""
    there = {
        "Liger": find_spec("liger_kernel") is not None,
        "torch cross entropy": hasattr(torch.nn.functional, "linear_cross_entropy"),
    }
    return {name for name, installed in there.items() if not installed}


def backward(contender: Callable[[Problem], torch.Tensor], problem: Problem) -> Callable[[], None]:
    """A call that leaves the gradients of the contender's loss in ``.grad``."""

    def call() -> None:
        problem.hidden.grad = problem.weight.grad = None
        contender(problem).backward()

    return call


def bare_products(problem: Problem) -> Callable[[], None]:
    """The floor: the matrix products alone, each at full size and in the run's dtype.

    Three with a trainable head (2 + 4 f in units of N V H operations), two with a frozen one (2 + 2 f), into buffers
    that are there already. The logits of all tokens are kept, which the contenders need not do.
    """
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    live = problem.live_rows
    logits = torch.zeros(len(hidden), len(weight), dtype=hidden.dtype, device=hidden.device)
    hidden_grad = torch.zeros_like(hidden)
    weight_grad = torch.zeros_like(weight) if problem.weight.requires_grad else None

    def call() -> None:
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits[:live], weight, out=hidden_grad[:live])
        if weight_grad is not None:
            torch.mm(logits[:live].T, hidden[:live], out=weight_grad)

    return call
