"""Defines the arguments of the Triton kernels in ``triton_rows.py``, as named tuples.

A launcher fills a tuple with tensors and numbers, and the kernel gets pointers and scalars. A field that is None is
known at compile time, so code that would read it isn't compiled.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Tile(NamedTuple):
    """C rows of products, and how they become logits.

    The order of the fields is the order of the kernel's parameters, on which ptxas's use of registers depends: with
    transform before n_padded and n_vocabulary, _grpo_rows_kernel takes up to 8 registers more.
    """

    products: Any  # (C, V)
    stride: Any
    bias: Any  # (n_padded,) or None
    n_padded: Any  # columns up to which a row may be read
    n_vocabulary: Any
    transform: Any  # a Transform


class Gradient(NamedTuple):
    """dL/dy divided by a factor of each row. It may share the tile's memory."""

    rows: Any  # (C, V)
    stride: Any
    factor: Any  # (C,)


class Logs(NamedTuple):
    """Values to log of each row, (C,) each."""

    logprob: Any
    entropy: Any
    loss: Any
    ratio: Any
    clipped: Any
    kl: Any
    advantage: Any
