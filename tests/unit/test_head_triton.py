"""The Triton rows of the head under the interpreter: every pair of flags, normalisation in the launch, far numbers."""

import math

import pytest
import torch
from allpairspy import AllPairs
from guarded_memory import guard
from head_example import EPS, OFF_POLICY, assert_no_worse, example, per_token, token_arguments
from kernel_inputs import BACKENDS, INTERPRETED, method_options
from reference import head_logprobs

from grpo_kernels import linear_grpo_loss, linear_logprob, normalize_rewards, use_backend

FLAGS = {
    "options": list(OFF_POLICY),
    "off_policy": [True, False],
    "biased": [True, False],
    "softcap": [None, 2.0],
    "rewards": [True, False],
}
DESIGN = [dict(zip(FLAGS, row, strict=True)) for row in AllPairs(list(FLAGS.values()))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["none", "mean", "loo", "std", "power"])
@pytest.mark.parametrize("group", [2, 7, 64])
def test_rewards_instead_of_advantages(method, group, backend):
    """The launch normalises as ``normalize_rewards`` does; missing rewards and groups that are all equal among them."""
    options = method_options(method)
    dtype = torch.float64 if backend == "torch" else torch.float32
    tensors, data = example(n=group + 2, b=group, v=20, dtype=dtype)
    rewards = torch.randint(3, (group, group)).to(dtype)
    rewards[0] = 0.1
    rewards[:, -1] = math.nan
    position = torch.arange(group)
    advantages = normalize_rewards(rewards, method, **options)[position, position]
    arguments = token_arguments(tensors, data)
    with use_backend(backend):
        want = linear_grpo_loss(*arguments, advantages, data["weights"])
        given = {"rewards": (rewards, position), "normalization": (method, options)}
        got = linear_grpo_loss(*arguments, None, data["weights"], **given)
    close = {} if backend == "torch" else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(got.loss, want.loss, **close)
    torch.testing.assert_close(got.advantages, advantages[data["sequence"]].to(got.advantages.dtype), **close)
    if method != "none":
        assert (got.advantages[data["sequence"] == 0] == 0).all()
    inputs = list(tensors.values())[:2]
    gradients, expected = (torch.autograd.grad(out.loss, inputs) for out in (got, want))
    torch.testing.assert_close(gradients, expected, **close)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_infinities_of_tokens_that_do_not_count(backend):
    """An infinite ratio or KL adds nothing where weight, policy scale or beta is 0; with beta its slope is finite."""
    hidden = torch.zeros(3, 1, requires_grad=True)
    weight = torch.zeros(4, 1, requires_grad=True)
    arguments = (hidden, weight, torch.zeros(3).long(), torch.arange(3))
    ones, advantages = torch.ones(3), torch.tensor([-1.0, -1.0, 1.0])
    infinite = torch.tensor([-math.inf, -math.inf, -1.386])
    with use_backend(backend):
        options = {"old_logprobs_N": infinite, "ref_logprobs_N": infinite.abs() * 100}
        options |= {"policy_scale_N": torch.tensor([1.0, 0.0, 1.0])}
        dead = linear_grpo_loss(*arguments, advantages, torch.tensor([0.0, 1.0, 1.0]), **options)
        assert torch.isfinite(dead.loss) and dead.loss.item() == pytest.approx(-1, rel=1e-3)
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(dead.loss, [hidden, weight]))
        options = {"ref_logprobs_N": -infinite.abs(), "beta": 0.1, "kl_times_ratio": False}
        reference = linear_grpo_loss(*arguments, advantages, ones, **options)
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(reference.loss, [hidden, weight]))
        sapo = linear_grpo_loss(*arguments, advantages * math.nan, ones, loss_type="sapo")
        assert not sapo.clipped.any()


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1 or a GPU")
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
class TestTriton:
    """The row kernels under the interpreter, against the torch backend."""

    @pytest.mark.parametrize("size", [1e-4, 1e-2, 0.3, 1.0, 4.0])
    def test_a_softcap_is_as_exact_as_plain_torchs(self, size):
        """Small logits under a large cap: tanh's digits must not cancel."""
        torch.manual_seed(0)
        hidden, weight = torch.randn(6, 16) * size, torch.randn(40, 16) / 4
        targets = torch.randint(0, 40, (6,))
        options = {"softcap": 30.0, "temperature": 0.01}
        truth, _ = head_logprobs(hidden.double(), weight.double(), targets, **options)
        same, _ = head_logprobs(hidden, weight, targets, **options)
        with use_backend("triton"):
            found = linear_logprob(hidden, weight, targets, **options)
        assert_no_worse(found, same, truth, EPS[torch.float32], "logprobs", slack=1.5)

    @pytest.mark.parametrize("flags", DESIGN, ids=lambda flags: "-".join(map(str, flags.values())))
    def test_every_pair_of_flags(self, flags, monkeypatch):
        """On guarded memory: the kernels read and write nothing outside their tensors."""
        guard(monkeypatch)
        options, biased = OFF_POLICY[flags["options"]], flags["biased"]
        tensors, data = example(n=12, v=50, dtype=torch.float32)
        if not biased:
            del tensors["bias"]
        given = {**per_token(data, options, off_policy=flags["off_policy"], scaled=biased), **options}
        advantages = data["advantages"]
        if flags["rewards"]:
            table = torch.tensor([[1.0, 0.0, 0.25, math.nan]]).expand(4, 4)
            advantages = None
            given |= {"rewards": (table, torch.arange(4)), "normalization": ("std", {})}
        head = {"bias": tensors.get("bias"), "softcap": flags["softcap"], "temperature": 0.9}
        results = []
        for backend in ("torch", "triton"):
            with use_backend(backend):
                out = linear_grpo_loss(*token_arguments(tensors, data), advantages, data["weights"], **head, **given)
                gradients = torch.autograd.grad(out.loss, list(tensors.values()))
            results.append([*vars(out).values(), *gradients])
        torch.testing.assert_close(results[1], results[0], rtol=2e-5, atol=2e-6)
