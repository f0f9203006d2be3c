"""No kernel reads or writes outside its tensors, and nothing that lies there changes a result: ``guarded_memory.py``.

Every kernel at odd sizes, against the torch backend. On such memory run also inputs with gaps (test_odd_tensors.py) and
every pair of the loss's options (test_head_triton.py).
"""

from contextlib import nullcontext

import pytest
import torch
import triton
import triton.language as tl
from guarded_memory import OutOfBounds, guard
from kernel_inputs import INTERPRETED
from normalize_example import IN_KERNEL, run

from grpo_kernels import use_backend
from grpo_kernels.head.rows import plain, triton_rows
from grpo_kernels.head.rows.plain import Transform
from grpo_kernels.head.rows.triton_rows import _gradient, _tile
from grpo_kernels.head.token_losses import GroupRewards, TokenInputs, TokenLoss

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
OWN_GROUP = [name for name, method in IN_KERNEL.items() if method.own_group]


@pytest.fixture
def guarded(monkeypatch):
    return guard(monkeypatch)


def tile_of(logits_CV, spare):
    """In rows of a multiple of 16 columns, as the head makes them, and ``spare`` more; None: without a gap."""
    if spare is None:
        return logits_CV.clone()
    count, width = logits_CV.shape
    wide = logits_CV.new_full((count, -(-width // 16) * 16 + spare), float("nan"))
    wide[:, :width] = logits_CV
    return wide[:, :width]


def logits(count, width):
    generator = torch.Generator().manual_seed(count)
    targets = torch.randint(width, (count,), generator=generator)
    targets[0] = width - 1
    return torch.randn(count, width, generator=generator) * 2, targets


def tokens(count, group, targets, *, method=None, off_policy=False, advantages=False):
    """A token of each of ``count`` sequences, out of two that aren't in the tile."""
    generator = torch.Generator().manual_seed(group)
    n, sequence = count + 2, torch.arange(count + 2)
    every = torch.cat([torch.tensor([0]), targets, torch.tensor([1])])
    rewards = torch.randint(2, (n, group), generator=generator).float()
    numbers = [torch.randn(n, generator=generator) * 0.1 for _ in range(4)]
    grouped = GroupRewards(rewards, sequence % group, method or "std", 1e-4, 0.5)
    signal = (numbers[1], None) if advantages else (None, grouped)
    more = (numbers[2] - 3, numbers[3] - 3, numbers[0].abs() + 0.5) if off_policy else (None, None, None)
    return TokenInputs(every, sequence, numbers[0].abs() + 0.1, *signal, *more)


def compare_rows(count, width, spare, tokens, options, *, dtype=None, every_option=False):
    logits_CV, _ = logits(count, width)
    rows = slice(1, count + 1)
    named = {"options": options, "gradient": True, "bias": None, "entropy_grad": 0.0}
    if every_option:
        named |= {"bias": torch.linspace(-1, 1, width), "entropy_grad": 0.01}
    transform = Transform(0.9, 1.1, 5.0 if every_option else None)
    expected = plain.grpo_rows_(logits_CV.clone(), rows, tokens, transform, **named)
    found = triton_rows.grpo_rows_(tile_of(logits_CV, spare), rows, tokens, transform, **named, dtype=dtype)
    for name, value in expected[0].items():
        torch.testing.assert_close(found[0][name].to(value.dtype), value, rtol=1e-4, atol=1e-4, msg=name)
    scaled = [(rows_CV.float() * factor_C[:, None]) for _, rows_CV, factor_C in (expected, found)]
    torch.testing.assert_close(scaled[1], scaled[0], rtol=1e-4, atol=2e-3 if dtype else 1e-5)


SHAPES = [(1, 37, 0), (3, 37, None), (2, 37, 5), (1, 16, 0), (2, 1, None), (1, 50257, 0), (2, 4097, 3)]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("count", "width", "spare"), SHAPES)
def test_rows_of_any_width(count, width, spare, dtype, guarded):
    for every_option in (False, True):
        _, targets = logits(count, width)
        given = tokens(count, 3, targets, off_policy=every_option, advantages=not every_option)
        loss = TokenLoss(delta=1.5, beta=0.1) if every_option else TokenLoss()
        compare_rows(count, width, spare, given, loss, dtype=dtype, every_option=every_option)
    assert guarded[1] == ["_grpo_rows_kernel"] * 2


@pytest.mark.parametrize("method", OWN_GROUP)
def test_every_normalisation_in_the_launch(method, guarded):
    for group in range(1, 8):
        compare_rows(2, 16, 0, tokens(2, group, logits(2, 16)[1], method=method), TokenLoss())
    assert guarded[1].count("_grpo_rows_kernel") == 7


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("count", "width", "spare"), SHAPES)
def test_softmax_and_gradient(count, width, spare, dtype, guarded):
    logits_CV, targets = logits(count, width)
    for entropy, bias in ((False, None), (True, torch.linspace(-1, 1, width))):
        upstream = torch.linspace(-1, 1, count), torch.linspace(1, 2, count) if entropy else None
        made = []
        for module, tile in ((plain, logits_CV.clone()), (triton_rows, tile_of(logits_CV, spare))):
            transform = Transform(0.9, 1.1, 5.0 if entropy else None)
            statistics = module.softmax_rows_(tile, targets, transform, bias=bias, entropy=entropy)
            arguments = (tile, targets, statistics, transform, *upstream)
            rows_CV, factor_C = module.logit_gradient_(*arguments, bias=bias, dtype=dtype)
            made.append((statistics, rows_CV.float() * factor_C[:, None]))
        torch.testing.assert_close(made[1][0], made[0][0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(made[1][1], made[0][1], rtol=1e-4, atol=2e-2 if dtype else 1e-4)
    assert guarded[1] == ["_softmax_rows_kernel", "_logit_gradient_kernel"] * 2


@pytest.mark.parametrize("method", IN_KERNEL)
def test_normalisation(method, guarded):
    for n_groups, n_generations in [(1, 1), (1, 7), (3, 2), (5, 3), (2, 5), (130, 7), (3, 1030)]:
        generator = torch.Generator().manual_seed(n_generations)
        rewards_PG = torch.randint(3, (n_groups, n_generations), generator=generator).float() / 2
        rewards_PG[0, -1] = float("nan")
        made = []
        for backend in ("torch", "triton"):
            with use_backend(backend):
                made.append(run(rewards_PG, method, statistics=True))
        torch.testing.assert_close(made[1], made[0], rtol=1e-4, atol=1e-4, equal_nan=True)
    assert set(guarded[1]) == {"_normalize_kernel"}


# ---- it can fail


@triton.jit
def _too_far_kernel(p_x, p_out, n, READ: tl.constexpr, WRITE: tl.constexpr, BEFORE: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o - BEFORE, mask=o < n + READ, other=0.0)
    tl.store(p_out + o, b_x, mask=o < n + WRITE)


@pytest.mark.parametrize(
    ("wrong", "what"),
    [({}, None), ({"READ": 1}, "a load at byte 148"), ({"WRITE": 1}, "a store at byte 148"), ({"BEFORE": 1}, "a load")],
    ids=["right", "read", "write", "before"],
)
def test_a_kernel_that_goes_too_far_is_caught(wrong, what, guarded):
    both = torch.arange(2 * 37.0)  # neighbours in memory: one number too far is one of the other's
    x, out = both[:37], both[37:]
    reach = {"READ": 0, "WRITE": 0, "BEFORE": 0, **wrong}
    with pytest.raises(Exception, match=what) if what else nullcontext() as caught:
        guarded[0](_too_far_kernel, (1,), x, out, 37, **reach, BLOCK=64)
    assert isinstance(caught.value.__cause__, OutOfBounds) if what else torch.equal(out, x)


@triton.jit
def _row_kernel(tile, p_out, FURTHER: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(p_out + o, tl.load(tile.products + o, mask=o < tile.n_padded + FURTHER, other=0.0))


def test_a_row_that_is_read_beyond_its_padding_is_caught(guarded):
    tile = _tile(tile_of(logits(2, 37)[0], 16), None, Transform())
    guarded[0](_row_kernel, (1,), tile, torch.empty(64), FURTHER=0, BLOCK=64)
    with pytest.raises(Exception, match="a load at byte 192"):
        guarded[0](_row_kernel, (1,), tile, torch.empty(64), FURTHER=1, BLOCK=64)


def test_padding_that_counts_is_seen(guarded, monkeypatch):
    """What is masked by value alone: without that, NaN."""
    tile, targets = tile_of(logits(2, 37)[0], 0), logits(2, 37)[1]
    monkeypatch.setattr(triton_rows, "_tile", lambda *args: _tile(*args)._replace(n_vocabulary=48))
    assert triton_rows.softmax_rows_(tile, targets, Transform()).logprob.isnan().all()


def test_a_gradient_in_another_rows_bytes_is_caught(guarded, monkeypatch):
    def shifted(*arguments):
        gradient = _gradient(*arguments)
        return gradient._replace(stride=gradient.stride + 1)

    monkeypatch.setattr(triton_rows, "_gradient", shifted)
    with pytest.raises(Exception, match="a store at byte"):
        compare_rows(3, 37, 5, tokens(3, 3, logits(3, 37)[1]), TokenLoss())
