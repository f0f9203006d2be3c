"""grpo_kernels.normalize_rewards: worked numbers, float64 truth, properties, traps, Triton against torch, bad input."""

import math
import os

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference import normalize_rewards_reference

from grpo_kernels import (
    METHODS,
    Normalized,
    check_normalization,
    normalize_rewards,
    normalize_with_statistics,
    use_backend,
)

NAN = float("nan")
BACKENDS = ["torch", "triton"]
ZERO_IF_EQUAL = [name for name, method in METHODS.items() if method.zero_if_equal]
UNIT = [name for name, method in METHODS.items() if method.unit_rewards]
# invariant when a constant is added to one group's rewards; when all rewards are multiplied (at eps = 0)
SHIFT_INVARIANT = [name for name in ZERO_IF_EQUAL if name not in UNIT]
SCALE_INVARIANT = ["std", "batch_std", "global", "mean_abs", "median_mad", "iqr", "rank", "decoupled"]


def options(method: str, alpha: float = 0.5) -> dict:
    return {"alpha": alpha} if method == "power" else {}


def lengths_of(rewards) -> list[list[float]]:
    """Some lengths, different in every place; the first completion of all is empty."""
    return [[float((7 * p + 3 * g) % 11) for g in range(len(group))] for p, group in enumerate(rewards)]


def context_of(method: str, rewards, alpha: float = 0.5) -> dict:
    """What the method needs besides the rewards, as plain lists: also the reference's arguments."""
    context = {
        "length_weighted": lambda: {"lengths": lengths_of(rewards)},
        "decoupled": lambda: {
            "function_rewards": [[[r, (2 * g) % 3 - r] for g, r in enumerate(group)] for group in rewards],
            "function_weights": [1.0, 0.5],
        },
        "running_std": lambda: {"running_variance": 0.25},
        "curvature": lambda: {"curvature_scale": [0.5 + p for p in range(len(rewards))]},
        "adaptive": lambda: {"alpha": alpha},
    }
    return context.get(method, dict)()


def run(rewards, method, *, alpha=0.5, dtype=torch.float32, device="cpu", statistics=False, **arguments):
    """``normalize_rewards`` on nested lists or a tensor, with what the method needs."""
    tensor = torch.as_tensor(rewards, dtype=dtype, device=device)
    context = {
        name: torch.tensor(value, dtype=torch.float64, device=device) if isinstance(value, list) else value
        for name, value in context_of(method, tensor.tolist(), alpha).items()
    }
    for name, shape in (("lengths", tensor.shape), ("function_rewards", (*tensor.shape, 2))):
        if name in context:  # an empty batch too
            context[name] = context[name].reshape(shape)
    result = normalize_with_statistics(tensor, method, context=context, **options(method, alpha), **arguments)
    return result if statistics else result.advantages


def reference(rewards, method, *, alpha=0.5, eps=1e-4) -> torch.Tensor:
    rewards = torch.as_tensor(rewards, dtype=torch.float64).tolist()
    arguments = {"alpha": alpha, **context_of(method, rewards, alpha)}
    return torch.tensor(normalize_rewards_reference(rewards, method, eps=eps, **arguments), dtype=torch.float64)


# Two prompts with different rewards. Group 1: mean 0.25, deviations (.75, -.25, -.25, -.25), sample variance
# (.5625 + 3 * .0625) / 3 = .25, std 0.5. Group 2: mean 3, deviations (-3, -1, 1, 3), sample variance 20 / 3.
# Batch: mean 13 / 8, sum of squares 1 + 4 + 16 + 36 = 57, variance (57 - 8 * 1.625^2) / 7 = 5.125.
REWARDS = [[1.0, 0.0, 0.0, 0.0], [0.0, 2.0, 4.0, 6.0]]
S2, SB = math.sqrt(20 / 3), math.sqrt(5.125)
BY_HAND = {
    "none": REWARDS,
    "mean": [[0.75, -0.25, -0.25, -0.25], [-3, -1, 1, 3]],
    "batch_mean": [[-0.625, -1.625, -1.625, -1.625], [-1.625, 0.375, 2.375, 4.375]],
    "loo": [[1, -1 / 3, -1 / 3, -1 / 3], [-4, -4 / 3, 4 / 3, 4]],
    "std": [[1.5, -0.5, -0.5, -0.5], [-3 / S2, -1 / S2, 1 / S2, 3 / S2]],
    "batch_std": [[0.75 / SB, -0.25 / SB, -0.25 / SB, -0.25 / SB], [-3 / SB, -1 / SB, 1 / SB, 3 / SB]],
    "global": [
        [-0.625 / SB, -1.625 / SB, -1.625 / SB, -1.625 / SB],
        [-1.625 / SB, 0.375 / SB, 2.375 / SB, 4.375 / SB],
    ],
    "power": [  # alpha = 0.5
        [0.75 / math.sqrt(0.5), *[-0.25 / math.sqrt(0.5)] * 3],
        [-3 / S2**0.5, -1 / S2**0.5, 1 / S2**0.5, 3 / S2**0.5],
    ],
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
    # a running variance of 1/4; curvatures 1/2 and 3/2; alpha = 0.5
    "running_std": [[1.5, -0.5, -0.5, -0.5], [-6, -2, 2, 6]],
    "adaptive": [
        [0.75 / math.sqrt(0.5), *[-0.25 / math.sqrt(0.5)] * 3],
        [-3 / S2**0.5, -1 / S2**0.5, 1 / S2**0.5, 3 / S2**0.5],
    ],
}


# Pass rates 1/4 and 3/4: mu = 1/2, sample variance 1/8, mu (1 - mu) / v - 1 = 1, a = b = 1/2: Beta(7/6, 7/6), whose
# density at both is (3/16)^(1/6) Gamma(7/3) / Gamma(7/6)^2
PASSED = [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 1.0]]
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
    assert {*BY_HAND, *UNIT_BY_HAND, "decoupled"} == set(METHODS)  # decoupled: test_decoupled_by_hand


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
    with_one = normalize_rewards(
        torch.tensor(REWARDS), "decoupled", context={"function_rewards": torch.tensor(REWARDS)[:, :, None]}
    )
    assert not torch.allclose(with_one, normalize_rewards(torch.tensor(REWARDS), "std"), atol=1e-2)  # whitened again


@pytest.mark.parametrize("backend", BACKENDS)
def test_centre_and_scale_make_the_advantages(backend):
    for method in METHODS:
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


def method_and_groups(methods=tuple(METHODS), **shape):
    return st.sampled_from(sorted(methods)).flatmap(
        lambda method: st.tuples(st.just(method), groups(unit=method in UNIT, **shape))
    )


def at_a_threshold(rewards, method) -> bool:
    """Where rounding decides whether MAD or IQR, or the std in its place, is the scale."""
    for group in rewards:
        known = np.array([x for x in group if not math.isnan(x)])
        if method not in ("median_mad", "iqr") or len(known) < 2:
            continue
        mad = np.median(np.abs(known - np.median(known)))
        spread = mad if method == "median_mad" else np.subtract(*np.quantile(known, [0.75, 0.25]))
        if abs(spread - 0.01 * known.std(ddof=1)) <= 1e-4 * known.std(ddof=1):
            return spread > 0 and known.std() > 0
    return False


@settings(max_examples=400, deadline=None)
@given(case=method_and_groups(), alpha=st.floats(0, 1), eps=st.sampled_from([1e-4, 1e-9, 0.1]))
@example(case=("beta", [[0.0, 1.0, NAN], [1.0, 0.1, 0.375]]), alpha=0.0, eps=1e-4)  # lgamma of 1,000 and more
def test_float64_is_the_reference(case, alpha, eps):
    method, rewards = case
    if at_a_threshold(rewards, method):
        return
    got = run(rewards, method, alpha=alpha, dtype=torch.float64, eps=eps)
    want = reference(rewards, method, alpha=alpha, eps=eps)
    # a group of nearly equal large values loses digits in its spread, in the reference too
    largest = max((abs(x) for group in rewards for x in group if not math.isnan(x)), default=1.0) + 1
    # (shrinkage: the spread of the other prompts' means is a difference of sums over all prompts)
    smallest = {"beta": 1e-6, "shrinkage": 1e-6}.get(method, eps)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12 * largest / smallest)


@settings(max_examples=300, deadline=None)
@given(case=method_and_groups(), alpha=st.floats(0, 1))
@example(case=("adaptive", [[0.0] * 7 + [9998.0, -9791.0]]), alpha=0.0)  # rounding of the mean, as plain torch's
@example(case=("running_std", [[0.0, 0.0, 810.0, 4350.0, -5225.0]]), alpha=0.0)
def test_float32_error_is_no_worse_than_plain_torch(case, alpha):
    method, rewards = case
    if at_a_threshold(rewards, method):
        return
    exact = torch.tensor(rewards, dtype=torch.float32).double()
    truth = run(exact, method, alpha=alpha, dtype=torch.float64)
    ours = run(exact, method, alpha=alpha).double()
    if method not in PLAIN:
        largest = exact.nan_to_num(0.0).abs().max().item() + 1
        atol = 1e-4 * (largest if method in UNIT else 1)
        torch.testing.assert_close(ours, truth, rtol=3e-5, atol=atol, msg=lambda text: f"{method}: {text}")
        return
    plain = plain_torch(exact.float(), method, alpha=alpha).double()
    same = plain.isnan() | torch.isinf(plain)  # plain torch has no answer for degenerate groups
    plain_error = torch.where(same, 0.0, (plain - truth).abs()).max()
    assert (ours - truth).abs().max() <= 2 * plain_error + 4e-6 * truth.abs().max() + 1e-9


PLAIN = (
    "none",
    "mean",
    "batch_mean",
    "loo",
    "std",
    "batch_std",
    "global",
    "mean_abs",
    "power",
    "adaptive",
    "length_weighted",
    "running_std",
)


def plain_torch(rewards, method, eps=1e-4, alpha=0.5):
    """The lines anyone would write; no care for NaN, equal rewards or rounding."""
    known = rewards[~rewards.isnan()]
    mean = rewards.nanmean(1, keepdim=True)
    count = (~rewards.isnan()).sum(1, keepdim=True)
    std = ((rewards - mean).square().nansum(1, keepdim=True) / (count - 1)).sqrt()

    def by_length():
        lengths = torch.tensor(context_of(method, rewards.tolist(), alpha)["lengths"]).reshape(rewards.shape)
        lengths = torch.where(rewards.isnan(), 0.0, lengths.to(rewards.dtype))
        return rewards - (lengths * rewards).nansum(1, keepdim=True) / lengths.sum(1, keepdim=True)

    lines = {
        "none": lambda: rewards,
        "length_weighted": by_length,
        "mean": lambda: rewards - mean,
        "batch_mean": lambda: rewards - known.mean(),
        "loo": lambda: (rewards - mean) * count / (count - 1),
        "power": lambda: (rewards - mean) / (std + eps) ** alpha,
        "adaptive": lambda: (rewards - mean) / (std + eps) ** alpha,
        "std": lambda: (rewards - mean) / (std + eps),
        "running_std": lambda: (rewards - mean) / (context_of("running_std", [])["running_variance"] ** 0.5 + eps),
        "batch_std": lambda: (rewards - mean) / (known.std() + eps),
        "global": lambda: (rewards - known.mean()) / (known.std() + eps),
        "mean_abs": lambda: (rewards - mean) / ((rewards - mean).abs().nanmean(1, keepdim=True) + eps),
    }
    return lines[method]().nan_to_num(nan=0.0)


@settings(max_examples=150, deadline=None)
@given(case=method_and_groups(max_p=9, max_g=9), alpha=st.sampled_from([0.0, 0.3, 1.0]))
def test_triton_agrees_with_torch(case, alpha):
    method, rewards = case
    if at_a_threshold(rewards, method):
        return
    with use_backend("torch"):
        want = run(rewards, method, alpha=alpha, statistics=True)
    with use_backend("triton"):
        got = run(rewards, method, alpha=alpha, statistics=True)
    # sums are rounded in another order
    largest = max((abs(x) for group in rewards for x in group if not math.isnan(x)), default=1.0)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 + 1e-6 * largest, equal_nan=True)


def test_triton_writes_every_element(monkeypatch):
    """Output memory starts as NaN: whatever the kernel leaves out shows."""
    real = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: real(*args, **kwargs).fill_(NAN))
    for shape in [(1, 1), (3, 7), (130, 8), (2, 64), (0, 4)]:
        for method in METHODS:
            with use_backend("triton"):
                got, centre, scale = run(torch.rand(shape), method, statistics=True)
            assert got.shape == shape and not got.isnan().any(), (shape, method)
            assert method == "rank" or not (centre.isnan().any() or scale.isnan().any()), (shape, method)
    with use_backend("triton"):
        for method in ("std", "median_mad"):
            assert not run(torch.rand(1, 1025), method).isnan().any()


def test_one_launch_for_all_groups(monkeypatch):
    from grpo_kernels.normalize import triton_groups

    launches = []
    kernel = triton_groups._normalize_kernel

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid)
            return kernel[grid]

    monkeypatch.setattr(triton_groups, "_normalize_kernel", Counted())
    with use_backend("triton"):
        for method in METHODS:
            launches.clear()
            run(torch.rand(300, 8), method)
            # 128 groups a program; decoupled: two functions and the whitening
            assert launches == [(3,)] * (3 if method == "decoupled" else 1), method


# ---- the traps of other implementations, in the order of the catalogue


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [0.1, 0.7, 1 / 3, -1e30, 1e-38, 12345.678])
@pytest.mark.parametrize("size", [2, 3, 8, 64])
def test_trap_1_equal_rewards_get_exactly_zero(value, size, backend):
    """The mean of eight times 0.1 isn't 0.1 in float32, and a tiny std magnifies the difference."""
    other = [float(i % 2) for i in range(size)]
    for method in ZERO_IF_EQUAL:
        if method in UNIT and not 0 <= value <= 1:
            continue
        for eps in (1e-4, 1e-9, 0.0):
            with use_backend(backend):
                advantages = run([[value] * size, other], method, eps=eps)
            assert (advantages[0] == 0).all(), (method, eps)
            assert (advantages[1] != 0).any(), (method, eps)
    whole = torch.full((3, size), value)
    for method in ("batch_mean", "global"):
        with use_backend(backend):
            assert (normalize_rewards(whole, method, eps=0.0) == 0).all()
    for method in ("none", "batch_mean", "global", "shrinkage"):  # not 0 on purpose
        with use_backend(backend):
            assert (run([[0.7] * size, other], method)[0] != 0).all()


def test_trap_2_no_leave_one_out_std():
    """One failure among equal successes has no spread but its own: the quotient would be about -2000."""
    rewards = [0.0, *[0.95] * 7]
    others = torch.tensor(rewards[1:], dtype=torch.float64)
    assert abs(rewards[0] - others.mean()) / (others.std() + 1e-4) > 2000
    for method, kind in METHODS.items():
        if kind.kind != "state":
            advantages = run([rewards, [0.0, 1.0] * 4], method)
            assert advantages.abs().max() < 25, method


@pytest.mark.parametrize("backend", BACKENDS)
def test_trap_3_ties_share_their_rank(backend):
    with use_backend(backend):
        got = normalize_rewards(torch.tensor([[0.3] * 4, [1.0, 0, 1, 0], [2.0, 5, NAN, 5]]), "rank")
    third = 2 / 3  # mid-ranks 3.5 and 1.5 of four; then 1, 2.5, 2.5 of three
    torch.testing.assert_close(got, torch.tensor([[0.0] * 4, [third, -third, third, -third], [-1, 0.5, 0, 0.5]]))
    by_double_argsort = torch.tensor([0.3] * 4).argsort(stable=True).argsort(stable=True)
    assert by_double_argsort.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("method", "size"), [("median_mad", 5), ("iqr", 8)])
def test_trap_4_lopsided_groups_stay_bounded(method, size, backend):
    """MAD and IQR of one success among failures are 0: over eps alone it would get 10,000."""
    rewards = torch.zeros(1, size)
    rewards[0, 0] = 1
    with use_backend(backend):
        got = normalize_rewards(rewards, method, eps=0.0)
        torch.testing.assert_close(got, rewards / rewards.std())
        nearly = torch.tensor([[1.0, *[i * 1e-6 for i in range(size - 1)]]])  # and where they are nearly 0
        assert normalize_rewards(nearly, method, eps=0.0).abs().max() < 10


def test_trap_7_bnpo_the_loss_is_not_beta_the_normalisation():
    with pytest.raises(ValueError, match="unknown normalization 'bnpo'"):
        check_normalization("bnpo")
    assert "Beta" in METHODS["beta"].formula


def test_trap_8_constant_noise_cancels_only_under_std_and_only_without_eps():
    """A reward model that is wrong at a constant rate scales and shifts all rewards: r (1 - 2 e) + e."""
    rewards = torch.tensor(PASSED, dtype=torch.float64)
    noisy = rewards * (1 - 2 * 0.1) + 0.1
    same = normalize_rewards(rewards, "std", eps=0.0)
    torch.testing.assert_close(normalize_rewards(noisy, "std", eps=0.0), same)
    assert not torch.allclose(normalize_rewards(noisy, "std"), normalize_rewards(rewards, "std"), rtol=1e-6)
    assert not torch.allclose(normalize_rewards(noisy, "mean"), normalize_rewards(rewards, "mean"), rtol=1e-2)


# traps 5 (zero-variance counted per group), 6 (unscorable completions, in the trainer) and 9 (groups split over
# processes): test_trainer.py, test_advantages.py, test_two_processes.py


def test_the_naive_lines_do_have_that_residue():
    """The test above can fail: TRL's lines give this all-equal group an advantage."""
    rewards = torch.full((1, 8), 0.7)
    naive = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    assert naive.abs().max() > 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_trap_6_unscorable_rewards_are_left_out(backend):
    rewards = torch.tensor([[1.0, NAN, 0.0, NAN], [NAN, 0.5, NAN, NAN], [NAN] * 4, [0.0, 1.0, 1.0, 0.0]])
    with use_backend(backend):
        for method in METHODS:
            advantages = run(rewards, method, eps=0.0)
            assert (advantages[rewards.isnan()] == 0).all()
            if method in ZERO_IF_EQUAL:
                assert (advantages[1] == 0).all(), method  # fewer than two to compare
            if method not in ("length_weighted", "decoupled", "shrinkage"):  # which look at places, or at all groups
                compact = run([[1.0, 0.0], [0.5, NAN], [NAN, NAN], [0.0, 1.0]], method, eps=0.0)
                torch.testing.assert_close(advantages[0, [0, 2]].sign(), compact[0].sign(), msg=method)
        std = normalize_rewards(rewards, "std", eps=0.0)
        mean = normalize_rewards(rewards, "batch_mean")
    r = math.sqrt(0.5)
    torch.testing.assert_close(std[0], torch.tensor([r, 0.0, -r, 0.0]))
    # the batch's mean is over the seven scorable ones: 3.5 / 7
    torch.testing.assert_close(mean[0], torch.tensor([0.5, 0.0, -0.5, 0.0]))


def whole(rewards) -> bool:
    return not any(math.isnan(x) for row in rewards for x in row)


@settings(max_examples=200, deadline=None)
@given(
    case=method_and_groups(SHIFT_INVARIANT).filter(lambda case: whole(case[1])),
    shifts=st.lists(st.floats(-100, 100), min_size=5, max_size=5),
)
def test_adding_a_constant_to_a_group_changes_nothing(case, shifts):
    method, rewards = case
    if at_a_threshold(rewards, method) or method == "batch_std":
        return  # the batch's std is of all rewards: it sees the shift of one group (tested below)
    tensor = torch.tensor(rewards, dtype=torch.float64)
    shifted = tensor + torch.tensor(shifts, dtype=torch.float64)[: len(rewards), None]
    spread = (tensor.amax(1) - tensor.amin(1)).clamp(min=1e-9)
    if ((spread > 1e-9) & (spread < 1e-3)).any():
        return  # a spread that the shift's rounding swamps
    # equal rewards stay equal, so exactly 0 stays exactly 0
    torch.testing.assert_close(
        run(shifted, method, dtype=torch.float64), run(tensor, method, dtype=torch.float64), rtol=1e-6, atol=1e-5
    )


def test_what_a_shift_changes():
    """All groups by one constant leaves batch statistics alone; one group, or [0, 1] methods, not."""
    tensor = torch.tensor(REWARDS, dtype=torch.float64)
    for method in ("batch_std", "batch_mean", "global", "shrinkage", "decoupled"):
        torch.testing.assert_close(
            run(tensor + 5, method, dtype=torch.float64), run(tensor, method, dtype=torch.float64)
        )
    one = torch.tensor([[5.0], [0.0]])
    for method in ("none", "batch_mean", "batch_std", "global", "shrinkage"):
        assert not torch.allclose(run(tensor + one, method), run(tensor, method), rtol=1e-3), method


@settings(max_examples=200, deadline=None)
@given(
    case=method_and_groups(SCALE_INVARIANT).filter(lambda case: whole(case[1])),
    exponent=st.integers(-6, 6),
)
def test_multiplying_the_rewards_changes_nothing_without_eps(case, exponent):
    method, rewards = case
    tensor = torch.tensor(rewards, dtype=torch.float64)  # a power of two: exact, so no threshold is crossed
    if method == "decoupled":
        both = torch.stack([tensor, tensor.square()], dim=2)
        first, second = (
            normalize_rewards(tensor, method, eps=0.0, context={"function_rewards": x})
            for x in (both, both * 2.0**exponent)
        )
    else:
        first = normalize_rewards(tensor, method, eps=0.0)
        second = normalize_rewards(tensor * 2.0**exponent, method, eps=0.0)
    torch.testing.assert_close(second, first, rtol=1e-9, atol=1e-9)


@settings(max_examples=200, deadline=None)
@given(case=method_and_groups(), seed=st.integers(0, 99))
def test_permuting_a_group_permutes_its_advantages(case, seed):
    method, rewards = case
    if at_a_threshold(rewards, method):
        return
    tensor = torch.tensor(rewards, dtype=torch.float64)
    order = torch.randperm(tensor.shape[1], generator=torch.Generator().manual_seed(seed))
    context = {
        name: torch.tensor(value, dtype=torch.float64) if isinstance(value, list) else value
        for name, value in context_of(method, rewards).items()
    }
    advantages = normalize_rewards(tensor, method, context=context, **options(method))
    if "lengths" in context:
        context["lengths"] = context["lengths"][:, order]
    if "function_rewards" in context:
        context["function_rewards"] = context["function_rewards"].view(*tensor.shape, 2)[:, order]
    permuted = normalize_rewards(tensor[:, order], method, context=context, **options(method))
    torch.testing.assert_close(permuted, advantages[:, order], rtol=1e-9, atol=1e-7)


def bound(method: str, n: int, total: int) -> float:
    """The largest advantage there can be for rewards in [0, 1], n in a group and ``total`` in the batch."""
    return {
        "none": 1, "mean": 1, "batch_mean": 1, "loo": 1, "length_weighted": 1, "rank": 1,
        "shrinkage": 1,
        "std": (n - 1) / math.sqrt(n), "power": (n - 1) / math.sqrt(n), "adaptive": (n - 1) / math.sqrt(n),
        "batch_std": math.sqrt(total), "global": math.sqrt(total), "decoupled": math.sqrt(total),
        "mean_abs": n / 2, "max_rl": n - 1,
        "median_mad": 100 * ((n - 1) / math.sqrt(n) + 1), "iqr": 100 * ((n - 1) / math.sqrt(n) + 1),
        "beta": 1e6, "running_std": 2, "curvature": 2,  # the smallest scales given by context_of are 1/2
    }[method]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(method=st.sampled_from(list(METHODS)), rewards=groups(unit=True))
def test_bounded_rewards_give_bounded_advantages(method, rewards):
    """Without eps: no tiny denominator makes a large advantage."""
    advantages = run(rewards, method, dtype=torch.float64, eps=0.0)
    n, total = len(rewards[0]), len(rewards) * len(rewards[0])
    assert advantages.abs().max() <= bound(method, n, total) * (1 + 1e-9) + 1e-9


@given(rewards=groups(), seed=st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_power_ends_are_mean_and_std(rewards, seed):
    tensor = torch.tensor(rewards)
    assert torch.equal(normalize_rewards(tensor, "power", alpha=0.0), normalize_rewards(tensor, "mean"))
    assert torch.equal(normalize_rewards(tensor, "power", alpha=1), normalize_rewards(tensor, "std"))


def test_context_gives_the_whole_batch_to_one_part():
    """Two processes with half the groups each, and the batch's statistics, get what one process gets."""
    rewards = torch.randn(6, 4, dtype=torch.float64)
    context = {"batch_mean": rewards.mean(), "batch_std": rewards.std().item()}
    for method in METHODS:
        if METHODS[method].needs or METHODS[method].unit_rewards or method == "shrinkage":
            continue
        whole = normalize_rewards(rewards, method, **options(method))
        for backend in BACKENDS:
            with use_backend(backend):
                parts = [
                    normalize_rewards(half.float(), method, context=context, **options(method))
                    for half in rewards.split(3)
                ]
            torch.testing.assert_close(torch.cat(parts).double(), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("offset, spread", [(0.0, 1.0), (100.0, 0.01), (1000.0, 1e-3), (1e4, 0.01), (-1e6, 1.0)])
@pytest.mark.parametrize("method", ["std", "mean", "loo", "mean_abs", "median_mad", "iqr", "power", "batch_std"])
def test_rewards_with_an_offset_keep_their_digits(method, offset, spread, backend):
    """The error is float32's own of the result, and a group still sums to 0."""
    torch.manual_seed(1)
    rewards = (offset + spread * torch.rand(32, 8)).float()
    options = {"alpha": 0.5} if method == "power" else {}
    truth = torch.tensor(normalize_rewards_reference(rewards.double().tolist(), method, **options), dtype=torch.float64)
    with use_backend(backend):
        found = normalize_rewards(rewards, method, **options).double()
    assert (found - truth).abs().max() <= 4e-7 * truth.abs().max()
    if method not in ("median_mad", "iqr"):
        assert found.sum(1).abs().max() <= 2e-6 * truth.abs().max()


@pytest.mark.parametrize("method", ["std", "mean_abs", "median_mad", "iqr", "batch_std", "global", "power", "rank"])
def test_huge_rewards_give_neither_nan_nor_zeros(method):
    rewards = torch.tensor([[3e38, -3e38, 0.0, 1.0], [1e38, 2e38, -1e38, 3e38]])
    options = {"alpha": 1.0} if method == "power" else {}
    found = []
    for backend in ("torch", "triton"):
        with use_backend(backend):
            found.append(normalize_rewards(rewards, method, eps=0.0, **options))
    torch.testing.assert_close(*found)
    assert found[0].isfinite().all() and (found[0].abs().amax(1) > 0.5).all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_two_neighbouring_numbers(backend):
    low = torch.tensor(0.1)
    rewards = torch.stack([low, torch.nextafter(low, torch.tensor(1.0))])[None]
    with use_backend(backend):
        assert normalize_rewards(rewards, "std", eps=0.0).tolist() == [pytest.approx([-(0.5**0.5), 0.5**0.5])]


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_dtypes_and_strides(backend):
    base = torch.randn(4, 12)
    with use_backend(backend):
        assert normalize_rewards(torch.empty(0, 8)).shape == (0, 8)
        assert (normalize_rewards(torch.randn(5, 1)) == 0).all()  # one generation a prompt, as in evaluation
        assert torch.equal(normalize_rewards(base[:, ::3]), normalize_rewards(base[:, ::3].contiguous()))
        assert torch.equal(normalize_rewards(base.T), normalize_rewards(base.T.contiguous()))
        for dtype in (torch.bfloat16, torch.float16):
            half = base.to(dtype)
            assert torch.equal(normalize_rewards(half), normalize_rewards(half.float()))
        assert normalize_rewards(base.double()).dtype == torch.float64
        huge = normalize_rewards(torch.tensor([[1e30, -1e30, 0.0]]), "std")
        tiny = normalize_rewards(torch.tensor([[1e-30, -1e-30, 0.0]]), "std", eps=0.0)
    torch.testing.assert_close(huge, torch.tensor([[1.0, -1.0, 0.0]]))  # their squares overflow, or vanish
    torch.testing.assert_close(tiny, torch.tensor([[1.0, -1.0, 0.0]]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: normalize_rewards(r, "stdd"), r"unknown normalization 'stdd': choose from none.*Did you mean 'std'"),
        (lambda r: normalize_rewards(r, "power"), "'power' needs the option 'alpha'"),
        (lambda r: normalize_rewards(r, "power", alpha=1.5), r"alpha=1.5 must be a number in \[0, 1\]"),
        (lambda r: normalize_rewards(r, "power", alpha=NAN), r"alpha=nan must be a number in \[0, 1\]"),
        (lambda r: normalize_rewards(r, "power", alpha="half"), r"alpha='half' must be a number in \[0, 1\]"),
        (lambda r: normalize_rewards(r, "std", alpha=0.5), "'std' has no option 'alpha': it takes only eps"),
        (lambda r: normalize_rewards(r, "std", eps=-1.0), "eps=-1.0 must be"),
        (lambda r: normalize_rewards(r, "std", eps=NAN), "eps=nan must be"),
        (lambda r: normalize_rewards(r.flatten()), r"shape \(8,\): expected \(P, G\)"),
        (lambda r: normalize_rewards(torch.empty(3, 0)), r"shape \(3, 0\)"),
        (lambda r: normalize_rewards(r.long()), "floating-point tensor, got torch.int64"),
        (lambda r: normalize_rewards([[1.0]]), "floating-point tensor, got list"),
        (lambda r: normalize_rewards(r.index_fill(1, torch.tensor([2]), float("-inf"))), r"\[0, 2\] is -inf"),
        (lambda r: normalize_rewards(r, context={"mean": 1.0}), "context has no entry 'mean'"),
        (
            lambda r: normalize_rewards(r, context={"batch_std": float("nan")}),
            r"\['batch_std'\]=nan must be a finite",
        ),
        (
            lambda r: normalize_rewards(r, context={"batch_mean": "x"}),
            r"\['batch_mean'\]='x' must be a finite",
        ),
        (lambda r: normalize_rewards(r, ["std"]), r"unknown normalization \['std'\]"),
        (lambda r: check_normalization("grpo"), "unknown normalization 'grpo'"),
        (lambda r: check_normalization("medianmad"), "Did you mean 'median_mad'"),
        (lambda r: check_normalization("running_std", decay=1.0), r"decay=1.0 must be a number in \[0, 1\)"),
        (lambda r: check_normalization("adaptive", decay=True), "decay=True must be a number"),
        (lambda r: check_normalization("adaptive", alpha=0.5), "no option 'alpha': it takes eps and decay"),
        (
            lambda r: normalize_rewards(r * 2, "max_rl"),
            r"rewards_PG\[0, 0\] is 2: normalization 'max_rl' needs rewards in \[0",
        ),
        (
            lambda r: normalize_rewards(torch.tensor([[0.0, 1.0], [0.5, -0.25]]), "beta"),
            r"rewards_PG\[1, 1\] is -0.25: normalization 'beta' needs",
        ),
        (lambda r: normalize_rewards(r, "length_weighted"), r"'length_weighted' needs context\['lengths'\]"),
        (
            lambda r: normalize_rewards(r, "length_weighted", context={"lengths": torch.ones(8)}),
            r"context\['lengths'\] is \(8,\): expected a tensor \(2, 4\)",
        ),
        (
            lambda r: normalize_rewards(r, "length_weighted", context={"lengths": -r}),
            r"context\['lengths'\] holds -1: expected nothing negative",
        ),
        (
            lambda r: normalize_rewards(r, "length_weighted", context={"lengths": r * NAN}),
            r"context\['lengths'\] holds a value that isn't finite",
        ),
        (lambda r: normalize_rewards(r, "decoupled"), r"'decoupled' needs context\['function_rewards'\]"),
        (
            lambda r: normalize_rewards(r, "decoupled", context={"function_rewards": r}),
            r"\['function_rewards'\] is \(2, 4\): expected a tensor \(2, 4, F\)",
        ),
        (
            lambda r: normalize_rewards(
                r, "decoupled", context={"function_rewards": r[:, :, None], "function_weights": torch.ones(2)}
            ),
            r"\['function_weights'\] is \(2,\): expected a tensor \(1,\)",
        ),
        (
            lambda r: normalize_rewards(r, "running_std"),
            r"'running_std' needs context\['running_variance'\] \(the trainer",
        ),
        (
            lambda r: normalize_rewards(r, "running_std", context={"running_variance": -1.0}),
            r"\['running_variance'\]=-1.0 must be a finite number, not negative",
        ),
        (
            lambda r: normalize_rewards(r, "adaptive", context={"alpha": 2.0}),
            r"\['alpha'\]=2.0 must be a finite number in \[0, 1\]",
        ),
        (
            lambda r: normalize_rewards(r, "curvature", context={"curvature_scale": torch.ones(3)}),
            r"\['curvature_scale'\] is \(3,\): expected a tensor \(2,\)",
        ),
        (lambda r: normalize_rewards(r, lambda rewards: rewards), r"can't be called with \(rewards_PG, context\)"),
        (
            lambda r: normalize_rewards(r, lambda rewards, context: rewards, alpha=1),
            r"can't be called with \(rewards_PG, context, alpha=1\)",
        ),
        (
            lambda r: normalize_rewards(r, lambda rewards, context: rewards[0]),
            r"returned \(4,\): expected a tensor \(2, 4",
        ),
        (lambda r: normalize_rewards(r, lambda rewards, context: 1), r"returned int: expected a tensor \(2, 4\)"),
        (
            lambda r: normalize_rewards(r, lambda rewards, context: rewards / (rewards - 1)),
            r"returned inf at \[0, 0\], for the rewards \[1.0, 1.0",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, 4))


def test_a_function_of_ones_own():
    rewards = torch.tensor([[1.0, 0.0, NAN], [2.0, 4.0, 6.0]])

    def centred(rewards_PG, context, factor=1.0):
        return factor * (rewards_PG - rewards_PG.nanmean(1, keepdim=True)) + context.get("shift", 0)

    got = normalize_with_statistics(rewards, centred, factor=2.0, context={"shift": 1})
    torch.testing.assert_close(got.advantages, torch.tensor([[2.0, 0, 0], [-3, 1, 5]]))
    assert got.centre.isnan().all() and got.scale.isnan().all()


def test_asking_for_triton_where_it_cannot_run(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with use_backend("triton"), pytest.raises(ValueError, match="asked for on device cpu"):
        normalize_rewards(torch.ones(2, 4))
    with pytest.raises(ValueError, match="backend='cuda' is not one of"), use_backend("cuda"):
        pass


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1", reason="needs a GPU")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(1, 2), (37, 7), (4096, 64)])
def test_on_a_gpu(method, shape):
    rewards = torch.rand(shape, device="cuda")
    with use_backend("torch"):
        want = run(rewards, method, device="cuda")
    torch.testing.assert_close(run(rewards, method, device="cuda"), want, rtol=1e-5, atol=1e-5)
