"""linear_logprob and linear_grpo_loss against float64 truth, plain torch, and numbers worked by hand."""

import itertools
import math

import pytest
import torch
from head_example import (
    EPS,
    OFF_POLICY,
    assert_gradients_no_worse,
    assert_no_worse,
    double_logprobs,
    example,
    gradients_of,
    our_gradients,
    ours,
    plain,
    token_arguments,
)
from hypothesis import example as hypothesis_example
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import BACKENDS, needs_gpu
from reference import head_logprobs

from grpo_kernels import linear_grpo_loss, linear_logprob, use_backend
from grpo_kernels.head import tiles

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
    expected = plain(tensors, data, options, head, off_policy=off_policy, scaled=True)
    torch.testing.assert_close([out.loss, out.logprobs, out.entropies], list(expected[:3]))
    torch.testing.assert_close(gradients_of(out.loss, tensors), expected.gradients, rtol=1e-9, atol=1e-13)
    if off_policy and not head and options in (OFF_POLICY["clip"], OFF_POLICY["cispo"]):
        assert 0 < out.clipped.sum() < len(out.clipped)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [OFF_POLICY["clip"], OFF_POLICY["all"]], ids=["clip", "all"])
@pytest.mark.parametrize("off_policy", [True, False])
@pytest.mark.parametrize("head", [HEADS[0], HEADS[4]], ids=str)
def test_no_worse_than_plain_torch(dtype, options, off_policy, head):
    tensors, data = example(n=64, h=32, v=300, dtype=dtype, scale=0.5)
    same = plain(tensors, data, options, head, dtype=dtype, off_policy=off_policy)
    truth = plain(tensors, data, options, head, off_policy=off_policy)
    out = ours(tensors, data, options, head, off_policy=off_policy)
    assert_no_worse(out.logprobs, same.logprobs, truth.logprobs, EPS[torch.float32], "logprobs")
    assert_no_worse(out.entropies, same.entropies, truth.entropies, EPS[torch.float32], "entropies")
    gradients = gradients_of(out.loss, tensors)
    assert {gradient.dtype for gradient in gradients.values()} == {dtype}
    assert_gradients_no_worse(gradients, same, truth, EPS[dtype])


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
@hypothesis_example(  # equal logits: the gradient of the entropy is 0, and rounded probabilities don't add up to 1
    n=1, h=1, v=3, b=1, seed=0, dtype=torch.bfloat16, option="entropy", scale=0.0, magnitude=0.0, strided=False,
    masked=False, off_policy=False,
)  # fmt: skip
def test_shapes_and_values(n, h, v, b, seed, dtype, option, scale, magnitude, strided, masked, off_policy):
    options = OFF_POLICY[option]
    tensors, data = example(n, h, v, b, dtype=dtype, seed=seed, scale=scale)
    data["advantages"] = data["advantages"] * magnitude
    if masked and v > 3:
        mask_a_column(tensors, data)
    if not masked:
        del tensors["bias"]
    if strided:
        wide = torch.zeros(h, max(n, 1) * 2, dtype=dtype)
        wide[:, ::2][:, :n] = tensors["hidden"].detach().T
        tensors["hidden"] = wide[:, ::2][:, :n].T.requires_grad_()
    off_policy = off_policy and dtype == torch.float32  # a rounded ratio is clipped elsewhere
    out = ours(tensors, data, options, off_policy=off_policy)
    gradients = gradients_of(out.loss, {name: tensors[name] for name in ("hidden", "weight")})
    if n == 0:
        assert out.loss == 0 and all((g == 0).all() for g in gradients.values())
        return
    same = plain(tensors, data, options, dtype=dtype, off_policy=off_policy)
    truth = plain(tensors, data, options, off_policy=off_policy)
    logits = 1 + (tensors["hidden"].detach().double() @ tensors["weight"].detach().double().T).abs().max().item()
    rounding = 4 * EPS[dtype] * logits  # of logits of this size, in plain torch too
    for name in ("logprobs", "entropies"):
        values = (getattr(one, name) for one in (out, same, truth))
        assert_no_worse(*values, EPS[torch.float32], name, floor=math.sqrt(n) * rounding)
    if off_policy and distance_to_clipping(truth, data, options) < rounding:
        return
    for name, got in gradients.items():
        expected = truth.gradients[name]
        # float16 can't hold what is below 6e-8; nothing else is as small as 1e-20 but p log p far out
        tiny = 6e-8 * math.sqrt(got.numel()) if dtype == torch.float16 else 1e-20
        # a coefficient's relative error is its log-prob's absolute one
        floor = tiny + rounding * expected.norm().item()
        if torch.isfinite(same.gradients[name]).all():  # plain torch may overflow, or have 0 * inf
            assert_no_worse(got, same.gradients[name], expected, EPS[dtype], name, slack=3, floor=floor)


def mask_a_column(tensors, data):
    """Gives column 1 a bias of -inf, and its tokens another target."""
    before = double_logprobs(tensors, data["targets"])
    with torch.no_grad():
        tensors["bias"][1] = -math.inf
    data["targets"][data["targets"] == 1] = 2
    # as near to the new targets' log-probs as to the old ones': where k3 is e^40 float64 is no truth
    moved = double_logprobs(tensors, data["targets"]) - before
    data["old"], data["ref"] = data["old"] + moved, data["ref"] + moved


def distance_to_clipping(truth, data, options) -> float:
    """How near a true ratio is to a bound: a rounded one may be on its other side."""
    ratio = (truth.logprobs - data["old"]).exp().detach()
    bounds = [1 - options.get("epsilon", 0.2), 1 + options.get("epsilon_high", 0.2), options.get("epsilon_high", 9)]
    return min((ratio - bound).abs().min().item() for bound in [*bounds, options.get("delta", 9)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("magnitude", [1e4, -1e4])
def test_large_logits_and_targets_at_both_ends(magnitude, backend):
    hidden, targets = torch.tensor([[1.0], [1.0], [-1.0]], requires_grad=True), torch.tensor([0, 4, 0])
    weight = torch.tensor([[magnitude], [0], [0], [0], [magnitude / 2]])
    with use_backend(backend):
        out = linear_grpo_loss(hidden, weight, targets, torch.tensor([0, 0, 1]), torch.ones(2), torch.ones(2))
    truth, entropies = head_logprobs(hidden.double(), weight.double(), targets)
    torch.testing.assert_close([out.logprobs.double(), out.entropies.double()], [truth, entropies])
    torch.testing.assert_close(torch.autograd.grad(out.loss, hidden), torch.autograd.grad(-truth.sum(), hidden))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_offset_of_all_logits_costs_no_digits(backend):
    """Logits of 10,000 that differ by less than 1: probabilities come from the differences."""
    torch.manual_seed(0)
    hidden = torch.cat([torch.full((6, 1), 1e4), torch.randn(6, 4)], dim=1).requires_grad_()
    weight = torch.cat([torch.ones(40, 1), 0.1 * torch.randn(40, 4)], dim=1)
    logits = hidden @ weight.T  # as rounded by the product
    truth = logits.double().log_softmax(-1)[:, 0]
    zeros = torch.zeros(6).long()
    with use_backend(backend):
        out = linear_grpo_loss(hidden, weight, zeros, zeros, torch.ones(1), torch.ones(1))
    torch.testing.assert_close(out.logprobs.double(), truth, rtol=1e-6, atol=1e-6)
    expected = torch.autograd.grad(-truth.sum(), hidden)[0]
    torch.testing.assert_close(torch.autograd.grad(out.loss, hidden)[0][:, 1:], expected[:, 1:], rtol=1e-5, atol=1e-6)


def test_worked_by_hand():
    """Two tokens of two prompts, three words. Logits ln 2, 0, 0 and 0, 0, 0: probabilities 1/2 1/4 1/4 and thirds."""
    hidden = torch.tensor([[1.0], [0.0]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[math.log(2)], [0.0], [0.0]], dtype=torch.float64, requires_grad=True)
    advantages, weights = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 0.25])
    out = linear_grpo_loss(hidden, weight, torch.tensor([0, 2]), torch.tensor([0, 1]), advantages, weights)
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
    hidden, weight = torch.zeros(4, 1, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    arguments = (hidden, weight, torch.zeros(4).long(), torch.arange(4), advantages, torch.ones(4))
    old = torch.tensor([0.25, 0.25, 1.0, 1.0], dtype=torch.float64).log()  # log-probs are ln 1/2
    out = linear_grpo_loss(*arguments, old_logprobs_N=old)
    assert out.ratio.tolist() == pytest.approx([2, 2, 0.5, 0.5])
    assert out.clipped.tolist() == [True, False, False, True]
    assert out.loss.item() == pytest.approx(-1.2 + 2 - 0.5 + 0.8)
    capped = linear_grpo_loss(*arguments, old_logprobs_N=old, delta=1.5)
    assert capped.loss.item() == pytest.approx(-1.2 + 1.5 - 0.5 + 0.8)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("entropy", [False, True])
def test_gradcheck(softcap, entropy):
    tensors, data = example(n=5, h=3, v=7)
    factors = [torch.randn(count, 2, dtype=torch.float64, requires_grad=True) for count in (5, 7)]

    def logprob(hidden, weight, bias, *low_rank):
        options = {"softcap": softcap, "temperature": 0.8, "entropy": entropy}
        return linear_logprob(hidden, weight, data["targets"], bias=bias, low_rank=low_rank, **options)

    def loss(hidden, weight, bias, *low_rank):
        given = {"hidden": hidden, "weight": weight, "bias": bias}
        options = {"beta": 0.1, "entropy_coef": 0.2 if entropy else 0.0}
        return ours(given, data, options, {"low_rank": low_rank, "softcap": softcap}).loss

    for function in (logprob, loss):
        assert torch.autograd.gradcheck(function, (*tensors.values(), *factors))


@pytest.mark.parametrize("trained", [c for r in (1, 2, 3) for c in itertools.combinations(range(3), r)])
@pytest.mark.parametrize("upstream", [(0,), (1,), (0, 1)], ids=["logprob", "entropy", "both"])
def test_logprob_gradients_for_any_upstream(trained, upstream):
    tensors, data = example(b=3)
    names = [list(tensors)[i] for i in trained]
    tensors = {name: tensor.detach().requires_grad_(name in names) for name, tensor in tensors.items()}
    cotangents = torch.randn(2, 24, dtype=torch.float64)
    cotangents[:, ::3] = 0

    def gradients(outputs):
        total = sum((outputs[i] * cotangents[i]).sum() for i in upstream)
        return torch.autograd.grad(total, [tensors[name] for name in names])

    arguments = (tensors["hidden"], tensors["weight"], data["targets"])
    got = gradients(linear_logprob(*arguments, bias=tensors["bias"], entropy=True))
    torch.testing.assert_close(got, gradients(head_logprobs(*arguments, bias=tensors["bias"])))


def test_many_tiles_and_both_kinds_of_rows(monkeypatch):
    """Tiles of 16 rows, with the dead rows spread: the same as one tile."""
    tensors, data = example(n=100, b=7, dtype=torch.float32)
    whole = ours(tensors, data, OFF_POLICY["all"])
    monkeypatch.setitem(tiles.MAX_TILE_ROWS, "cpu", 16)
    for options in ({}, OFF_POLICY["all"]):
        tiled = ours(tensors, data, options)
        got = gradients_of(tiled.loss, tensors)
        truth = {name: gradient.float() for name, gradient in plain(tensors, data, options).gradients.items()}
        torch.testing.assert_close(got, truth, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got, gradients_of(whole.loss, tensors), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(tiled.logprobs, whole.logprobs)


def test_advantages_of_tokens_where_there_are_as_many_sequences():
    tensors, data = example(n=4, b=4)
    data["sequence"] = torch.tensor([0, 0, 1, 1])
    arguments, advantages = token_arguments(tensors, data), torch.tensor([1.0, -1.0, 2.0, 3.0])
    per_token = linear_grpo_loss(*arguments, None, torch.ones(4), advantages_N=advantages)
    assert per_token.loss.item() == pytest.approx(-5.0)
    assert linear_grpo_loss(*arguments, advantages, torch.ones(4)).loss.item() == pytest.approx(0.0)


def test_dead_tokens_get_exactly_no_gradient():
    tensors, data = example(dtype=torch.float32)
    out = ours(tensors, data)
    gradient = gradients_of(out.loss, tensors)["hidden"]
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
    same, truth = (plain(tensors, data, options, dtype=one) for one in (dtype, torch.float64))
    assert_gradients_no_worse(our_gradients(tensors, data, options), same, truth, EPS[dtype])
