"""grpo_kernels.normalize_rewards: worked numbers, float64 truth, properties, Triton against torch, bad input."""

import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_kernels import METHODS, check_normalization, normalize_rewards, use_backend
from grpo_kernels.reference import normalize_rewards_reference

NAN = float("nan")
BACKENDS = ["torch", "triton"]
GROUP_CENTRED = ["mean", "loo", "std", "batch_std", "power"]


def options(method: str, alpha: float = 0.5) -> dict:
    return {"alpha": alpha} if method == "power" else {}


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
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
def test_worked_by_hand(method, backend):
    with use_backend(backend):
        got = normalize_rewards(torch.tensor(REWARDS), method, eps=0.0, **options(method))
    torch.testing.assert_close(got, torch.tensor(BY_HAND[method]))
    reference = normalize_rewards_reference(REWARDS, method, eps=0.0, alpha=0.5)
    torch.testing.assert_close(torch.tensor(reference, dtype=torch.float64), torch.tensor(BY_HAND[method]).double())


def groups(max_p=5, max_g=12):
    reward = st.one_of(
        st.sampled_from([0.0, 1.0, 0.1, 0.7, NAN]),
        st.floats(-1e4, 1e4, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3),
    )
    return st.integers(1, max_g).flatmap(
        lambda g: st.lists(st.lists(reward, min_size=g, max_size=g), min_size=1, max_size=max_p)
    )


@settings(max_examples=150, deadline=None)
@given(rewards=groups(), method=st.sampled_from(list(METHODS)), alpha=st.floats(0, 1), data=st.data())
def test_float64_is_the_reference(rewards, method, alpha, data):
    eps = data.draw(st.sampled_from([1e-4, 1e-9, 0.1]))
    got = normalize_rewards(torch.tensor(rewards, dtype=torch.float64), method, eps=eps, **options(method, alpha))
    want = torch.tensor(normalize_rewards_reference(rewards, method, eps=eps, alpha=alpha), dtype=torch.float64)
    # a group of nearly equal large values loses digits in its spread, in the reference too
    scale = max((abs(x) for group in rewards for x in group if not math.isnan(x)), default=1.0) + 1
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12 * scale / eps)


@settings(max_examples=150, deadline=None)
@given(rewards=groups(), method=st.sampled_from(list(METHODS)), alpha=st.floats(0, 1))
def test_float32_error_is_no_worse_than_plain_torch(rewards, method, alpha):
    exact = torch.tensor(rewards, dtype=torch.float32).double()
    truth = normalize_rewards(exact, method, **options(method, alpha))
    for backend in BACKENDS:
        with use_backend(backend):
            ours = normalize_rewards(exact.float(), method, **options(method, alpha)).double()
        if method == "power":  # plain lines below know the others
            torch.testing.assert_close(ours, truth, rtol=3e-5, atol=1e-4)
            continue
        plain = plain_torch(exact.float(), method).double()
        same = plain.isnan() | torch.isinf(plain)  # plain torch has no answer for degenerate groups
        plain_error = torch.where(same, 0.0, (plain - truth).abs()).max()
        ours_error = (ours - truth).abs().max()
        assert ours_error <= 2 * plain_error + 4e-6 * truth.abs().max() + 1e-9, backend


def plain_torch(rewards, method, eps=1e-4):
    """The lines anyone would write; no care for NaN, equal rewards or rounding."""
    known = rewards[~rewards.isnan()]
    mean = rewards.nanmean(1, keepdim=True)
    count = (~rewards.isnan()).sum(1, keepdim=True)
    std = ((rewards - mean).square().nansum(1, keepdim=True) / (count - 1)).sqrt()
    lines = {
        "none": lambda: rewards,
        "mean": lambda: rewards - mean,
        "batch_mean": lambda: rewards - known.mean(),
        "loo": lambda: (rewards - mean) * count / (count - 1),
        "std": lambda: (rewards - mean) / (std + eps),
        "batch_std": lambda: (rewards - mean) / (known.std() + eps),
        "global": lambda: (rewards - known.mean()) / (known.std() + eps),
    }
    return lines[method]().nan_to_num(nan=0.0)


@settings(max_examples=60, deadline=None)
@given(rewards=groups(max_p=9, max_g=9), method=st.sampled_from(list(METHODS)), alpha=st.sampled_from([0.0, 0.3, 1.0]))
def test_triton_agrees_with_torch(rewards, method, alpha):
    tensor = torch.tensor(rewards)
    with use_backend("torch"):
        want = normalize_rewards(tensor, method, **options(method, alpha))
    with use_backend("triton"):
        got = normalize_rewards(tensor, method, **options(method, alpha))
    largest = tensor.nan_to_num(0.0).abs().max().item()  # sums are rounded in another order
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6 + 1e-6 * largest)


def test_triton_writes_every_element(monkeypatch):
    """Output memory starts as NaN: whatever the kernel leaves out shows."""
    real = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: real(*args, **kwargs).fill_(NAN))
    for shape in [(1, 1), (1, 1025), (3, 7), (130, 8), (2, 64), (0, 4)]:
        for method in METHODS:
            rewards = torch.randn(shape)
            with use_backend("triton"):
                got = normalize_rewards(rewards, method, **options(method))
            assert got.shape == shape and not got.isnan().any(), (shape, method)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [0.1, 0.7, 1 / 3, -1e30, 1e-38, 12345.678])
@pytest.mark.parametrize("size", [2, 3, 8, 64])
def test_equal_rewards_get_exactly_zero(value, size, backend):
    """Trap 1: the mean of eight times 0.1 isn't 0.1 in float32, and a tiny std magnifies the difference."""
    rewards = torch.tensor([[value] * size, [float(i % 2) for i in range(size)]])
    for method in GROUP_CENTRED:
        for eps in (1e-4, 1e-9, 0.0):
            with use_backend(backend):
                advantages = normalize_rewards(rewards, method, eps=eps, **options(method))
            assert (advantages[0] == 0).all() and (advantages[1] != 0).all(), (method, eps)
    whole = torch.full((3, size), value)
    for method in ("batch_mean", "global"):
        with use_backend(backend):
            assert (normalize_rewards(whole, method, eps=0.0) == 0).all()


def test_the_naive_lines_do_have_that_residue():
    """The test above can fail: TRL's lines give this all-equal group an advantage."""
    rewards = torch.full((1, 8), 0.7)
    naive = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    assert naive.abs().max() > 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_unscorable_rewards_are_left_out(backend):
    rewards = torch.tensor([[1.0, NAN, 0.0, NAN], [NAN, 5.0, NAN, NAN], [NAN] * 4, [0.0, 1.0, 1.0, 0.0]])
    with use_backend(backend):
        for method in METHODS:
            advantages = normalize_rewards(rewards, method, eps=0.0, **options(method))
            assert (advantages[rewards.isnan()] == 0).all()
            if method in GROUP_CENTRED:
                assert (advantages[1] == 0).all()  # fewer than two to compare
        std = normalize_rewards(rewards, "std", eps=0.0)
        mean = normalize_rewards(rewards, "batch_mean")
    r = math.sqrt(0.5)
    torch.testing.assert_close(std[0], torch.tensor([r, 0.0, -r, 0.0]))
    # the batch's mean is over the seven scorable ones: 8 / 7
    torch.testing.assert_close(mean[0], torch.tensor([1 - 8 / 7, 0.0, -8 / 7, 0.0]))


@settings(max_examples=100, deadline=None)
@given(
    rewards=groups().filter(lambda rows: not any(math.isnan(x) for row in rows for x in row)),
    method=st.sampled_from(GROUP_CENTRED),
    shift=st.floats(-100, 100),
    factor=st.floats(0.01, 100),
)
def test_shift_scale_and_permutation(rewards, method, shift, factor):
    tensor = torch.tensor(rewards, dtype=torch.float64)
    advantages = normalize_rewards(tensor, method, **options(method))
    shifted = normalize_rewards(tensor + shift, method, **options(method))
    torch.testing.assert_close(shifted, advantages, rtol=1e-6, atol=1e-5)
    order = torch.randperm(tensor.shape[1])
    permuted = normalize_rewards(tensor[:, order], method, **options(method))
    torch.testing.assert_close(permuted, advantages[:, order], rtol=1e-9, atol=1e-8)
    if method in ("std", "batch_std"):  # exact only without eps
        scaled = normalize_rewards(tensor * factor, method, eps=0.0)
        torch.testing.assert_close(scaled, normalize_rewards(tensor, method, eps=0.0), rtol=1e-6, atol=1e-6)


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
        whole = normalize_rewards(rewards, method, **options(method))
        for backend in BACKENDS:
            with use_backend(backend):
                parts = [
                    normalize_rewards(half.float(), method, context=context, **options(method))
                    for half in rewards.split(3)
                ]
            torch.testing.assert_close(torch.cat(parts).double(), whole, rtol=1e-5, atol=1e-5)


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
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, 4))


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
    rewards = torch.randn(shape, device="cuda")
    with use_backend("torch"):
        want = normalize_rewards(rewards, method, **options(method))
    torch.testing.assert_close(normalize_rewards(rewards, method, **options(method)), want, rtol=1e-5, atol=1e-5)
