"""grpo_kernels.normalize_rewards where other implementations go wrong: traps, far numbers, odd shapes, bad input."""

import math

import pytest
import torch
from kernel_inputs import BACKENDS
from normalize_example import IN_KERNEL, NAN, UNIT, ZERO_IF_EQUAL, reference, run

from grpo_kernels import check_normalization, normalize_rewards, use_backend

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
    for method, kind in IN_KERNEL.items():
        if kind.kind != "state":
            advantages = run([rewards, [0.0, 1.0] * 4], method)
            assert advantages.abs().max() < 25, method


@pytest.mark.parametrize("backend", BACKENDS)
def test_trap_3_ties_share_their_rank(backend):
    with use_backend(backend):
        got = normalize_rewards(torch.tensor([[0.3] * 4, [1.0, 0, 1, 0], [2.0, 5, NAN, 5]]), "rank")
    third = 2 / 3  # mid-ranks 3.5 and 1.5 of four; then 1, 2.5, 2.5 of three
    torch.testing.assert_close(got, torch.tensor([[0.0] * 4, [third, -third, third, -third], [-1, 0.5, 0, 0.5]]))


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


# traps 5 (zero-variance counted per group) and 9 (groups split over processes): test_trainer.py, test_advantages.py,
# test_two_processes.py; 6 (unscorable completions): test_normalize.py's comparison with the reference


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset, spread", [(0.0, 1.0), (100.0, 0.01), (1000.0, 1e-3), (1e4, 0.01), (-1e6, 1.0)])
@pytest.mark.parametrize("method", ["std", "mean", "loo", "mean_abs", "median_mad", "iqr", "power", "batch_std"])
def test_rewards_with_an_offset_keep_their_digits(method, offset, spread, backend):
    """The error is float32's own of the result, and a group still sums to 0."""
    torch.manual_seed(1)
    rewards = (offset + spread * torch.rand(32, 8)).float()
    truth = reference(rewards, method)
    with use_backend(backend):
        found = run(rewards, method).double()
    assert (found - truth).abs().max() <= 4e-7 * truth.abs().max()
    if method not in ("median_mad", "iqr"):
        assert found.sum(1).abs().max() <= 2e-6 * truth.abs().max()


@pytest.mark.parametrize("method", ["std", "mean_abs", "median_mad", "iqr", "batch_std", "global", "power", "rank"])
def test_huge_rewards_give_neither_nan_nor_zeros(method):
    rewards = torch.tensor([[3e38, -3e38, 0.0, 1.0], [1e38, 2e38, -1e38, 3e38]])
    found = []
    for backend in ("torch", "triton"):
        with use_backend(backend):
            found.append(run(rewards, method, eps=0.0, alpha=1.0))
    torch.testing.assert_close(*found)
    assert found[0].isfinite().all() and (found[0].abs().amax(1) > 0.5).all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_two_neighbouring_numbers(backend):
    low = torch.tensor(0.1)
    rewards = torch.stack([low, torch.nextafter(low, torch.tensor(1.0))])[None]
    with use_backend(backend):
        assert normalize_rewards(rewards, "std", eps=0.0).tolist() == [pytest.approx([-(0.5**0.5), 0.5**0.5])]


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_and_dtypes(backend):
    base = torch.randn(4, 12)
    with use_backend(backend):
        assert normalize_rewards(torch.empty(0, 8)).shape == (0, 8)
        assert (normalize_rewards(torch.randn(5, 1)) == 0).all()  # one generation a prompt, as in evaluation
        for dtype in (torch.bfloat16, torch.float16):
            half = base.to(dtype)
            assert torch.equal(normalize_rewards(half), normalize_rewards(half.float()))
        assert normalize_rewards(base.double()).dtype == torch.float64
        huge = normalize_rewards(torch.tensor([[1e30, -1e30, 0.0]]), "std")
        tiny = normalize_rewards(torch.tensor([[1e-30, -1e-30, 0.0]]), "std", eps=0.0)
    torch.testing.assert_close(huge, torch.tensor([[1.0, -1.0, 0.0]]))  # their squares overflow, or vanish
    torch.testing.assert_close(tiny, torch.tensor([[1.0, -1.0, 0.0]]))


ONES = torch.ones(2, 4)


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("stdd", {}, r"unknown normalization 'stdd': choose from none.*Did you mean 'std'"),
        (["std"], {}, r"unknown normalization \['std'\]"),
        ("power", {}, "'power' needs the option 'alpha'"),
        ("power", {"alpha": 1.5}, r"alpha=1.5 must be a number in \[0, 1\]"),
        ("power", {"alpha": "half"}, r"alpha='half' must be a number in \[0, 1\]"),
        ("std", {"alpha": 0.5}, "'std' has no option 'alpha': it takes eps, and as every method clip"),
        ("std", {"eps": -1.0}, "eps=-1.0 must be"),
        ("std", {"rewards_PG": ONES.flatten()}, r"shape \(8,\): expected \(P, G\)"),
        ("std", {"rewards_PG": torch.empty(3, 0)}, r"shape \(3, 0\)"),
        ("std", {"rewards_PG": ONES.long()}, "floating-point tensor, got torch.int64"),
        ("std", {"rewards_PG": [[1.0]]}, "floating-point tensor, got list"),
        ("std", {"rewards_PG": torch.tensor([[1.0, 1.0, -math.inf]])}, r"\[0, 2\] is -inf"),
        ("max_rl", {"rewards_PG": ONES * 2}, r"rewards_PG\[0, 0\] is 2: normalization 'max_rl' needs rewards in \[0"),
        (
            "beta",
            {"rewards_PG": torch.tensor([[0, 1], [0.5, -0.25]])},
            r"rewards_PG\[1, 1\] is -0.25: normalization 'b",
        ),
        (lambda rewards: rewards, {}, r"can't be called with \(rewards_PG, context\)"),
        (lambda rewards, context: 1, {"alpha": 1}, r"can't be called with \(rewards_PG, context, alpha=1\)"),
        (lambda rewards, context: 1, {}, r"returned int: expected a tensor \(2, 4\)"),
        (lambda rewards, context: rewards[0], {}, r"returned \(4,\): expected a tensor \(2, 4"),
        (lambda rewards, context: rewards / 0, {}, r"returned inf at \[0, 0\], for the rewards \[1.0, 1.0"),
    ],
)
def test_bad_input_is_named(method, changes, message):
    with pytest.raises(ValueError, match=message):
        normalize_rewards(**{"rewards_PG": ONES, "method": method, **changes})


@pytest.mark.parametrize(
    ("method", "context", "message"),
    [
        ("std", {"mean": 1.0}, "context has no entry 'mean'"),
        ("std", {"batch_std": NAN}, r"context\['batch_std'\]=nan must be a finite"),
        ("length_weighted", {}, r"'length_weighted' needs context\['lengths'\]"),
        ("length_weighted", {"lengths": torch.ones(8)}, r"\['lengths'\] is \(8,\): expected a tensor \(2, 4\)"),
        ("length_weighted", {"lengths": -ONES}, r"\['lengths'\] holds -1: expected nothing negative"),
        ("length_weighted", {"lengths": ONES * NAN}, r"\['lengths'\] holds a value that isn't finite"),
        ("decoupled", {}, r"'decoupled' needs context\['function_rewards'\]"),
        ("decoupled", {"function_rewards": ONES}, r"rewards'\] is \(2, 4\): expected a tensor \(2, 4, F\)"),
        (
            "decoupled",
            {"function_rewards": ONES[:, :, None], "function_weights": torch.ones(2)},
            r"\['function_weights'\] is \(2,\): expected a tensor \(1,\)",
        ),
        ("running_std", {}, r"'running_std' needs context\['running_variance'\] \(the trainer"),
        ("running_std", {"running_variance": -1.0}, r"\['running_variance'\]=-1.0 must be a finite number, not neg"),
        ("curvature", {"curvature_scale": torch.ones(3)}, r"scale'\] is \(3,\): expected a tensor \(2,\)"),
    ],
)
def test_bad_context_is_named(method, context, message):
    with pytest.raises(ValueError, match=message):
        normalize_rewards(ONES, method, context=context)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("running_std", {"decay": 1.0}, r"decay=1.0 must be a number in \[0, 1\)"),
        ("curvature", {"decay": True}, "decay=True must be a number"),
        ("curvature", {"alpha": 0.5}, "no option 'alpha': it takes eps, decay, and"),
    ],
)
def test_bad_options_of_states_are_named(method, options, message):
    with pytest.raises(ValueError, match=message):
        check_normalization(method, **options)


def test_asking_for_triton_where_it_cannot_run(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with use_backend("triton"), pytest.raises(ValueError, match="asked for on device cpu"):
        normalize_rewards(torch.ones(2, 4))
    with pytest.raises(ValueError, match="backend='cuda' is not one of"), use_backend("cuda"):
        pass
