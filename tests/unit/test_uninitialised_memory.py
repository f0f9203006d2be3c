"""No result depends on what lies in memory that nobody wrote: every buffer is NaN before each call."""

from functools import partial

import pytest
import torch
from kernel_inputs import BACKENDS
from normalize_example import IN_KERNEL, run
from poison import poisoned_memory

from grpo_kernels import linear_grpo_loss, linear_logprob, use_backend
from grpo_kernels.backend import assume_native_half
from grpo_kernels.head import products, tiles
from grpo_kernels.interference.gradient_sketch import GradientSketch
from trl_ext.sharing import attention
from trl_ext.sharing.packed_rows import pack

VOCABULARIES = (1, 3, 17, 31, 33, 35, 49, 63, 64, 65, 67, 81, 89, 95, 97, 8192 + 17)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def head(dtype, n_vocabulary, *, trainable, low_rank, entropy, count=33):
    """All that both functions of the head return, and every gradient."""
    torch.manual_seed(n_vocabulary)
    hidden = torch.randn(count, 24).to(dtype).requires_grad_()
    weight = (torch.randn(n_vocabulary, 24) / 5).to(dtype).requires_grad_(trainable)
    low = tuple(torch.randn(n, 3).to(dtype).requires_grad_() for n in (count, n_vocabulary)) if low_rank else None
    targets, sequence = torch.randint(0, n_vocabulary, (count,)), torch.arange(count) % 4
    advantages = torch.tensor([1.0, 0.0, -1.0, 0.5])
    options = {"old_logprobs_N": -torch.rand(count), "entropy_coef": 0.1 if entropy else 0.0, "low_rank": low}
    loss = linear_grpo_loss(hidden, weight, targets, sequence, advantages, torch.full((4,), 1 / count), **options)
    logprobs, entropies = linear_logprob(hidden, weight, targets, entropy=True, low_rank=low)
    (loss.loss + (logprobs * advantages[sequence]).sum() + (entropies.square().sum() if entropy else 0.0)).backward()
    tensors = (hidden, weight, *(low or ()))
    return [loss.loss, loss.logprobs, logprobs, entropies, *(x.grad for x in tensors if x.grad is not None)]


def assert_memory_does_not_matter(call):
    """``call`` returns the same finite tensors with and without NaN in what it leaves uninitialised."""
    clean = call()
    with poisoned_memory():
        poisoned = call()
    assert clean and all(tensor.isfinite().all() for tensor in clean)
    torch.testing.assert_close(poisoned, clean, rtol=0, atol=0)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("native", [True, False], ids=["products in half", "products in float32"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_head_reads_nothing_that_it_did_not_write(dtype, native, threads, monkeypatch):
    """Also of a width that an earlier call of another dtype left its bits in: oneDNN's bfloat16 product on AMX reads
    beyond a row's end, and 0 times what it finds there was NaN where V isn't a multiple of 4."""
    if threads == 2:  # and of several tiles
        monkeypatch.setitem(tiles.MAX_TILE_ROWS, "cpu", 16)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for n_vocabulary in VOCABULARIES:
            for trainable, low_rank, entropy in ((True, False, False), (False, False, False), (True, True, True)):
                options = {"trainable": trainable, "low_rank": low_rank, "entropy": entropy}
                with assume_native_half(native):
                    assert_memory_does_not_matter(partial(head, dtype, n_vocabulary, **options))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_interpreted_kernels_read_nothing_that_they_did_not_write(dtype):
    for n_vocabulary in (1, 17, 35, 64):
        options = {"trainable": True, "low_rank": False, "entropy": True, "count": 5}
        with use_backend("triton"):
            assert_memory_does_not_matter(partial(head, dtype, n_vocabulary, **options))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_padding_of_a_tile_is_zero_in_poisoned_memory(dtype):
    """The helper finds what it is for: without the head's zeros a row's padding would be NaN."""
    with poisoned_memory():
        factors = [(torch.randn(20, 8).to(dtype), torch.randn(35, 8).to(dtype))]
        made = products.HeadProducts(factors, dtype, want_inputs=[True], want_weights=[True])
        tile = made.logits(slice(0, 20))
        padded = tile.as_strided((20, 48), (tile.stride(0), 1))
        assert tile.stride(0) == 48 and (padded[:, 35:] == 0).all() and padded[:, :35].isfinite().all()
        assert products.workspace((2, 3), dtype, torch.device("cpu")).isnan().all()
        assert torch.empty(3).isnan().all() and torch.randn(2).new_empty(3).isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", IN_KERNEL)
def test_normalisation(backend, method):
    rewards = torch.rand(5, 7)
    rewards[1, 2], rewards[2] = torch.nan, 0.5
    with use_backend(backend):
        assert_memory_does_not_matter(lambda: [run(rewards, method)])


@pytest.mark.parametrize("dim", [0, 8])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_sketches(dim, dtype):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(37, 20), torch.nn.Linear(20, 35), torch.nn.Linear(35, 5)).to(dtype)
    ids = torch.randint(0, 37, (6, 9))

    def sketch():
        taps = GradientSketch(model, dim)
        with taps.step(seed=1) as recorded, taps.rows(torch.arange(6) // 2):
            model(ids).float().square().sum().backward()
        return [recorded[0].sketch]

    assert_memory_does_not_matter(sketch)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_packed_attention(dtype):
    torch.manual_seed(0)
    ids = torch.randint(1, 50, (5, 14))
    ids[1:3, :6] = ids[0, :6]
    mask = torch.ones_like(ids)
    mask[1, 9:] = mask[2, 12:] = mask[3, :3] = mask[4, 7:] = 0
    rows = pack(ids, mask, 6)
    count = len(rows.token_S)
    made = [torch.randn(1, heads, count, 5).to(dtype) for heads in (4, 2, 2)]

    def attend():
        given = [x.clone().requires_grad_() for x in made]
        out = attention.InParts.apply(*given, rows.spans(), 0.4)
        out.float().square().sum().backward()
        return [out, *(x.grad for x in given)]

    assert_memory_does_not_matter(attend)
