"""Inputs with gaps, expanded, or beginning in the middle of their memory: the same results, on both backends."""

import pytest
import torch

from grpo_kernels import linear_grpo_loss, linear_logprob, normalize_rewards, use_backend
from grpo_kernels.launch import launch
from grpo_kernels.normalize.triton_groups import Groups

N, H, V, B, G = 12, 16, 37, 4, 4


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


def inputs():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    sequence = torch.arange(N) // 3
    return {
        "hidden_NH": normal(N, H), "weight_VH": normal(V, H) * 0.3, "bias": normal(V),
        "targets_N": torch.randint(V, (N,), generator=generator), "sequence_N": sequence,
        "weights_B": torch.rand(B, generator=generator), "old_logprobs_N": normal(N) * 0.1 - 3,
        "ref_logprobs_N": normal(N) * 0.1 - 3, "policy_scale_N": torch.rand(N, generator=generator) + 0.5,
        "rewards": normal(B, G), "position": torch.arange(B) % G, "advantages": normal(B), "advantages_N": normal(N),
    }  # fmt: skip


def grpo(given, signal):
    names = ("targets_N", "sequence_N", "bias", "weights_B", "old_logprobs_N", "ref_logprobs_N", "policy_scale_N")
    hidden = given["hidden_NH"].detach().requires_grad_()
    weight = given["weight_VH"].detach().requires_grad_()
    signals = {"rewards": (given["rewards"], given["position"])} if signal == "rewards" else {signal: given[signal]}
    out = linear_grpo_loss(
        hidden, weight, advantages=signals.pop("advantages", None), beta=0.1, entropy_coef=0.01,
        **{name: given[name] for name in names}, **signals,
    )  # fmt: skip
    out.loss.backward()
    return [out.loss, out.logprobs, out.entropies, out.ratio, out.kl, hidden.grad, weight.grad]


def logprob(given, signal):
    hidden = given["hidden_NH"].detach().requires_grad_()
    weight = given["weight_VH"].detach().requires_grad_()
    out = linear_logprob(hidden, weight, given["targets_N"], bias=given["bias"], entropy=True)
    (out[0] @ given["advantages_N"] + out[1].sum()).backward()
    return [*out, hidden.grad, weight.grad]


CALLS = [
    (grpo, "rewards", ("targets_N", "sequence_N", "weights_B", "old_logprobs_N", "ref_logprobs_N", "policy_scale_N",
                       "bias", "hidden_NH", "weight_VH", "rewards", "position")),
    (grpo, "advantages", ("advantages",)),
    (grpo, "advantages_N", ("advantages_N",)),
    (logprob, "", ("targets_N", "bias", "hidden_NH", "weight_VH", "advantages_N")),
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize(
    ("call", "signal", "name"), [(call, signal, name) for call, signal, names in CALLS for name in names]
)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_memory_layout_changes_nothing(backend, call, signal, name, layout):
    given = inputs()
    odd = layout(given[name])
    assert torch.equal(odd, given[name]) and (odd.storage_offset() or not odd.is_contiguous())
    with use_backend(backend):
        for expected, found in zip(call(given, signal), call({**given, name: odd}, signal), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["targets_N", "weights_B", "old_logprobs_N", "ref_logprobs_N", "policy_scale_N", "bias", "position"]
)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_an_expanded_number_is_a_whole_vector(backend, name):
    given = inputs()
    one = given[name][:1]
    with use_backend(backend):
        expected = grpo({**given, name: one.expand(given[name].shape).clone()}, "rewards")
        found = grpo({**given, name: one.expand(given[name].shape)}, "rewards")
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("method", ["std", "median_mad", "rank", "length_weighted", "batch_std", "beta"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_normalisation_of_odd_rewards(backend, method, layout):
    rewards_PG = torch.rand(5, 4, generator=torch.Generator().manual_seed(1))
    context = {"lengths": torch.arange(20).view(5, 4) + 1}
    with use_backend(backend):
        expected = normalize_rewards(rewards_PG, method, context=context)
        odd = {"lengths": layout(context["lengths"])}
        torch.testing.assert_close(normalize_rewards(layout(rewards_PG), method, context=odd), expected)
        row = rewards_PG[:1].expand(5, 4)
        torch.testing.assert_close(
            normalize_rewards(row, method, context=context), normalize_rewards(row.clone(), method, context=context)
        )


def test_tensors_on_two_devices_are_refused():
    with pytest.raises(ValueError, match="a kernel's tensors are on cpu, meta: expected one device"):
        launch(None, (1,), torch.ones(2), Groups(torch.ones(2, device="meta"), 2, 1e-4, None))
