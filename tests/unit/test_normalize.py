"""grpo_kernels.normalize_rewards: worked numbers, float64 truth, properties, Triton against torch."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_inputs import BACKENDS, method_options, needs_gpu
from normalize_example import IN_KERNEL, NAN, PASSED, REWARDS, UNIT, ZERO_IF_EQUAL, at_a_threshold, reference, run

from grpo_kernels import Normalized, normalize_rewards, normalize_with_statistics, use_backend
from grpo_kernels.normalize import triton_groups

# invariant when a constant is added to all rewards; and to those of one group
OF_BATCH = ["batch_std", "batch_mean", "global", "shrinkage", "decoupled"]
SHIFT_INVARIANT = [name for name in ZERO_IF_EQUAL if name not in (*UNIT, *OF_BATCH)]

# Two prompts with different rewards. Group 1: mean 0.25, deviations (.75, -.25, -.25, -.25), sample variance
# (.5625 + 3 * .0625) / 3 = .25, std 0.5. Group 2: mean 3, deviations (-3, -1, 1, 3), sample variance 20 / 3.
# Batch: mean 13 / 8, sum of squares 1 + 4 + 16 + 36 = 57, variance (57 - 8 * 1.625^2) / 7 = 5.125.
S2, SB = math.sqrt(20 / 3), math.sqrt(5.125)
BY_HAND = {
    "none": REWARDS,
    "mean": [[0.75, -0.25, -0.25, -0.25], [-3, -1, 1, 3]],
    "batch_mean": [[-0.625, -1.625, -1.625, -1.625], [-1.625, 0.375, 2.375, 4.375]],
    "loo": [[1, -1 / 3, -1 / 3, -1 / 3], [-4, -4 / 3, 4 / 3, 4]],
    "std": [[1.5, -0.5, -0.5, -0.5], [-3 / S2, -1 / S2, 1 / S2, 3 / S2]],
    "batch_std": [[0.75 / SB, -0.25 / SB, -0.25 / SB, -0.25 / SB], [-3 / SB, -1 / SB, 1 / SB, 3 / SB]],
    "global": [[x / SB for x in (-0.625, -1.625, -1.625, -1.625)], [x / SB for x in (-1.625, 0.375, 2.375, 4.375)]],
    "power": [[x / 0.5**0.5 for x in (0.75, -0.25, -0.25, -0.25)], [x / S2**0.5 for x in (-3, -1, 1, 3)]],  # alpha 0.5
    # mean absolute deviations: (.75 + 3 * .25) / 4 = .375 = 2 sigma^2 for p = 1/4; (3 + 1 + 1 + 3) / 4 = 2
    "mean_abs": [[2, -2 / 3, -2 / 3, -2 / 3], [-1.5, -0.5, 0.5, 1.5]],
    # group 1: median 0, MAD 0: the std, 0.5. Group 2: median 3, deviations (3, 1, 1, 3), MAD 2
    "median_mad": [[2, 0, 0, 0], [-1.5, -0.5, 0.5, 1.5]],
    # group 1: quartiles 0 and .25; group 2: 1.5 and 4.5
    "iqr": [[4, 0, 0, 0], [-1, -1 / 3, 1 / 3, 1]],
    # mid-ranks (4, 2, 2, 2) and (1, 2, 3, 4), less 2.5, over 1.5
    "rank": [[1, -1 / 3, -1 / 3, -1 / 3], [-1, -1 / 3, 1 / 3, 1]],
    # lengths (0, 3, 6, 9) and (7, 10, 2, 5): baselines 0 and (20 + 8 + 30) / 24 = 29 / 12
    "length_weighted": [[1, 0, 0, 0], [-29 / 12, 2 - 29 / 12, 4 - 29 / 12, 6 - 29 / 12]],
    # one other prompt: s2 = 0, so lam = v2 / (v2 + 1e-6). Group 1: v2 = 20/3/4 = 5/3; group 2: v2 = .25/4 = 1/16
    "shrinkage": [
        [r - ((1e-6 / (5 / 3 + 1e-6)) * (1 - r) / 3 + 5 / 3 / (5 / 3 + 1e-6) * 3) for r in (1, 0, 0, 0)],
        [r - ((1e-6 / (1 / 16 + 1e-6)) * (12 - r) / 3 + 1 / 16 / (1 / 16 + 1e-6) / 4) for r in (0, 2, 4, 6)],
    ],
    # a running variance of 1/4; curvatures 1/2 and 3/2
    "running_std": [[1.5, -0.5, -0.5, -0.5], [-6, -2, 2, 6]],
}


# Pass rates 1/4 and 3/4: mu = 1/2, sample variance 1/8, mu (1 - mu) / v - 1 = 1, a = b = 1/2: Beta(7/6, 7/6), whose
# density at both is (3/16)^(1/6) Gamma(7/3) / Gamma(7/6)^2
DENSITY = (3 / 16) ** (1 / 6) * math.gamma(7 / 3) / math.gamma(7 / 6) ** 2
UNIT_BY_HAND = {
    "max_rl": [[3, -1, -1, -1], [-1, 1 / 3, 1 / 3, 1 / 3]],
    "beta": [[d / DENSITY for d in (0.75, -0.25, -0.25, -0.25)], [d / DENSITY for d in (-0.75, 0.25, 0.25, 0.25)]],
    "curvature": [[1.5, -0.5, -0.5, -0.5], [-0.5, 1 / 6, 1 / 6, 1 / 6]],
}


CASES = [(method, REWARDS, expected) for method, expected in BY_HAND.items()]
CASES += [(method, PASSED, expected) for method, expected in UNIT_BY_HAND.items()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("method", "rewards", "expected"), CASES, ids=[case[0] for case in CASES])
def test_worked_by_hand(method, rewards, expected, backend):
    with use_backend(backend):
        got = run(rewards, method, eps=0.0)
    torch.testing.assert_close(got, torch.tensor(expected))
    torch.testing.assert_close(reference(rewards, method, eps=0.0), torch.tensor(expected).double())


def test_every_method_is_worked_by_hand():
    assert {*BY_HAND, *UNIT_BY_HAND, "decoupled"} == set(IN_KERNEL)  # decoupled: test_decoupled_by_hand


@pytest.mark.parametrize("backend", BACKENDS)
def test_decoupled_by_hand(backend):
    """Function 1 gives (2, 0 | 0, 4), function 2 gives (1, 3 | 5, missing), weights 1 and 2, eps = 0.

    Each by std: +-1/sqrt(2) in each group of two; a lone reward gets 0. Sums: q = 1/sqrt(2) times
    (1 - 2, -1 + 2 | -1, 1) = (-1, 1, -1, 1): mean 0, std 2/sqrt(3): whitened +-sqrt(3)/2.
    """
    function_rewards = torch.tensor([[[2.0, 1], [0, 3]], [[0, 5], [4, NAN]]])
    context = {"function_rewards": function_rewards, "function_weights": torch.tensor([1.0, 2.0])}
    with use_backend(backend):
        got = normalize_with_statistics(torch.zeros(2, 2), "decoupled", eps=0.0, context=context)
    h = math.sqrt(3) / 2
    torch.testing.assert_close(got.advantages, torch.tensor([[-h, h], [-h, h]]))
    torch.testing.assert_close(got.centre, torch.tensor([[1.0, 2], [2, 5]]))  # by function
    torch.testing.assert_close(got.scale, torch.tensor([[math.sqrt(2), math.sqrt(2)], [math.sqrt(8), 0]]))
    rewards = torch.tensor(REWARDS)
    with_one = normalize_rewards(rewards, "decoupled", context={"function_rewards": rewards[:, :, None]})
    assert not torch.allclose(with_one, normalize_rewards(rewards, "std"), atol=1e-2)  # whitened again


@pytest.mark.parametrize("backend", BACKENDS)
def test_centre_and_scale_make_the_advantages(backend):
    for method in IN_KERNEL:
        rewards = PASSED if method in UNIT else REWARDS
        with use_backend(backend):
            result = run(rewards, method, eps=0.01, statistics=True)
        assert isinstance(result, Normalized)
        if method == "rank":
            assert result.centre.isnan().all() and result.scale.isnan().all()
        elif method == "decoupled":
            assert result.centre.shape == result.scale.shape == (2, 2)
        else:
            again = (torch.tensor(rewards) - result.centre[:, None]) / result.scale[:, None]
            torch.testing.assert_close(again, result.advantages, msg=method)


def groups(max_p=5, max_g=12, unit=False):
    anything = st.floats(-1e4, 1e4, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3)
    unit_reward = st.floats(0, 1, width=32).filter(lambda x: x == 0 or x > 1e-3)
    reward = st.one_of(st.sampled_from([0.0, 1.0, 0.1, 0.7, NAN]), unit_reward if unit else anything)
    return st.integers(1, max_g).flatmap(
        lambda g: st.lists(st.lists(reward, min_size=g, max_size=g), min_size=1, max_size=max_p)
    )


def method_and_groups(methods=tuple(IN_KERNEL), **shape):
    drawn = st.sampled_from(sorted(methods)).flatmap(
        lambda method: st.tuples(st.just(method), groups(unit=method in UNIT, **shape))
    )
    return drawn.filter(lambda case: not at_a_threshold(case[1], case[0]))


@settings(max_examples=400, deadline=None)
@given(case=method_and_groups(), alpha=st.floats(0, 1), eps=st.sampled_from([1e-4, 1e-9, 0.1]))
@example(case=("beta", [[0.0, 1.0, NAN], [1.0, 0.1, 0.375]]), alpha=0.0, eps=1e-4)  # lgamma of 1,000 and more
def test_float64_is_the_reference(case, alpha, eps):
    method, rewards = case
    got = run(rewards, method, alpha=alpha, dtype=torch.float64, eps=eps)
    want = reference(rewards, method, alpha=alpha, eps=eps)
    # a group of nearly equal large values loses digits in its spread, in the reference too
    largest = max((abs(x) for group in rewards for x in group if not math.isnan(x)), default=1.0) + 1
    # (shrinkage: the spread of the other prompts' means is a difference of sums over all prompts)
    smallest = {"beta": 1e-6, "shrinkage": 1e-6}.get(method, eps)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12 * largest / smallest)


@settings(max_examples=300, deadline=None)
@given(case=method_and_groups(), alpha=st.floats(0, 1))
@example(case=("power", [[0.0] * 7 + [9998.0, -9791.0]]), alpha=0.0)  # a mean that float32 would round
@example(case=("running_std", [[0.0, 0.0, 810.0, 4350.0, -5225.0]]), alpha=0.0)
def test_float32_is_the_float64_result_rounded(case, alpha):
    """Sums are in float64: the error is that of rounding the result, whatever the rewards."""
    method, rewards = case
    exact = torch.tensor(rewards, dtype=torch.float32)
    truth = run(exact, method, alpha=alpha, dtype=torch.float64)
    assert (run(exact, method, alpha=alpha) - truth).abs().max() <= 4e-7 * truth.abs().max()


@settings(max_examples=150, deadline=None)
@given(case=method_and_groups(max_p=9, max_g=9), alpha=st.sampled_from([0.0, 0.3, 1.0]))
def test_triton_agrees_with_torch(case, alpha):
    method, rewards = case
    made = []
    for backend in ("torch", "triton"):
        with use_backend(backend):
            made.append(run(rewards, method, alpha=alpha, statistics=True))
    # sums are rounded in another order
    largest = max((abs(x) for group in rewards for x in group if not math.isnan(x)), default=1.0)
    torch.testing.assert_close(made[1], made[0], rtol=1e-5, atol=1e-6 + 1e-6 * largest, equal_nan=True)


def test_one_launch_for_all_groups(monkeypatch):
    launches = []
    kernel = triton_groups._normalize_kernel

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid)
            return kernel[grid]

    monkeypatch.setattr(triton_groups, "_normalize_kernel", Counted())
    with use_backend("triton"):
        for method in IN_KERNEL:
            launches.clear()
            run(torch.rand(300, 8), method)
            # 128 groups a program; decoupled: two functions and the whitening
            assert launches == [(3,)] * (3 if method == "decoupled" else 1), method


def whole(rewards) -> bool:
    return not any(math.isnan(x) for row in rewards for x in row)


@settings(max_examples=200, deadline=None)
@given(
    case=method_and_groups([*SHIFT_INVARIANT, *OF_BATCH]).filter(lambda case: whole(case[1])),
    shifts=st.lists(st.floats(-100, 100), min_size=5, max_size=5),
)
def test_adding_a_constant_changes_nothing(case, shifts):
    """To a group; where the batch's statistics count, to all of it."""
    method, rewards = case
    tensor = torch.tensor(rewards, dtype=torch.float64)
    shift = torch.tensor(shifts, dtype=torch.float64)[: len(rewards), None]
    shifted = tensor + (shift[0] if method in OF_BATCH else shift)
    spread = (tensor.amax(1) - tensor.amin(1)).clamp(min=1e-9)
    if ((spread > 1e-9) & (spread < 1e-3)).any():
        return  # a spread that the shift's rounding swamps
    found, expected = (run(rewards, method, dtype=torch.float64) for rewards in (shifted, tensor))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)


@given(rewards=groups())
@settings(max_examples=50, deadline=None)
def test_power_0_is_mean_and_power_1_is_std(rewards):
    tensor = torch.tensor(rewards)
    assert torch.equal(normalize_rewards(tensor, "power", alpha=0.0), normalize_rewards(tensor, "mean"))
    assert torch.equal(normalize_rewards(tensor, "power", alpha=1), normalize_rewards(tensor, "std"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_context_gives_the_whole_batch_to_one_part(backend):
    """Two processes with half the groups each, and the batch's statistics, get what one process gets."""
    rewards = torch.randn(6, 4, dtype=torch.float64)
    context = {"batch_mean": rewards.mean(), "batch_std": rewards.std().item()}
    for method, kind in IN_KERNEL.items():
        if kind.needs or kind.unit_rewards or method == "shrinkage":
            continue
        options = method_options(method)
        whole = normalize_rewards(rewards, method, **options)
        with use_backend(backend):
            parts = [normalize_rewards(half.float(), method, context=context, **options) for half in rewards.split(3)]
        torch.testing.assert_close(torch.cat(parts).double(), whole, rtol=1e-5, atol=1e-5)


def test_a_function_as_normalisation():
    rewards = torch.tensor([[1.0, 0.0, NAN], [2.0, 4.0, 6.0]])

    def own(rewards_PG, context, factor=1.0):
        return factor * (rewards_PG - rewards_PG.nanmean(1, keepdim=True)) + context.get("shift", 0)

    got = normalize_with_statistics(rewards, own, factor=2.0, context={"shift": 1})
    torch.testing.assert_close(got.advantages, torch.tensor([[2.0, 0, 0], [-3, 1, 5]]))
    assert got.centre.isnan().all() and got.scale.isnan().all()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("method", IN_KERNEL)
@pytest.mark.parametrize("shape", [(1, 2), (37, 7), (4096, 64)])
def test_on_a_gpu(method, shape):
    rewards = torch.rand(shape, device="cuda")
    with use_backend("torch"):
        want = run(rewards, method, device="cuda")
    torch.testing.assert_close(run(rewards, method, device="cuda"), want, rtol=1e-5, atol=1e-5)
