"""Sums of the head stay in float32 under autocast, and what it can't differentiate it refuses."""

import pytest
import torch
from head_example import (
    EPS,
    assert_gradients_no_worse,
    assert_no_worse,
    distance,
    example,
    gradients_of,
    our_gradients,
    ours,
    plain,
    token_arguments,
)

from grpo_kernels import linear_grpo_loss, linear_logprob
from grpo_kernels.backend import assume_native_half, native_half
from grpo_kernels.head import products, tiles


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_autocast_changes_the_products_alone(softcap, inside):
    """With bfloat16 inputs autocast has nothing left to cast: every number is the one without it."""
    tensors, data = example(h=32, v=257, dtype=torch.bfloat16, scale=0.4)
    head = {"bias": tensors["bias"], "softcap": softcap, "entropy": True}

    def run(autocast):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            scores = linear_logprob(*token_arguments(tensors, data)[:3], **head)
            out = ours(tensors, data, {"entropy_coef": 0.1}, {"softcap": softcap}, off_policy=False)
            total = scores[0].sum() + scores[1].square().sum() + out.loss
            gradients = gradients_of(total, tensors) if inside else {}
        return [*scores, *vars(out).values(), gradients or gradients_of(total, tensors)]

    torch.testing.assert_close(run(True), run(False), rtol=0, atol=0)  # their dtypes too


def test_second_derivatives_are_refused():
    tensors, data = example(dtype=torch.float32)
    for result in (linear_logprob(*token_arguments(tensors, data)[:3]).sum(), ours(tensors, data).loss):
        with pytest.raises(RuntimeError, match="no second derivatives: create_graph=True"):
            torch.autograd.grad(result, tensors["hidden"], create_graph=True)


@pytest.mark.parametrize("n_vocabulary", [1, 2, 257])
def test_a_softcap_in_bfloat16_has_consistent_shares(n_vocabulary):
    """tanh is kept in bfloat16. Of one token the entropy has no gradient at all; of more, the error is that of rounding
    the tanh, not that of shares which don't add up to 1."""
    tensors, data = example(h=32, v=n_vocabulary, dtype=torch.bfloat16, scale=0.4)

    def gradient(dtype, entropies_alone):
        hidden = tensors["hidden"].detach().to(dtype).requires_grad_()
        arguments = (hidden, tensors["weight"].detach().to(dtype), data["targets"])
        logprobs_N, entropies_N = linear_logprob(*arguments, softcap=5.0, entropy=True)
        (entropies_N.sum() if entropies_alone else logprobs_N.sum() + entropies_N.sum()).backward()
        return hidden.grad.double()

    if n_vocabulary == 1:
        assert gradient(torch.bfloat16, True).abs().max() == 0
    for alone in (True, False):
        truth, found = gradient(torch.float64, alone), gradient(torch.bfloat16, alone)
        assert (found - truth).norm() <= 0.02 * truth.norm() + 1e-6


@pytest.mark.parametrize("native", [True, False])
def test_half_precision_on_a_cpu_with_and_without_instructions_for_it(native, monkeypatch):
    monkeypatch.setattr(products, "native_half", lambda dtype, device: native)
    monkeypatch.setattr(products, "VOCABULARY_BLOCK", 64)
    tensors, data = example(n=64, h=32, v=300, dtype=torch.bfloat16, scale=0.5)
    same, truth = plain(tensors, data, dtype=torch.bfloat16), plain(tensors, data)
    for rows in (512, 16):
        monkeypatch.setitem(tiles.MAX_TILE_ROWS, "cpu", rows)
        assert_gradients_no_worse(our_gradients(tensors, data), same, truth, EPS[torch.bfloat16])


@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_float16_with_a_gradient_scaler(scale):
    """Coefficients of 1e-9 survive: multiplied as shares of the largest, and the scaler's factor comes last."""
    tensors, data = example(n=64, h=32, v=300, dtype=torch.float16, scale=0.3)
    data["advantages"] = data["advantages"] * 1e-5
    del tensors["bias"]
    truth = plain(tensors, data, off_policy=False).gradients["weight"]
    tensors["weight"] = tensors["weight"].detach().float().requires_grad_()  # as under autocast: float32 parameters
    with torch.autocast("cpu", dtype=torch.float16):
        out = linear_grpo_loss(*token_arguments(tensors, data), data["advantages"], data["weights"])
    (gradient,) = torch.autograd.grad(out.loss * scale, [tensors["weight"]])
    assert gradient.dtype == torch.float32
    assert distance(gradient, truth * scale) <= 5e-3 * truth.norm().item() * scale


@pytest.mark.parametrize("rows", [512, 16], ids=["one tile", "several"])
@pytest.mark.parametrize("large", [3, 30], ids=["in the first tile", "in the last"])
@pytest.mark.parametrize("scale", [1.0, 2.0**-6, 2.0**-12])
def test_float16_stays_finite_where_plain_float16_does(scale, large, rows, monkeypatch):
    """Off policy a ratio may be 665 times what it is on policy, on a hidden state of 200: with a unit that doesn't know
    it the gradient of the weight overflows at every loss scale. On a device that multiplies float16 itself."""
    monkeypatch.setitem(tiles.MAX_TILE_ROWS, "cpu", rows)
    torch.manual_seed(3)
    hidden = torch.randn(32, 64)
    hidden[:, 5] *= 80
    hidden[large, 5] = 200.0
    weight = torch.randn(200, 64) * 0.03
    weight[:, 5] *= 0.05
    hidden, weight, targets = hidden.half(), weight.half(), torch.randint(0, 200, (32,))
    advantages, weights = torch.ones(32), torch.full((32,), 1 / 32)
    advantages[large] = -1.0

    def logprobs(h, w):
        return (h @ w.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]

    old = logprobs(hidden.float(), weight.float())
    old[large] -= 6.5

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
    limits = dict.fromkeys(("AVX2", "AVX512_CORE"), False)
    limits |= dict.fromkeys(("", "AVX512_CORE_BF16", "avx512_core_amx", "ALL"), True)
    for has in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has: has)
        for limit, allows in limits.items():
            monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
            assert native_half(torch.bfloat16, cpu) == (has and allows)
    with assume_native_half(True):
        assert native_half(torch.float16, cpu)


def test_autocast_multiplies_as_linear_does():
    tensors, data = example(n=32, h=16, v=50, dtype=torch.float32, scale=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logprobs = linear_logprob(tensors["hidden"], tensors["weight"], data["targets"])
        logits = torch.nn.functional.linear(tensors["hidden"], tensors["weight"])
    assert logits.dtype == torch.bfloat16 and logprobs.dtype == torch.float32
    if not products.native_half(torch.bfloat16, torch.device("cpu")):  # products are made in float32 then
        logits = torch.nn.functional.linear(tensors["hidden"], tensors["weight"])
    expected = logits.float().log_softmax(-1).gather(1, data["targets"][:, None])[:, 0]
    torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)
