"""linear_logprob and linear_grpo_loss against float64 truth, plain torch, and numbers worked by hand."""

import itertools
import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import grpo_loss, head_logprobs
from torch.utils.flop_counter import FlopCounterMode

from grpo_kernels import linear_grpo_loss, linear_logprob, normalize_rewards, use_backend
from grpo_kernels.backend import assume_native_half, native_half
from grpo_kernels.head import products

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EPS = {torch.float32: 1.2e-7, torch.bfloat16: 7.8e-3, torch.float16: 9.8e-4, torch.float64: 2.3e-16}
OFF_POLICY = {
    "clip": {},
    "wide clip": {"epsilon": 0.1, "epsilon_high": 0.4},
    "delta": {"delta": 1.5},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.3},
    "sapo": {"loss_type": "sapo", "sapo_temperatures": (0.8, 1.2)},
    "kl": {"beta": 0.1},
    "plain kl": {"beta": 0.1, "kl_times_ratio": False},
    "entropy": {"entropy_coef": 0.3},
    "all": {"beta": 0.05, "entropy_coef": 0.1, "delta": 1.8, "epsilon_high": 0.3},
}


def example(n=24, h=8, v=37, b=4, *, dtype=torch.float64, seed=0, scale=1.0, spread=0.3):
    """Inputs of a loss with both clipped and unclipped tokens, a dead sequence, and a weight of its own each."""
    torch.manual_seed(seed)
    tensors = {
        "hidden": torch.randn(n, h, dtype=torch.float64),
        "weight": scale * torch.randn(v, h, dtype=torch.float64),
        "bias": torch.randn(v, dtype=torch.float64),
    }
    tensors = {name: tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()}
    targets = torch.randint(v, (n,))
    targets[: min(n, 2)] = torch.tensor([0, v - 1])[: min(n, 2)]
    sequence = torch.arange(n) % b
    advantages = torch.randn(b, dtype=torch.float64)
    if b > 1:
        advantages[1] = 0
    with torch.no_grad():
        logprobs, _ = head_logprobs(
            tensors["hidden"].double(), tensors["weight"].double(), targets, bias=tensors["bias"].double()
        )
    data = {
        "targets": targets,
        "sequence": sequence,
        "advantages": advantages,
        "weights": torch.rand(b, dtype=torch.float64) / max(n, 1),
        "old": logprobs + spread * torch.randn(n, dtype=torch.float64),
        "ref": logprobs + spread * torch.randn(n, dtype=torch.float64),
        "scale": torch.rand(n, dtype=torch.float64) + 0.5,
    }
    return tensors, data


@torch.no_grad()
def double_logprobs(tensors, targets):
    hidden, weight, bias = (tensors[name].double() for name in ("hidden", "weight", "bias"))
    return head_logprobs(hidden, weight, targets, bias=bias)[0]


def per_token(data, options, *, off_policy=True, scaled=False):
    return {
        "old_logprobs_N": data["old"] if off_policy else None,
        "ref_logprobs_N": data["ref"] if options.get("beta") else None,
        "policy_scale_N": data["scale"] if scaled else None,
    }


def ours(tensors, data, options, head, **extra):
    given = per_token(data, options, **extra)
    given = {name: None if x is None else x.float() for name, x in given.items()}
    if tensors["hidden"].dtype == torch.float64:
        given = per_token(data, options, **extra)
    return linear_grpo_loss(
        tensors["hidden"], tensors["weight"], data["targets"], data["sequence"], data["advantages"], data["weights"],
        bias=tensors.get("bias"), **given, **options, **head,
    )  # fmt: skip


def plain(tensors, data, options, head, dtype, **extra):
    """Plain torch in this dtype: (loss, log-probs, entropies, gradients)."""
    tensors = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in tensors.items()}
    work = torch.promote_types(dtype, torch.float32)
    logprobs, entropies = head_logprobs(
        tensors["hidden"], tensors["weight"], data["targets"], bias=tensors.get("bias"), **head
    )
    given = per_token(data, options, **extra)
    names = {"old_logprobs_N": "old_logprobs", "ref_logprobs_N": "ref_logprobs", "policy_scale_N": "policy_scale"}
    given = {names[name]: None if x is None else x.to(work) for name, x in given.items()}
    loss = grpo_loss(
        logprobs.to(work), entropies.to(work), data["sequence"], data["advantages"].to(work),
        data["weights"].to(work), **given, **options,
    )  # fmt: skip
    gradients = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
    return loss, logprobs, entropies, dict(zip(tensors, gradients, strict=True))


def distance(value, truth):
    return (value.double() - truth.double()).norm().item()


def assert_no_worse(value, same_dtype, truth, eps, name, slack=2.0, floor=0.0):
    """Our error is no more than plain torch's in the same dtype, up to a factor, plus a few roundings of the result."""
    ours_error, plain_error = distance(value, truth), distance(same_dtype, truth)
    assert math.isfinite(ours_error), name
    allowed = slack * plain_error + 4 * eps * truth.double().norm().item() + floor
    assert ours_error <= allowed, f"{name}: {ours_error:.3g} > {allowed:.3g} (plain torch {plain_error:.3g})"


HEADS = [
    {},
    {"temperature": 0.7},
    {"logit_scale": 0.25, "temperature": 1.3},
    {"softcap": 3.0},
    {"softcap": 2.0, "temperature": 0.5, "logit_scale": 2.0},
]


@pytest.mark.parametrize("options", OFF_POLICY.values(), ids=OFF_POLICY)
@pytest.mark.parametrize("off_policy", [True, False])
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_float64_is_exact(options, off_policy, head):
    tensors, data = example()
    out = ours(tensors, data, options, head, off_policy=off_policy, scaled=True)
    loss, logprobs, entropies, gradients = plain(
        tensors, data, options, head, torch.float64, off_policy=off_policy, scaled=True
    )
    torch.testing.assert_close(out.loss, loss)
    torch.testing.assert_close(out.logprobs, logprobs)
    torch.testing.assert_close(out.entropies, entropies)
    for (name, expected), got in zip(
        gradients.items(), torch.autograd.grad(out.loss, list(tensors.values())), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-13, msg=name)
    if off_policy and not head and options in (OFF_POLICY["clip"], OFF_POLICY["cispo"]):
        assert 0 < out.clipped.sum() < len(out.clipped)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [OFF_POLICY["clip"], OFF_POLICY["all"]], ids=["clip", "all"])
@pytest.mark.parametrize("off_policy", [True, False])
@pytest.mark.parametrize("head", [HEADS[0], HEADS[4]], ids=str)
def test_no_worse_than_plain_torch(dtype, options, off_policy, head):
    tensors, data = example(n=64, h=32, v=300, dtype=dtype, scale=0.5)
    same = plain(tensors, data, options, head, dtype, off_policy=off_policy)
    truth = plain(tensors, data, options, head, torch.float64, off_policy=off_policy)
    out = ours(tensors, data, options, head, off_policy=off_policy)
    eps = EPS[dtype]
    assert_no_worse(out.logprobs, same[1], truth[1], EPS[torch.float32], "logprobs")
    assert_no_worse(out.entropies, same[2], truth[2], EPS[torch.float32], "entropies")
    gradients = torch.autograd.grad(out.loss, list(tensors.values()))
    for name, got in zip(tensors, gradients, strict=True):
        assert got.dtype == dtype
        assert_no_worse(got, same[3][name], truth[3][name], eps, name)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 33),
    h=st.integers(1, 9),
    v=st.integers(2, 90),
    b=st.integers(1, 6),
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    option=st.sampled_from(sorted(OFF_POLICY)),
    scale=st.sampled_from([0.0, 0.1, 1.0, 10.0, 1e3]),
    magnitude=st.sampled_from([0.0, 1e-9, 1e-4, 1.0, 1e3]),
    strided=st.booleans(),
    masked=st.booleans(),
    off_policy=st.booleans(),
)
def test_shapes_and_values(n, h, v, b, seed, dtype, option, scale, magnitude, strided, masked, off_policy):
    options = OFF_POLICY[option]
    tensors, data = example(n, h, v, b, dtype=dtype, seed=seed, scale=scale)
    data["advantages"] = data["advantages"] * magnitude
    if masked and v > 3:  # a bias of -inf masks a column, which then can't be a target
        before = double_logprobs(tensors, data["targets"])
        with torch.no_grad():
            tensors["bias"][1] = -math.inf
        data["targets"][data["targets"] == 1] = 2
        # as near to the new targets' log-probs as to the old ones': where k3 is e^40 float64 is no truth
        moved = double_logprobs(tensors, data["targets"]) - before
        data["old"], data["ref"] = data["old"] + moved, data["ref"] + moved
    del_bias = {name: tensor for name, tensor in tensors.items() if name != "bias" or masked}
    if strided:
        wide = torch.zeros(h, max(n, 1) * 2, dtype=dtype)
        wide[:, ::2][:, :n] = tensors["hidden"].detach().T
        del_bias["hidden"] = wide[:, ::2][:, :n].T.requires_grad_()
    off_policy = off_policy and dtype == torch.float32  # a rounded ratio is clipped elsewhere: see below
    out = ours(del_bias, data, options, {}, off_policy=off_policy)
    inputs = [tensor for name, tensor in del_bias.items() if name != "bias"]
    gradients = torch.autograd.grad(out.loss, inputs)
    if n == 0:
        assert out.loss == 0 and all((g == 0).all() for g in gradients)
        return
    same = plain(del_bias, data, options, {}, dtype, off_policy=off_policy)
    truth = plain(del_bias, data, options, {}, torch.float64, off_policy=off_policy)
    logits = 1 + (del_bias["hidden"].detach().double() @ del_bias["weight"].detach().double().T).abs().max().item()
    eps = EPS[dtype]
    floor = math.sqrt(n) * 4 * eps * logits  # logits of this size are rounded by so much, in plain torch too
    assert_no_worse(out.logprobs, same[1], truth[1], EPS[torch.float32], "logprobs", floor=floor)
    assert_no_worse(out.entropies, same[2], truth[2], EPS[torch.float32], "entropies", floor=floor)
    if off_policy:
        # a rounded ratio may be clipped where the true one isn't: gradients are compared where none is near a bound
        ratio = (truth[1] - data["old"]).exp().detach()
        bounds = [1 - options.get("epsilon", 0.2), 1 + options.get("epsilon_high", 0.2), options.get("epsilon_high", 9)]
        near = min((ratio - bound).abs().min().item() for bound in [*bounds, options.get("delta", 9)])
        if near < 4 * EPS[dtype] * logits:
            return
    for name, got in zip([name for name in del_bias if name != "bias"], gradients, strict=True):
        if not torch.isfinite(same[3][name]).all():  # plain torch overflows or has 0 * inf: ours must not be worse
            continue
        size = truth[3][name].norm().item()
        # float16 can't hold what is below 6e-8, and a coefficient's relative error is its log-prob's absolute one
        tiny = (
            6e-8 * math.sqrt(got.numel()) if dtype == torch.float16 else 1e-20
        )  # nothing is that small but p log p far out
        assert_no_worse(got, same[3][name], truth[3][name], eps, name, slack=3, floor=tiny + 4 * eps * logits * size)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.skipif("not INTERPRETED"))])
@pytest.mark.parametrize("magnitude", [1e4, -1e4])
def test_large_logits_and_targets_at_both_ends(magnitude, backend):
    hidden = torch.tensor([[1.0], [1.0], [-1.0]], requires_grad=True)
    weight = torch.zeros(5, 1)
    weight[0], weight[4] = magnitude, magnitude / 2
    with use_backend(backend):
        out = linear_grpo_loss(
            hidden, weight, torch.tensor([0, 4, 0]), torch.tensor([0, 0, 1]), torch.tensor([1.0, 1.0]), torch.ones(2)
        )
    truth, entropies = head_logprobs(hidden.double(), weight.double(), torch.tensor([0, 4, 0]))
    torch.testing.assert_close(out.logprobs.double(), truth)
    torch.testing.assert_close(out.entropies.double(), entropies)
    (gradient,) = torch.autograd.grad(out.loss, hidden)
    expected = torch.autograd.grad(-truth.sum(), hidden)[0]
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.skipif("not INTERPRETED"))])
def test_an_offset_of_all_logits_costs_no_digits(backend):
    """Logits of 10,000 that differ by less than 1: probabilities come from the differences."""
    torch.manual_seed(0)
    offset = torch.full((6, 1), 1e4)
    hidden = torch.cat([offset, torch.randn(6, 4)], dim=1).requires_grad_()
    weight = torch.cat([torch.ones(40, 1), 0.1 * torch.randn(40, 4)], dim=1)
    logits = hidden @ weight.T  # as rounded by the product
    truth = logits.double().log_softmax(-1)[:, 0]
    with use_backend(backend):
        out = linear_grpo_loss(
            hidden, weight, torch.zeros(6).long(), torch.zeros(6).long(), torch.ones(1), torch.ones(1)
        )
    torch.testing.assert_close(out.logprobs.double(), truth, rtol=1e-6, atol=1e-6)
    expected = torch.autograd.grad(-truth.sum(), hidden)[0]
    torch.testing.assert_close(torch.autograd.grad(out.loss, hidden)[0][:, 1:], expected[:, 1:], rtol=1e-5, atol=1e-6)


def test_worked_by_hand():
    """Two tokens of two prompts, three words. Logits ln 2, 0, 0 and 0, 0, 0: probabilities 1/2 1/4 1/4 and thirds."""
    hidden = torch.tensor([[1.0], [0.0]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[math.log(2)], [0.0], [0.0]], dtype=torch.float64, requires_grad=True)
    out = linear_grpo_loss(
        hidden, weight, torch.tensor([0, 2]), torch.tensor([0, 1]), torch.tensor([2.0, -1.0]), torch.tensor([0.5, 0.25])
    )
    assert out.loss.item() == pytest.approx(-0.5 * 2 + 0.25 * 1)  # every ratio is 1
    assert out.logprobs.tolist() == pytest.approx([-math.log(2), -math.log(3)])
    assert out.entropies.tolist() == pytest.approx([1.5 * math.log(2), math.log(3)])
    out.loss.backward()
    # dL/dlogprob = -w A = -1 and 1/4; dlogprob/dlogits = onehot - p
    first, second = [-1 * 0.5, 1 * 0.25, 1 * 0.25], [-0.25 / 3, -0.25 / 3, 0.25 * 2 / 3]
    assert hidden.grad.flatten().tolist() == pytest.approx([first[0] * math.log(2), second[0] * math.log(2)])
    assert weight.grad.flatten().tolist() == pytest.approx(first)  # the second hidden state is 0


def test_clip_by_hand():
    """Ratios 2 and 1/2, advantages of both signs: only moves away from the old policy are clipped."""
    hidden = torch.zeros(4, 1, dtype=torch.float64)
    weight = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)  # log-probs ln 1/2
    old = torch.tensor([math.log(0.25), math.log(0.25), 0.0, 0.0], dtype=torch.float64)
    out = linear_grpo_loss(
        hidden, weight, torch.zeros(4, dtype=torch.long), torch.arange(4), torch.tensor([1.0, -1.0, 1.0, -1.0]),
        torch.ones(4), old_logprobs_N=old,
    )  # fmt: skip
    assert out.ratio.tolist() == pytest.approx([2, 2, 0.5, 0.5])
    assert out.clipped.tolist() == [True, False, False, True]
    assert out.loss.item() == pytest.approx(-1.2 + 2 - 0.5 + 0.8)
    capped = linear_grpo_loss(
        hidden, weight, torch.zeros(4, dtype=torch.long), torch.arange(4), torch.tensor([1.0, -1.0, 1.0, -1.0]),
        torch.ones(4), old_logprobs_N=old, delta=1.5,
    )  # fmt: skip
    assert capped.loss.item() == pytest.approx(-1.2 + 1.5 - 0.5 + 0.8)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("entropy", [False, True])
def test_gradcheck(softcap, entropy):
    tensors, data = example(n=5, h=3, v=7)
    low_rank = [torch.randn(5, 2, dtype=torch.float64, requires_grad=True),
                torch.randn(7, 2, dtype=torch.float64, requires_grad=True)]  # fmt: skip

    def logprob(hidden, weight, bias, inputs, matrix):
        return linear_logprob(
            hidden, weight, data["targets"], bias=bias, low_rank=(inputs, matrix), softcap=softcap, temperature=0.8,
            entropy=entropy,
        )  # fmt: skip

    def loss(hidden, weight, bias, inputs, matrix):
        return linear_grpo_loss(
            hidden, weight, data["targets"], data["sequence"], data["advantages"], data["weights"], bias=bias,
            low_rank=(inputs, matrix), softcap=softcap, old_logprobs_N=data["old"], ref_logprobs_N=data["ref"],
            beta=0.1, entropy_coef=0.2 if entropy else 0.0,
        ).loss  # fmt: skip

    arguments = (*tensors.values(), *low_rank)
    assert torch.autograd.gradcheck(logprob, arguments)
    assert torch.autograd.gradcheck(loss, arguments)


@pytest.mark.parametrize("trained", [c for r in (1, 2, 3) for c in itertools.combinations(range(3), r)])
@pytest.mark.parametrize("upstream", ["logprob", "entropy", "both"])
def test_logprob_gradients_for_any_upstream(trained, upstream):
    tensors, data = example(b=3)
    names = [list(tensors)[i] for i in trained]
    tensors = {name: tensor.detach().requires_grad_(name in names) for name, tensor in tensors.items()}
    cotangents = torch.randn(2, 24, dtype=torch.float64)
    cotangents[:, ::3] = 0

    def scalar(logprobs, entropies):
        total = logprobs.new_zeros(())
        if upstream in ("logprob", "both"):
            total = total + (logprobs * cotangents[0]).sum()
        if upstream in ("entropy", "both"):
            total = total + (entropies * cotangents[1]).sum()
        return total

    arguments = (tensors["hidden"], tensors["weight"], data["targets"])
    got = scalar(*linear_logprob(*arguments, bias=tensors["bias"], entropy=True))
    expected = scalar(*head_logprobs(*arguments, bias=tensors["bias"]))
    inputs = [tensors[name] for name in names]
    for g, e in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(g, e)


@pytest.mark.parametrize("method", ["none", "mean", "loo", "std", "power"])
@pytest.mark.parametrize("group", [2, 5, 64])
def test_rewards_instead_of_advantages(method, group):
    options = {"alpha": 0.5} if method == "power" else {}
    tensors, data = example(n=40, b=group)
    rewards_PG = torch.randint(3, (1, group)).double()
    rewards_PG[0, -1] = math.nan
    advantages = normalize_rewards(rewards_PG, method, **options).flatten()
    arguments = (tensors["hidden"], tensors["weight"], data["targets"], data["sequence"])
    given_advantages = linear_grpo_loss(*arguments, advantages, data["weights"])
    given_rewards = linear_grpo_loss(
        *arguments, None, data["weights"], rewards=(rewards_PG.expand(group, group), torch.arange(group)),
        normalization=(method, options),
    )  # fmt: skip
    torch.testing.assert_close(given_rewards.loss, given_advantages.loss)
    torch.testing.assert_close(given_rewards.advantages, advantages[data["sequence"]])
    for a, b in zip(
        torch.autograd.grad(given_rewards.loss, list(tensors.values())[:2]),
        torch.autograd.grad(given_advantages.loss, list(tensors.values())[:2]),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def counted(function, n, h, v):
    """Floating-point operations of the matrix products, in units of N V H."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / (n * v * h)


@pytest.mark.parametrize("live", [1.0, 0.5, 0.125, 0.0])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("by", ["advantage", "weight", "clip"])
def test_products_are_counted(live, frozen, by):
    n, h, v, b = 64, 16, 640, 16
    torch.manual_seed(0)
    hidden = torch.randn(n, h, requires_grad=True)
    weight = torch.randn(v, h, requires_grad=not frozen)
    targets, sequence = torch.randint(v, (n,)), torch.arange(n) % b
    dead = torch.arange(b) >= live * b
    advantages, weights, old = torch.ones(b), torch.ones(b), None
    if by == "advantage":
        advantages[dead] = 0
    elif by == "weight":
        weights[dead] = 0
    else:  # a ratio of e clips a positive advantage, one of 1 doesn't
        old = linear_logprob(hidden, weight, targets).detach() - dead[sequence].float()

    def run():
        linear_grpo_loss(hidden, weight, targets, sequence, advantages, weights, old_logprobs_N=old).loss.backward()

    assert counted(run, n, h, v) == pytest.approx(2 + (2 if frozen else 4) * live, abs=1e-9)


@pytest.mark.parametrize("live", [1.0, 0.25])
def test_products_of_logprob_are_counted(live):
    n, h, v = 64, 16, 640
    hidden, weight = torch.randn(n, h, requires_grad=True), torch.randn(v, h, requires_grad=True)
    targets = torch.randint(v, (n,))
    upstream = (torch.arange(n) < live * n).float()

    def run(weight):
        (linear_logprob(hidden, weight, targets) * upstream).sum().backward()

    assert counted(lambda: run(weight), n, h, v) == 2 + 6 * live
    assert counted(lambda: run(weight.detach()), n, h, v) == 4  # kept from the forward; the backward is a row scale
    with torch.no_grad():
        assert counted(lambda: linear_logprob(hidden, weight, targets), n, h, v) == 2


def test_many_tiles_and_both_kinds_of_rows(monkeypatch):
    """Tiles of 16 rows, with the dead rows spread: the same as one tile."""
    tensors, data = example(n=100, b=7, dtype=torch.float32)
    whole = ours(tensors, data, OFF_POLICY["all"], {})
    expected = torch.autograd.grad(whole.loss, list(tensors.values()))
    monkeypatch.setitem(products.MAX_TILE_ROWS, "cpu", 16)
    for options in ({}, OFF_POLICY["all"]):
        tiled = ours(tensors, data, options, {})
        got = torch.autograd.grad(tiled.loss, list(tensors.values()))
        truth = plain(tensors, data, options, {}, torch.float64)
        for name, g in zip(tensors, got, strict=True):
            torch.testing.assert_close(g.double(), truth[3][name], rtol=1e-4, atol=1e-6)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(tiled.logprobs, whole.logprobs)


@pytest.mark.parametrize("native", [True, False])
def test_half_precision_on_a_cpu_with_and_without_instructions_for_it(native, monkeypatch):
    monkeypatch.setattr(products, "native_half", lambda dtype, device: native)
    monkeypatch.setattr(products, "VOCABULARY_BLOCK", 64)
    tensors, data = example(n=64, h=32, v=300, dtype=torch.bfloat16, scale=0.5)
    same = plain(tensors, data, {}, {}, torch.bfloat16)
    truth = plain(tensors, data, {}, {}, torch.float64)
    for rows in (512, 16):
        monkeypatch.setitem(products.MAX_TILE_ROWS, "cpu", rows)
        out = ours(tensors, data, {}, {})
        gradients = torch.autograd.grad(out.loss, list(tensors.values()))
        for name, got in zip(tensors, gradients, strict=True):
            assert_no_worse(got, same[3][name], truth[3][name], EPS[torch.bfloat16], name)


def test_what_must_be_written_is_written(monkeypatch):
    """Every buffer that isn't initialised is full of NaN at first."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

    tensors, data = example(n=50, dtype=torch.float32)
    data["advantages"][0] = 0
    expected = ours(tensors, data, {}, {})
    expected_gradients = torch.autograd.grad(expected.loss, list(tensors.values()))
    monkeypatch.setattr(torch, "empty", poisoned)
    for name in ("empty", "workspace"):
        monkeypatch.setattr(products, name, lambda shape, dtype, device: poisoned(shape, dtype=dtype))
    monkeypatch.setitem(products.MAX_TILE_ROWS, "cpu", 16)
    out = ours(tensors, data, {}, {})
    for got, wanted in zip(torch.autograd.grad(out.loss, list(tensors.values())), expected_gradients, strict=True):
        torch.testing.assert_close(got, wanted)
    for name in ("loss", "logprobs", "entropies", "ratio"):
        assert torch.isfinite(getattr(out, name)).all()


def test_calls_of_all_sizes_and_threads_share_no_memory_they_need():
    """The tile's memory is kept between calls: larger, smaller and other dtypes after one another, and two threads."""
    from concurrent.futures import ThreadPoolExecutor

    cases = [(5, 3000, torch.float32), (40, 20, torch.float64), (64, 9000, torch.bfloat16), (3, 2, torch.float32)] * 2

    inputs = [example(n=n, v=v, dtype=dtype, seed=n) for n, v, dtype in cases]

    def run(case):
        tensors, data = case
        out = ours(tensors, data, {}, {})
        return out.loss.detach(), *torch.autograd.grad(out.loss, list(tensors.values()))

    alone = [run(case) for case in inputs]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(run, inputs))
    for first, second in zip(alone, together, strict=True):
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.skipif("not INTERPRETED"))])
def test_two_runs_are_bit_equal(dtype, backend):
    n, v = (300, 2000) if backend == "torch" else (40, 200)
    tensors, data = example(n=n, h=64, v=v, dtype=dtype, b=6)
    runs = []
    for _ in range(2):
        with use_backend(backend):
            out = ours(tensors, data, OFF_POLICY["all"], {})
        runs.append((out.loss, out.logprobs, out.entropies, *torch.autograd.grad(out.loss, list(tensors.values()))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_advantages_of_tokens_where_there_are_as_many_sequences():
    tensors, data = example(n=4, b=4)
    data["sequence"] = torch.tensor([0, 0, 1, 1])
    arguments = (tensors["hidden"], tensors["weight"], data["targets"], data["sequence"])
    per_token = linear_grpo_loss(*arguments, None, torch.ones(4), advantages_N=torch.tensor([1.0, -1.0, 2.0, 3.0]))
    assert per_token.loss.item() == pytest.approx(-5.0)
    per_sequence = linear_grpo_loss(*arguments, torch.tensor([1.0, -1.0, 2.0, 3.0]), torch.ones(4))
    assert per_sequence.loss.item() == pytest.approx(0.0)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.skipif("not INTERPRETED"))])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_infinities_of_tokens_that_do_not_count(backend):
    """An infinite ratio or KL adds nothing where weight, policy scale or beta is 0; with beta its slope is finite."""
    hidden = torch.zeros(3, 1, requires_grad=True)
    weight = torch.zeros(4, 1, requires_grad=True)
    arguments = (hidden, weight, torch.zeros(3).long(), torch.arange(3))
    ones, advantages = torch.ones(3), torch.tensor([-1.0, -1.0, 1.0])
    infinite = torch.tensor([-math.inf, -math.inf, -1.386])
    with use_backend(backend):
        dead = linear_grpo_loss(
            *arguments, advantages, torch.tensor([0.0, 1.0, 1.0]), old_logprobs_N=infinite,
            policy_scale_N=torch.tensor([1.0, 0.0, 1.0]), ref_logprobs_N=infinite.abs() * 100,
        )  # fmt: skip
        assert torch.isfinite(dead.loss) and dead.loss.item() == pytest.approx(-1, rel=1e-3)
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(dead.loss, [hidden, weight]))
        reference = linear_grpo_loss(
            *arguments, advantages, ones, ref_logprobs_N=-infinite.abs(), beta=0.1, kl_times_ratio=False
        )
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(reference.loss, [hidden, weight]))
        sapo = linear_grpo_loss(*arguments, advantages * math.nan, ones, loss_type="sapo")
        assert not sapo.clipped.any()


def test_dead_tokens_get_exactly_no_gradient():
    tensors, data = example(dtype=torch.float32)
    out = ours(tensors, data, {}, {})
    (gradient,) = torch.autograd.grad(out.loss, [tensors["hidden"]])
    dead = (data["advantages"][data["sequence"]] == 0) | out.clipped
    assert dead.any() and (gradient[dead] == 0).all() and (gradient[~dead] != 0).any(1).all()


@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_float16_with_a_gradient_scaler(scale):
    """Coefficients of 1e-9 survive: multiplied as shares of the largest, and the scaler's factor comes last."""
    tensors, data = example(n=64, h=32, v=300, dtype=torch.float16, scale=0.3)
    data["advantages"] = data["advantages"] * 1e-5
    weight = tensors["weight"].detach().float().requires_grad_()  # as under autocast: float32 parameters
    with torch.autocast("cpu", dtype=torch.float16):
        out = linear_grpo_loss(
            tensors["hidden"], weight, data["targets"], data["sequence"], data["advantages"], data["weights"]
        )
    (gradient,) = torch.autograd.grad(out.loss * scale, [weight])
    truth = plain({**tensors, "bias": torch.zeros(300)}, data, {}, {}, torch.float64, off_policy=False)[3]["weight"]
    assert gradient.dtype == torch.float32
    assert distance(gradient, truth * scale) <= 5e-3 * truth.norm().item() * scale


@pytest.mark.parametrize("rows", [512, 16], ids=["one tile", "several"])
@pytest.mark.parametrize("scale", [1.0, 2.0**-6, 2.0**-12])
def test_float16_stays_finite_where_plain_float16_does(scale, rows, monkeypatch):
    """Off policy a ratio may be 665 times what it is on policy, on a hidden state of 200: with a unit that doesn't know
    it the gradient of the weight overflows at every loss scale. On a device that multiplies float16 itself."""
    monkeypatch.setitem(products.MAX_TILE_ROWS, "cpu", rows)
    torch.manual_seed(3)
    hidden = torch.randn(32, 64)
    hidden[:, 5] *= 80
    hidden[3, 5] = 200.0
    weight = torch.randn(200, 64) * 0.03
    weight[:, 5] *= 0.05
    hidden, weight, targets = hidden.half(), weight.half(), torch.randint(0, 200, (32,))
    advantages, weights = torch.ones(32), torch.full((32,), 1 / 32)
    advantages[3] = -1.0

    def logprobs(h, w):
        return (h @ w.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]

    old = logprobs(hidden.float(), weight.float())
    old[3] -= 6.5

    def gradient(dtype, logprob_function):
        w = weight.to(dtype, copy=True).requires_grad_()
        ratio = (logprob_function(hidden.to(dtype), w).to(torch.promote_types(dtype, torch.float32)) - old).exp()
        loss = (weights * -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)).sum()
        return torch.autograd.grad(loss * scale, [w])[0]

    truth = gradient(torch.float64, logprobs)
    plain_half = gradient(torch.float16, lambda h, w: logprobs(h, w).float())
    assert plain_half.isfinite().all()
    w = weight.clone().requires_grad_()
    with assume_native_half(True):
        out = linear_grpo_loss(hidden, w, targets, torch.arange(32), advantages, weights, old_logprobs_N=old)
        (found,) = torch.autograd.grad(out.loss * scale, [w])
        of_logprobs = gradient(torch.float16, lambda h, w: linear_logprob(h, w, targets))
    for ours_half in (found, of_logprobs):
        assert ours_half.dtype == torch.float16
        assert_no_worse(ours_half, plain_half, truth, EPS[torch.float16], "weight", floor=1e-6)


def test_a_cpu_multiplies_float16_in_float32(monkeypatch):
    """It multiplies bfloat16 itself only if it has the instructions and ``ONEDNN_MAX_CPU_ISA`` allows them."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert not native_half(torch.float16, cpu)
    assert native_half(torch.float16, gpu) and native_half(torch.bfloat16, gpu)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for has in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has: has)
        for limit, allows in (("", True), ("AVX2", False), ("AVX512_CORE", False), ("AVX512_CORE_BF16", True),
                              ("avx512_core_amx", True), ("ALL", True)):  # fmt: skip
            monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
            assert native_half(torch.bfloat16, cpu) == (has and allows)
    with assume_native_half(True):
        assert native_half(torch.float16, cpu)


def test_autocast_is_linears():
    tensors, data = example(n=32, h=16, v=50, dtype=torch.float32, scale=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logprobs = linear_logprob(tensors["hidden"], tensors["weight"], data["targets"])
        logits = torch.nn.functional.linear(tensors["hidden"], tensors["weight"])
    assert logits.dtype == torch.bfloat16 and logprobs.dtype == torch.float32
    if not products.native_half(torch.bfloat16, torch.device("cpu")):  # products are made in float32 then
        logits = torch.nn.functional.linear(tensors["hidden"], tensors["weight"])
    expected = logits.float().log_softmax(-1).gather(1, data["targets"][:, None])[:, 0]
    torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)


def test_no_grad_and_frozen_everything():
    tensors, data = example(dtype=torch.float32)
    with torch.no_grad():
        out = ours(tensors, data, {}, {})
        assert not out.loss.requires_grad
    frozen = {name: tensor.detach() for name, tensor in tensors.items()}
    assert not ours(frozen, data, {}, {}).loss.requires_grad
    assert not linear_logprob(frozen["hidden"], frozen["weight"], data["targets"]).requires_grad


def test_backward_is_scaled_and_can_be_repeated_with_retain_graph():
    tensors, data = example(dtype=torch.float32)
    out = ours(tensors, data, {}, {})
    torch.autograd.grad(out.loss, tensors["hidden"], retain_graph=True)
    (3 * out.loss).backward()
    expected = torch.autograd.grad(ours(tensors, data, {}, {}).loss, tensors["hidden"])[0] * 3
    torch.testing.assert_close(tensors["hidden"].grad, expected)
    with pytest.raises(RuntimeError, match="was called before, without retain_graph"):
        out.loss.backward()


def test_tied_embeddings_get_both_gradients():
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(11, 4).double()
    ids, targets = torch.tensor([1, 2, 3]), torch.tensor([2, 3, 10])
    loss = linear_grpo_loss(
        embedding(ids), embedding.weight, targets, torch.tensor([0, 0, 1]), torch.tensor([1.0, -1.0]), torch.ones(2)
    ).loss
    logprobs, entropies = head_logprobs(embedding(ids), embedding.weight, targets)
    expected = grpo_loss(
        logprobs, entropies, torch.tensor([0, 0, 1]), torch.tensor([1.0, -1.0]).double(), torch.ones(2).double()
    )
    torch.testing.assert_close(
        torch.autograd.grad(loss, embedding.weight)[0], torch.autograd.grad(expected, embedding.weight)[0]
    )


def test_inside_a_compiled_backbone():
    torch.manual_seed(0)
    body = torch.nn.Linear(6, 6)
    weight = torch.randn(13, 6)
    targets = torch.randint(13, (9,))

    @torch.compile(backend="eager")
    def step(x):
        return linear_logprob(torch.tanh(body(x)), weight, targets).sum()

    x = torch.randn(9, 6)
    got = torch.autograd.grad(step(x), body.weight)[0]
    logprobs, _ = head_logprobs(torch.tanh(body(x)), weight, targets)
    torch.testing.assert_close(got, torch.autograd.grad(logprobs.sum(), body.weight)[0])


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
        truth, _ = head_logprobs(hidden.double(), weight.double(), targets, softcap=30.0, temperature=0.01)
        same, _ = head_logprobs(hidden, weight, targets, softcap=30.0, temperature=0.01)
        with use_backend("triton"):
            found = linear_logprob(hidden, weight, targets, softcap=30.0, temperature=0.01)
        assert_no_worse(found, same, truth, EPS[torch.float32], "logprobs", slack=1.5)

    @pytest.mark.parametrize("options", OFF_POLICY.values(), ids=OFF_POLICY)
    @pytest.mark.parametrize("off_policy", [True, False])
    @pytest.mark.parametrize("biased", [True, False])
    @pytest.mark.parametrize("softcap", [None, 2.0])
    @pytest.mark.parametrize("rewards", [True, False])
    def test_every_flag(self, options, off_policy, biased, softcap, rewards):
        tensors, data = example(n=12, v=50, dtype=torch.float32)
        if not biased:
            del tensors["bias"]
        given = {name: x for name, x in per_token(data, options, off_policy=off_policy, scaled=biased).items()}
        if rewards:
            table = torch.tensor([[1.0, 0.0, 0.25, math.nan]]).expand(4, 4)
            advantages, extra = None, {"rewards": (table, torch.arange(4)), "normalization": ("std", {})}
        else:
            advantages, extra = data["advantages"], {}
        results = []
        for backend in ("torch", "triton"):
            with use_backend(backend):
                out = linear_grpo_loss(
                    tensors["hidden"], tensors["weight"], data["targets"], data["sequence"], advantages,
                    data["weights"], bias=tensors.get("bias"), softcap=softcap, temperature=0.9, **given, **options,
                    **extra,
                )  # fmt: skip
                gradients = torch.autograd.grad(out.loss, list(tensors.values()))
                details = [out.loss, out.logprobs, out.entropies, out.ratio, out.clipped, out.advantages]
                results.append([*details, *([] if out.kl is None else [out.kl]), *gradients])
        for fused, expected in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(fused, expected, rtol=2e-5, atol=2e-6)

    @pytest.mark.parametrize("method", ["none", "mean", "loo", "std", "power"])
    @pytest.mark.parametrize("group", [2, 7, 64])
    def test_every_normalization_in_the_launch(self, method, group):
        options = {"alpha": 0.5} if method == "power" else {}
        tensors, data = example(n=9, v=20, b=group, dtype=torch.float32)
        rewards = torch.randint(3, (group, group)).float()
        rewards[0] = 0.1  # all equal: exactly 0 where the group's own mean is subtracted
        rewards[:, -1] = math.nan
        out = []
        for backend in ("torch", "triton"):
            with use_backend(backend):
                out.append(
                    linear_grpo_loss(
                        tensors["hidden"], tensors["weight"], data["targets"], data["sequence"], None,
                        data["weights"], rewards=(rewards, torch.arange(group)), normalization=(method, options),
                    )
                )  # fmt: skip
        torch.testing.assert_close(out[1].advantages, out[0].advantages.float(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(out[1].loss, out[0].loss.float(), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("v", [2, 16, 17, 5000])
    @pytest.mark.parametrize("softcap", [None, 2.0])
    def test_logprob(self, v, softcap):
        tensors, data = example(n=7, v=v, dtype=torch.float32)
        cotangents = torch.randn(2, 7)
        results = []
        for backend in ("torch", "triton"):
            with use_backend(backend):
                logprobs, entropies = linear_logprob(
                    tensors["hidden"], tensors["weight"], data["targets"], bias=tensors["bias"], softcap=softcap,
                    entropy=True,
                )  # fmt: skip
                total = (logprobs * cotangents[0] + entropies * cotangents[1]).sum()
                results.append([logprobs, entropies, *torch.autograd.grad(total, list(tensors.values()))])
        for fused, expected in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(fused, expected, rtol=2e-5, atol=5e-6)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_gradient_in_the_logits_own_bytes(self, dtype):
        """As on a GPU: float32 logits become half-precision probabilities in the first half of each row."""
        from grpo_kernels.head.rows.plain import Transform, logit_gradient_, softmax_rows_
        from grpo_kernels.head.rows.triton_rows import logit_gradient_ as fused_gradient
        from grpo_kernels.head.rows.triton_rows import softmax_rows_ as fused_softmax

        torch.manual_seed(0)
        v = 9000  # three blocks
        buffer = torch.full((3, 9008), math.nan)
        logits = torch.randn(3, v)
        buffer[:, :v] = logits
        targets, upstream = torch.tensor([0, 4500, v - 1]), torch.tensor([1.0, -2.0, 1e-9])
        statistics = fused_softmax(buffer[:, :v], targets, Transform())
        gradient, factor = fused_gradient(buffer[:, :v], targets, statistics, Transform(), upstream, None, dtype=dtype)
        expected_tile = logits.clone()
        expected_statistics = softmax_rows_(expected_tile, targets, Transform())
        expected, expected_factor = logit_gradient_(
            expected_tile, targets, expected_statistics, Transform(), upstream, None
        )
        assert gradient.dtype == dtype and gradient.data_ptr() == buffer.data_ptr()
        torch.testing.assert_close(
            gradient, expected.to(dtype), rtol=2e-2 if dtype == torch.bfloat16 else 2e-3, atol=1e-6
        )
        torch.testing.assert_close(factor, expected_factor)


def call(**changes):
    arguments = {
        "hidden_NH": torch.zeros(4, 3),
        "weight_VH": torch.zeros(5, 3),
        "targets_N": torch.zeros(4, dtype=torch.long),
        "sequence_N": torch.zeros(4, dtype=torch.long),
        "advantages": torch.zeros(2),
        "weights_B": torch.zeros(2),
    }
    return linear_grpo_loss(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_NH": torch.zeros(4, 2)}, r"hidden \(4, 2\) and weight \(5, 3\) don't fit"),
        (
            {"hidden_NH": torch.zeros(1, 4, 3), "targets_N": torch.zeros(1, 4).long()},
            r"hidden_NH has shape \(1, 4, 3\)",
        ),
        ({"weight_VH": torch.zeros(0, 3)}, "the vocabulary is empty"),
        ({"weight_VH": torch.zeros(5, 3, dtype=torch.int32)}, "weight has dtype torch.int32"),
        ({"hidden_NH": torch.zeros(4, 3, device="meta")}, "they must be on one device"),
        ({"targets_N": torch.tensor([0, 5, 0, 0])}, r"targets hold 5: expected values in \[0, 5\)"),
        ({"targets_N": torch.tensor([0, -1, 0, 0])}, "targets hold -1"),
        ({"targets_N": torch.zeros(3, dtype=torch.long)}, r"targets have shape \(3,\)"),
        ({"targets_N": torch.zeros(4)}, "targets have dtype torch.float32"),
        ({"sequence_N": torch.tensor([0, 1, 2, 0])}, r"sequence_N holds 2: expected values in \[0, 2\)"),
        ({"sequence_N": torch.zeros(3, dtype=torch.long)}, "sequence_N must be an integer tensor"),
        ({"weights_B": torch.zeros(2, dtype=torch.long)}, "weights_B must be a floating-point tensor"),
        ({"advantages": torch.zeros(3)}, r"advantages are \(3,\) of torch.float32: expected \(2,\) or \(4,\)"),
        ({"advantages": None}, "give one of advantages, advantages_N and rewards, got none"),
        ({"advantages_N": torch.zeros(4)}, "got advantages, advantages_N"),
        ({"advantages": None, "advantages_N": torch.zeros(3)}, r"advantages_N is \(3,\)"),
        ({"hidden_NH": [[1.0]]}, "hidden must be a tensor, got list"),
        ({"hidden_NH": torch.zeros(4, 0), "weight_VH": torch.zeros(5, 0)}, "its last dimension must be at least 1"),
        ({"weight_VH": torch.zeros(5, 3).to_sparse()}, "dense floats"),
        ({"bias": [0.0] * 5}, "bias must be a tensor, got list"),
        ({"low_rank": (1, 2)}, "low_rank must be a pair of tensors"),
        ({"loss_type": ["grpo"]}, r"loss_type=\['grpo'\]"),
        ({"sequence_N": torch.zeros(4, dtype=torch.bool)}, "sequence_N must be an integer tensor"),
        ({"entropy_coef": True}, "entropy_coef=True"),
        ({"rewards": (torch.zeros(2, 2), torch.zeros(2, dtype=torch.long))}, "got advantages, rewards"),
        ({"advantages": None, "rewards": (torch.zeros(3, 2), torch.zeros(3).long())}, r"expected \(2, G\)"),
        (
            {"advantages": None, "rewards": (torch.zeros(2, 2), torch.tensor([0, 2]))},
            r"rewards\[1\] holds 2: expected values",
        ),
        (
            {"advantages": None, "rewards": (torch.tensor([[1.0, math.inf]] * 2), torch.tensor([0, 1]))},
            r"rewards\[0\]\[0, 1\] is inf",
        ),
        (
            {"advantages": None, "rewards": (torch.zeros(2, 2), torch.tensor([0, 1])), "normalization": "std"},
            r"normalization='std' must be a pair: \(method, options\)",
        ),
        (
            {
                "advantages": None,
                "rewards": (torch.zeros(2, 2), torch.tensor([0, 1])),
                "normalization": ("std", {"method": 1}),
            },
            "the method comes first, options after it",
        ),
        ({"normalization": ("std", {})}, "goes with rewards"),
        (
            {"advantages": None, "rewards": (torch.zeros(2, 2), torch.tensor([0, 1])), "normalization": ("global", {})},
            "'global' needs more than its own group",
        ),
        ({"loss_type": "gspo"}, "loss_type='gspo': choose from grpo, bnpo, dr_grpo, dapo, luspo, cispo, sapo"),
        ({"temperature": 0.0}, "temperature=0.0 must be a finite number above 0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"softcap": -1.0}, "softcap=-1.0"),
        ({"epsilon": -0.1}, "epsilon=-0.1 must be a finite number of at least 0"),
        ({"epsilon": 1.5}, r"epsilon=1.5 must be in \[0, 1\]"),
        ({"epsilon_high": math.inf}, "epsilon_high=inf"),
        ({"delta": 0.0}, "delta=0.0"),
        ({"beta": 0.1}, "beta=0.1 needs ref_logprobs_N"),
        ({"beta": -0.1}, "beta=-0.1"),
        ({"sapo_temperatures": (1.0,)}, "must be two numbers"),
        ({"sapo_temperatures": (1.0, 0.0)}, r"sapo_temperatures\[1\]=0.0"),
        ({"entropy_coef": math.nan}, "entropy_coef=nan"),
        ({"old_logprobs_N": torch.zeros(3)}, r"old_logprobs_N is \(3,\) of torch.float32: expected \(4,\)"),
        ({"bias": torch.zeros(4)}, r"bias has shape \(4,\): expected \(5,\)"),
        ({"low_rank": (torch.zeros(4, 2), torch.zeros(5, 3))}, "low_rank has shapes"),
    ],
)
def test_bad_input_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_asking_for_triton_where_it_cannot_run(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with use_backend("triton"), pytest.raises(ValueError, match="asked for on device cpu"):
        call(weights_B=torch.ones(2), advantages=torch.ones(2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("v", [49152, 50257])
@pytest.mark.parametrize("options", OFF_POLICY.values(), ids=OFF_POLICY)
def test_on_a_gpu(dtype, v, options):
    tensors, data = example(n=200, h=128, v=v, dtype=dtype, scale=0.2)
    tensors = {name: tensor.detach().cuda().requires_grad_() for name, tensor in tensors.items()}
    data = {name: tensor.cuda() for name, tensor in data.items()}
    same = plain(tensors, data, options, {}, dtype)
    truth = plain(tensors, data, options, {}, torch.float64)
    out = ours(tensors, data, options, {})
    for name, got in zip(tensors, torch.autograd.grad(out.loss, list(tensors.values())), strict=True):
        assert_no_worse(got, same[3][name], truth[3][name], EPS[dtype], name)
