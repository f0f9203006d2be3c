"""linear_logprob and linear_grpo_loss against float64 truth, plain torch, and numbers worked by hand."""

import itertools
import math

import pytest
import torch
from head_example import EPS, OFF_POLICY, assert_no_worse, example, ours, plain
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import BACKENDS, needs_gpu
from reference import head_logprobs

from grpo_kernels import linear_grpo_loss, linear_logprob, use_backend
from grpo_kernels.head import products

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


@torch.no_grad()
def double_logprobs(tensors, targets):
    hidden, weight, bias = (tensors[name].double() for name in ("hidden", "weight", "bias"))
    return head_logprobs(hidden, weight, targets, bias=bias)[0]


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


@pytest.mark.parametrize("backend", BACKENDS)
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


@pytest.mark.parametrize("backend", BACKENDS)
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
        hidden,
        weight,
        torch.zeros(4, dtype=torch.long),
        torch.arange(4),
        torch.tensor([1.0, -1.0, 1.0, -1.0]),
        torch.ones(4),
        old_logprobs_N=old,
    )
    assert out.ratio.tolist() == pytest.approx([2, 2, 0.5, 0.5])
    assert out.clipped.tolist() == [True, False, False, True]
    assert out.loss.item() == pytest.approx(-1.2 + 2 - 0.5 + 0.8)
    capped = linear_grpo_loss(
        hidden,
        weight,
        torch.zeros(4, dtype=torch.long),
        torch.arange(4),
        torch.tensor([1.0, -1.0, 1.0, -1.0]),
        torch.ones(4),
        old_logprobs_N=old,
        delta=1.5,
    )
    assert capped.loss.item() == pytest.approx(-1.2 + 1.5 - 0.5 + 0.8)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("entropy", [False, True])
def test_gradcheck(softcap, entropy):
    tensors, data = example(n=5, h=3, v=7)
    low_rank = [
        torch.randn(5, 2, dtype=torch.float64, requires_grad=True),
        torch.randn(7, 2, dtype=torch.float64, requires_grad=True),
    ]

    def logprob(hidden, weight, bias, inputs, matrix):
        return linear_logprob(
            hidden,
            weight,
            data["targets"],
            bias=bias,
            low_rank=(inputs, matrix),
            softcap=softcap,
            temperature=0.8,
            entropy=entropy,
        )

    def loss(hidden, weight, bias, inputs, matrix):
        return linear_grpo_loss(
            hidden,
            weight,
            data["targets"],
            data["sequence"],
            data["advantages"],
            data["weights"],
            bias=bias,
            low_rank=(inputs, matrix),
            softcap=softcap,
            old_logprobs_N=data["old"],
            ref_logprobs_N=data["ref"],
            beta=0.1,
            entropy_coef=0.2 if entropy else 0.0,
        ).loss

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


def test_advantages_of_tokens_where_there_are_as_many_sequences():
    tensors, data = example(n=4, b=4)
    data["sequence"] = torch.tensor([0, 0, 1, 1])
    arguments = (tensors["hidden"], tensors["weight"], data["targets"], data["sequence"])
    per_token = linear_grpo_loss(*arguments, None, torch.ones(4), advantages_N=torch.tensor([1.0, -1.0, 2.0, 3.0]))
    assert per_token.loss.item() == pytest.approx(-5.0)
    per_sequence = linear_grpo_loss(*arguments, torch.tensor([1.0, -1.0, 2.0, 3.0]), torch.ones(4))
    assert per_sequence.loss.item() == pytest.approx(0.0)


def test_dead_tokens_get_exactly_no_gradient():
    tensors, data = example(dtype=torch.float32)
    out = ours(tensors, data, {}, {})
    (gradient,) = torch.autograd.grad(out.loss, [tensors["hidden"]])
    dead = (data["advantages"][data["sequence"]] == 0) | out.clipped
    assert dead.any() and (gradient[dead] == 0).all() and (gradient[~dead] != 0).any(1).all()


@pytest.mark.gpu
@needs_gpu
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
