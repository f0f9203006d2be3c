"""A product whose epilogue computes each row's softmax statistics: a candidate for the head, not used by it.

The head multiplies with cuBLAS, and its row pass then reads each tile of logits twice: for the log-sum-exp and
entropy, and for the gradient. Here a persistent Triton product also writes, for each block of the vocabulary, the
largest logit z, ``sum exp(z - high)`` and ``sum exp(z - high) (z - high)``, from float32 sums before they are rounded.
A small second step merges the blocks. This saves one of the two readings.

    python benchmarks/epilogue_product.py    (prints what the compiler makes of it for GPUs that aren't here)

Shapes: N tokens, H hidden, V vocabulary, J blocks of the vocabulary.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import triton
import triton.language as tl

from grpo_kernels.head.rows.plain import RowStatistics

SIZES = {"BLOCK_N": 128, "BLOCK_V": 128, "BLOCK_H": 64, "GROUP": 8}
CONFIGS = [
    triton.Config({**SIZES, "BLOCK_V": 256}, num_warps=8, num_stages=3),
    triton.Config(SIZES, num_warps=8, num_stages=4),
    triton.Config(SIZES, num_warps=8, num_stages=2),  # fits into the 64 KiB of an MI300
]
NARROWEST = min(config.kwargs["BLOCK_V"] for config in CONFIGS)  # workspaces have room for so many blocks


@triton.jit
def _product_kernel(
    p_hidden,
    p_weight,
    p_logits,
    p_high,
    p_total,
    p_moment,
    n_rows,
    n_vocabulary,
    n_hidden,
    stride_logits,
    n_blocks,  # columns of the statistics
    N_PROGRAMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
):
    row_blocks = tl.cdiv(n_rows, BLOCK_N)
    column_blocks = tl.cdiv(n_vocabulary, BLOCK_V)
    for i_tile in tl.range(tl.program_id(0), row_blocks * column_blocks, N_PROGRAMS):
        # GROUP row blocks for each column block in turn, so that programs that run together share both operands
        i_group = i_tile // (GROUP * column_blocks)
        size = tl.minimum(row_blocks - i_group * GROUP, GROUP)
        i_n = i_group * GROUP + i_tile % (GROUP * column_blocks) % size
        i_v = i_tile % (GROUP * column_blocks) // size
        o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
        o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
        o_row = (o_n % n_rows).to(tl.int64)  # rows beyond the last repeat the first ones, and aren't stored
        o_word = (o_v % n_vocabulary).to(tl.int64)
        b_z = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        for i_h in range(0, n_hidden, BLOCK_H):
            o_h = i_h + tl.arange(0, BLOCK_H)
            m_h = o_h < n_hidden
            b_hidden = tl.load(p_hidden + o_row[:, None] * n_hidden + o_h[None, :], mask=m_h[None, :], other=0.0)
            b_weight = tl.load(p_weight + o_word[:, None] * n_hidden + o_h[None, :], mask=m_h[None, :], other=0.0)
            b_z = tl.dot(b_hidden, tl.trans(b_weight), b_z)
        m_n = o_n < n_rows
        m_v = o_v < n_vocabulary
        p_tile = p_logits + o_row[:, None] * stride_logits + o_v[None, :]
        tl.store(p_tile, b_z.to(p_logits.dtype.element_ty), mask=m_n[:, None] & m_v[None, :])
        b_z = tl.where(m_v[None, :], b_z, -1e30)
        b_high = tl.max(b_z, axis=1)
        b_d = b_z - b_high[:, None]
        b_e = tl.where(m_v[None, :], tl.exp(b_d), 0.0)
        o_block = o_row * n_blocks + i_v
        tl.store(p_high + o_block, b_high, mask=m_n)
        tl.store(p_total + o_block, tl.sum(b_e, axis=1), mask=m_n)
        tl.store(p_moment + o_block, tl.sum(b_e * b_d, axis=1), mask=m_n)


# a configuration of wide blocks, run after one of narrow blocks, must not find that one's sums
product_kernel: Any = triton.autotune(
    CONFIGS, key=["n_rows", "n_vocabulary", "n_hidden"], reset_to_zero=["p_total", "p_moment"]
)(_product_kernel)


def logits_with_statistics(
    hidden_NH: torch.Tensor, weight_VH: torch.Tensor, targets_N: torch.Tensor, out_NV: torch.Tensor, kernel: Any = None
) -> RowStatistics:
    """Writes the logits to ``out_NV`` (its rows may be padded), and returns their statistics, (N,) each in float32.

    The same in plain torch: ``z = hidden @ weight.T``, then the row's maximum, ``(z - max).exp().sum(1).log()``, the
    target's log-prob and the entropy.

    Args:
        kernel: called as ``kernel[grid](...)`` with the block sizes bound; None: the autotuned one.
    """
    (n_rows, n_hidden), n_vocabulary = hidden_NH.shape, len(weight_VH)
    n_blocks = triton.cdiv(n_vocabulary, NARROWEST)
    high_NJ = hidden_NH.new_full((n_rows, n_blocks), -1e30, dtype=torch.float32)
    total_NJ, moment_NJ = hidden_NH.new_zeros((2, n_rows, n_blocks), dtype=torch.float32)
    programs = torch.cuda.get_device_properties(hidden_NH.device).multi_processor_count if hidden_NH.is_cuda else 3
    sizes = (n_rows, n_vocabulary, n_hidden, out_NV.stride(0), n_blocks)
    outputs = (out_NV, high_NJ, total_NJ, moment_NJ)
    (kernel or product_kernel)[(programs,)](hidden_NH.contiguous(), weight_VH.contiguous(), *outputs, *sizes, programs)
    high_N = high_NJ.amax(1)
    shift_NJ = high_NJ - high_N[:, None]
    scale_NJ = shift_NJ.exp()
    total_N = (total_NJ * scale_NJ).sum(1)
    moment_N = (scale_NJ * (moment_NJ + shift_NJ * total_NJ)).sum(1)
    log_total_N = total_N.log()
    target_N = out_NV.gather(1, targets_N[:, None])[:, 0].float()
    logprob_N = (target_N - high_N) - log_total_N
    return RowStatistics(high_N, log_total_N, logprob_N, log_total_N - moment_N / total_N)


def main() -> None:
    """Prints registers, spilled bytes (AMD: registers) and shared memory of each configuration on each target."""
    from compile_ahead import TARGETS, compile_launch, resources

    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    if not hasattr(_product_kernel, "signature"):
        raise SystemExit("TRITON_INTERPRET=1 runs kernels in Python and compiles none: set TRITON_INTERPRET=0")
    half, sums = torch.zeros(16, dtype=torch.bfloat16), torch.zeros(16)
    arguments = (half, half, half, sums, sums, sums, 8192, 151936, 4096, 151936, 1187, 132)
    for name, target in TARGETS.items():
        for config in CONFIGS:
            compiled = compile_launch(_product_kernel, arguments, config.all_kwargs(), target)
            registers, spills, _ = resources(compiled, target)
            block = "x".join(str(config.kwargs[size]) for size in ("BLOCK_N", "BLOCK_V", "BLOCK_H"))
            used = f"{registers:>4} {spills:>5} {compiled.metadata.shared:>7}"
            print(f"{name:7} {block:11} stages {config.num_stages}  {used}")


if __name__ == "__main__":
    main()
