"""Gradients of several tiles that are kept and multiplied at once, as on a GPU: sizes, values, products, host reads."""

import math
from collections import Counter

import pytest
import torch
from guarded_memory import guard
from head_example import (
    EPS,
    OFF_POLICY,
    assert_gradients_no_worse,
    assert_no_worse,
    distance,
    example,
    gradients_of,
    ours,
    plain,
    token_arguments,
)
from hypothesis import given
from hypothesis import strategies as st
from kernel_inputs import BACKENDS
from poison import poisoned_memory
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_kernels import linear_grpo_loss, linear_logprob, use_backend
from grpo_kernels.backend import assume_native_half
from grpo_kernels.head import products, tiles
from grpo_kernels.head.rows import triton_rows

GPU = torch.device("cuda")
H, V, TILE = 32, 300, 16  # so that a window has at most 64 rows, in tiles of 16
INTERPRETED = BACKENDS[1].marks
SIZES = (1, 15, 16, 17, 33, 63, 64, 65, 129)


@pytest.fixture
def gpu_layout(monkeypatch):
    """The buffers and branches of a GPU on the CPU: float32 tiles of half operands, kept gradients, no free reads."""

    def multiply_into(out, a, b, *, add):
        product = a.float() @ b.float()  # rounded once
        out.copy_(out.float() + product if add else product)

    monkeypatch.setitem(tiles.KEPT_BYTES, "cpu", 1 << 30)
    monkeypatch.setitem(tiles.MAX_TILE_ROWS, "cpu", TILE)
    monkeypatch.setattr(products, "keeps_float32", lambda device: True)
    monkeypatch.setattr(products, "reads_are_free", lambda device: False)
    monkeypatch.setattr(products, "_multiply_into", multiply_into)
    with assume_native_half(True):
        yield


class Counted(TorchDispatchMode):
    """Counts products by the shape of their result, and reads of a tensor's values, which wait for a GPU."""

    def __enter__(self):
        self.products, self.reads, self.tolist = Counter(), 0, torch.Tensor.tolist

        def tolist(tensor):
            self.reads += 1
            return self.tolist(tensor)

        torch.Tensor.tolist = tolist
        return super().__enter__()

    def __exit__(self, *error):
        torch.Tensor.tolist = self.tolist
        super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm"):
            self.products[tuple(made.shape)] += 1
        masks = args[1] if name in ("index", "index_put_") else ()
        masked = any(mask is not None and mask.dtype == torch.bool for mask in masks)
        self.reads += masked or name in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")
        return made


def signature(value):
    """What Triton compiles a kernel for: dtypes, alignment, and which numbers are 1 or divide by 16."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16
    if isinstance(value, tuple):
        return tuple(map(signature, value))
    return (value == 1, value % 16 == 0) if type(value) is int else type(value)


@pytest.fixture
def launches(monkeypatch):
    """The signatures of all launches of the row kernels, in order."""
    found, launch = [], triton_rows.launch

    def counting(kernel, grid, *arguments, **options):
        found.append((kernel.fn.__name__, *map(signature, arguments), *sorted(options.items())))
        launch(kernel, grid, *arguments, **options)

    monkeypatch.setattr(triton_rows, "launch", counting)
    return found


@given(st.integers(0, 5000), st.integers(1, 40), st.integers(0, 64))
def test_rows_are_split_into_as_few_nearly_equal_tiles_as_possible(count, most, start):
    most, start = 16 * most, 16 * start
    ranges = list(tiles.split(count, most, start))
    sizes = [end - begin for begin, end in ranges]
    assert len(ranges) == math.ceil(count / most) and sum(sizes) == count
    assert [begin for begin, _ in ranges] == [start, *(end for _, end in ranges)][: len(ranges)]
    assert all(begin % 16 == 0 for begin, _ in ranges) and all(0 < size <= most for size in sizes)
    assert not sizes or max(sizes) - min(sizes) < 32


@pytest.mark.parametrize(
    ("count", "sizes"), [(0, []), (1, [1]), (511, [511]), (512, [512]), (513, [256, 257]), (1025, [336, 352, 337])]
)
def test_no_tile_of_one_row_beyond_a_boundary(count, sizes):
    assert [end - begin for begin, end in tiles.split(count, 512)] == sizes


@pytest.mark.parametrize("hidden_size, vocabulary", [(576, 49152), (896, 151936), (4096, 151936), (8192, 128256)])
@pytest.mark.parametrize("n", [1, 512, 4096, 4097, 8191, 8192, 8193, 20000])
def test_tile_and_kept_gradients_take_at_most_3_5_gib(n, hidden_size, vocabulary):
    most_tile = tiles.most_tile_rows(vocabulary, 4, GPU)
    plan = tiles.plan_tiles(n, n, most_tile, tiles.most_kept_rows(hidden_size, vocabulary, 2, GPU))
    assert vocabulary * (4 * plan.tile_rows + 2 * plan.kept_rows) <= 3.5 * 2**30
    if (n, hidden_size) == (8192, 4096):
        assert plan.windows == [[(0, 2048), (2048, 4096), (4096, 6144), (6144, 8192)]]


@pytest.mark.parametrize(
    ("dtype", "backend", "n"),
    # the interpreter truncates to bfloat16, where a GPU rounds
    [(dtype, "torch", n) for dtype in (torch.bfloat16, torch.float16) for n in SIZES]
    + [pytest.param(torch.float16, "triton", n, marks=INTERPRETED) for n in (1, 17, 65)],
)
@pytest.mark.parametrize("options", [{}, OFF_POLICY["all"]], ids=["clip", "all"])
@pytest.mark.parametrize("float32_logits", [True, False])
def test_kept_gradients_are_no_worse_than_plain_torchs(dtype, backend, n, options, float32_logits, gpu_layout):
    """On policy and off; sequences without an advantage among the rows. Off policy, a token whose rounded ratio is on
    the other side of a bound decides the error of half logits: that takes many seeds, below."""
    for off_policy in (False, True) if float32_logits else (False,):
        tensors, data = example(n=n, h=H, v=V, b=min(n, 5), dtype=dtype, scale=0.5)
        head = {"float32_logits": float32_logits}
        with use_backend(backend):
            out = ours(tensors, data, options, head, off_policy=off_policy)
            got = gradients_of(out.loss, tensors)
            with poisoned_memory():
                again = ours(tensors, data, options, head, off_policy=off_policy)
                torch.testing.assert_close(gradients_of(again.loss, tensors), got, rtol=0, atol=0)
        same, truth = (
            plain(tensors, data, options, dtype=one, off_policy=off_policy) for one in (dtype, torch.float64)
        )
        assert_gradients_no_worse(got, same, truth, EPS[dtype])
        for name in ("logprobs", "entropies"):
            assert_no_worse(*(getattr(one, name) for one in (out, same, truth)), EPS[dtype], name, slack=1.0)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("float32_logits", [True, False])
def test_kept_gradients_of_logprobs(n, dtype, float32_logits, gpu_layout):
    tensors, data = example(n=n, h=H, v=V, b=min(n, 5), dtype=dtype, scale=0.5)
    upstream = data["advantages"][data["sequence"]]

    def gradients(dtype, function):
        given = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in tensors.items()}
        return gradients_of((function(given).double() * upstream).sum(), given)

    def with_all_logits(given):
        logits = given["hidden"] @ given["weight"].T + given["bias"]
        return logits.log_softmax(-1).gather(1, data["targets"][:, None])[:, 0]

    def fused(given):
        return linear_logprob(*token_arguments(given, data)[:3], bias=given["bias"], float32_logits=float32_logits)

    got = gradients(dtype, fused)
    same, truth = gradients(dtype, with_all_logits), gradients(torch.float64, with_all_logits)
    for name, gradient in got.items():
        error, allowed = ((one.double() - truth[name]).norm() for one in (gradient, same[name]))
        assert error <= 2 * allowed + 4 * EPS[dtype] * truth[name].norm(), name


@pytest.mark.parametrize("n, windows", [(16, 1), (17, 1), (64, 1), (65, 2), (129, 3)])
def test_one_product_for_the_weight_a_window(n, windows, gpu_layout):
    tensors, data = example(n=n, h=H, v=V, b=1, dtype=torch.float16)
    del tensors["bias"]
    with Counted() as counted:
        ours(tensors, data, off_policy=False)
    assert counted.products[V, H] == windows
    assert counted.products[n, H] + sum(counted.products[rows, H] for rows in range(n)) == windows
    assert sum(count for shape, count in counted.products.items() if shape[1] == V) == math.ceil(n / TILE)


def run(n, backend, *, off_policy=False, frozen=False, b=5):
    """A call on float16 inputs, where one of 5 sequences has no advantage. Returns what was counted."""
    tensors, data = example(n=n, h=H, v=V, b=b, dtype=torch.float16)
    data = {name: value.float() if value.is_floating_point() else value for name, value in data.items()}
    given = {"old_logprobs_N": data["old"]} if off_policy else {}
    arguments = (*token_arguments(tensors, data), data["advantages"], data["weights"])
    tensors["weight"].requires_grad_(not frozen)
    with use_backend(backend), Counted() as counted:
        linear_grpo_loss(*arguments, **given)
    return counted


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_host_reads_do_not_grow_with_tiles(off_policy, backend, gpu_layout):
    """One read checks all values, and one says how many rows have a gradient."""
    assert [run(n, backend, off_policy=off_policy).reads for n in (16, 65)] == [2, 2]


def test_the_counter_sees_reads_of_rows_that_are_dropped(gpu_layout, monkeypatch):
    """The test above can fail: a CPU drops clipped rows, which takes three reads a window."""
    monkeypatch.setattr(products, "reads_are_free", lambda device: True)
    monkeypatch.setitem(tiles.KEPT_BYTES, "cpu", 0)
    assert run(129, "torch", off_policy=True).reads > run(16, "torch", off_policy=True).reads > 2


@pytest.mark.skipif(*INTERPRETED[0].args, **INTERPRETED[0].kwargs)
@pytest.mark.parametrize("frozen", [False, True])
def test_at_most_12_launches_of_a_call_in_four_tiles(frozen, gpu_layout, launches):
    """As many tiles as 8192 tokens of an 8 B model have on a GPU: products of both kinds, and row kernels."""
    plan = tiles.plan_tiles(8192, 8192, tiles.most_tile_rows(151936, 4, GPU), 8192 if not frozen else 0)
    assert len([tile for window in plan.windows for tile in window]) == 4
    counted = run(64, "triton", frozen=frozen, b=1)
    assert counted.products.total() + len(launches) == (12 if frozen else 10)


@pytest.mark.skipif(*INTERPRETED[0].args, **INTERPRETED[0].kwargs)
@pytest.mark.parametrize("off_policy", [False, True])
def test_two_compilations_of_the_row_kernel(off_policy, gpu_layout, launches):
    """Triton compiles one kernel for rows with a gradient and one for the others, for any number of rows."""
    for n in (17, 47, 83):
        run(n, "triton", off_policy=off_policy)
    assert len(launches) > 10 and len(set(launches)) == 2


@pytest.mark.skipif(*INTERPRETED[0].args, **INTERPRETED[0].kwargs)
@pytest.mark.parametrize("n", [17, 33, 65])
def test_kernels_write_nothing_beside_the_kept_rows(n, gpu_layout, monkeypatch):
    _, names = guard(monkeypatch)
    run(n, "triton")
    assert len(names) == sum(1 for _ in tiles.split(n, TILE))


@pytest.mark.parametrize("scale", [0.1, 1.0])
@pytest.mark.parametrize("options", [{}, OFF_POLICY["all"]], ids=["clip", "all"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_logits_with_float32_statistics(dtype, options, scale, gpu_layout):
    """On policy, of logits of up to 30 nats: log-probs, entropies and gradients are at least as exact as plain
    torch's, which are half precision throughout. Float16 can't hold what a sure token leaves of the others' shares."""
    tensors, data = example(n=96, h=64, v=3000, b=5, dtype=dtype, scale=scale)
    same, truth = (plain(tensors, data, options, dtype=one, off_policy=False) for one in (dtype, torch.float64))
    with use_backend("torch"):
        out = ours(tensors, data, options, {"float32_logits": False}, off_policy=False)
    assert_gradients_no_worse(gradients_of(out.loss, tensors), same, truth, EPS[dtype], slack=1.1)
    for name in ("logprobs", "entropies"):
        assert distance(getattr(out, name), getattr(truth, name)) <= distance(getattr(same, name), getattr(truth, name))


def test_half_logits_off_policy(gpu_layout):
    """Over many seeds, because single tokens are clipped in one of them and not in the other."""
    squares = Counter()
    for seed in range(20):
        tensors, data = example(n=64, h=H, v=V, b=5, dtype=torch.bfloat16, scale=0.5, seed=seed)
        same, truth = (plain(tensors, data, OFF_POLICY["all"], dtype=one) for one in (torch.bfloat16, torch.float64))
        with use_backend("torch"):
            out = ours(tensors, data, OFF_POLICY["all"], {"float32_logits": False})
        for name, gradient in gradients_of(out.loss, tensors).items():
            squares["ours", name] += distance(gradient, truth.gradients[name]) ** 2
            squares["plain", name] += distance(same.gradients[name], truth.gradients[name]) ** 2
    assert all(squares["ours", name] <= squares["plain", name] for name in tensors)
