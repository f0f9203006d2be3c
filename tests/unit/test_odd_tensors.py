"""Inputs with gaps, expanded, or beginning in the middle of their memory: the same results, on both backends.

The kernels run on guarded memory: none reads or writes outside its tensors.
"""

import pytest
import torch
from guarded_memory import guard
from kernel_inputs import CALLS, LAYOUTS, OF_TOKENS, head_inputs, loss_call

from grpo_kernels import normalize_rewards, use_backend
from grpo_kernels.launch import launch
from grpo_kernels.normalize.triton_groups import Groups


@pytest.fixture(autouse=True)
def guarded(monkeypatch):
    guard(monkeypatch)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize(
    ("call", "signal", "name"), [(call, signal, name) for call, signal, names in CALLS for name in names]
)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_memory_layout_changes_nothing(backend, call, signal, name, layout):
    given = head_inputs()
    odd = layout(given[name])
    assert torch.equal(odd, given[name]) and (odd.storage_offset() or not odd.is_contiguous())
    with use_backend(backend):
        found, expected = call({**given, name: odd}, signal), call(given, signal)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [*(name for name in OF_TOKENS if name != "sequence_N"), "position"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_an_expanded_number_is_a_whole_vector(backend, name):
    given = head_inputs()
    expanded = given[name][:1].expand(given[name].shape)
    with use_backend(backend):
        found, expected = (loss_call({**given, name: one}, "rewards") for one in (expanded, expanded.clone()))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


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
        found, expected = (normalize_rewards(one, method, context=context) for one in (row, row.clone()))
        torch.testing.assert_close(found, expected)


def test_tensors_on_two_devices_are_refused():
    with pytest.raises(ValueError, match="a kernel's tensors are on cpu, meta: expected one device"):
        launch(None, (1,), torch.ones(2), Groups(torch.ones(2, device="meta"), 2, 1e-4, None))
