"""What the fused head should take on a GPU: a prediction from operations and bytes, nothing measured here.

    python benchmarks/roofline.py [--tokens 8192 --vocabulary 151936 --hidden 4096]

Half-precision operands, a float32 tile, gradients of hidden states and (trainable) of the head.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from grpo_kernels.head.products import tile_rows

# measured on one H100 by others: dense bfloat16 products, and copies of large buffers
FLOPS = 798e12
BANDWIDTH = 3.0e12
# TRL issue 7244, at 8192 tokens, V 151936, H 4096: cited, not predicted
CITED = (
    ("the bare products", "42 ms"),
    ("log-probs and entropies on ready logits, forward, as GRPO takes them", "12.8 ms, fused 0.89 ms"),
    ("the chunked loss of TRL's SFT trainer, which isn't GRPO's", "167 ms"),
)
ASSUMPTIONS = f"""\
Assumptions:
- {FLOPS / 1e12:.0f} TFLOP/s for every product and {BANDWIDTH / 1e12:.1f} TB/s for every byte, as measured on one H100;
  launches, the host and what is of size N or N x H cost nothing; clipping drops no rows.
- products: 2 N V H for the logits, 2 f N V H for dL/dhidden, and 2 f N V H for dL/dW of a trainable head, where f is
  the share of tokens with a gradient, known before the logits are.
- rows: the row kernels read each float32 logit to sum it up, read it again if it has a gradient, and write that in
  2 bytes; they are bound by those bytes, not by their instructions (compile_ahead.py counts 17 and 18 an element, at
  most 1.5 ms of 132 x 128 lanes at 1.7 GHz for all tokens of the default shape).
- operands: the products write 4 bytes a logit, read 2 bytes of each gradient once (frozen) or twice, and the weight
  once a tile; the float32 sum of dL/dW is written by the first tile, read and written by the others (one tile alone
  writes 2 bytes).
- finish: the sum of dL/dW is scaled and cast to the weight's dtype in one pass.
- in turn: the four times added; overlapped: the operands' bytes move while the products compute, if they are fewer."""


@dataclass(frozen=True)
class Prediction:
    """Seconds on a GPU, of each part; which part counts what is in ``ASSUMPTIONS``."""

    products: float
    rows: float
    operands: float
    finish: float

    @property
    def in_turn(self) -> float:
        return self.products + self.operands + self.rows + self.finish

    @property
    def overlapped(self) -> float:
        return max(self.products, self.operands) + self.rows + self.finish


def predict(
    n_tokens: int,
    n_vocabulary: int,
    hidden: int,
    *,
    live: float = 1.0,
    trainable: bool = True,
    rows_per_tile: int | None = None,
    flops: float = FLOPS,
    bandwidth: float = BANDWIDTH,
) -> Prediction:
    """The time of loss and gradients of ``n_tokens``, a share ``live`` of which has a gradient.

    ``rows_per_tile``: as many as the head would take on a GPU. ``flops`` in 1/s, ``bandwidth`` in bytes/s.
    """
    if not 0 <= live <= 1:
        raise ValueError(f"live={live!r} must be a share in [0, 1]")
    step = rows_per_tile or tile_rows(n_vocabulary, torch.float32.itemsize, torch.device("cuda"))
    n_live = round(live * n_tokens)
    live_tiles, other_tiles = -(-n_live // step), -(-(n_tokens - n_live) // step)
    gradients = 2 if trainable else 1
    weight = n_vocabulary * hidden

    products = 2 * weight * (n_tokens + gradients * n_live)
    rows = n_vocabulary * (4 * n_tokens + (4 + 2) * n_live)
    operands = n_vocabulary * (4 * n_tokens + 2 * gradients * n_live) + 2 * weight * (2 * live_tiles + other_tiles)
    finish = 0
    if trainable and live_tiles == 1:
        operands += 2 * weight
        finish = (2 + 2) * weight
    elif trainable and live_tiles:
        operands += 4 * weight * (2 * live_tiles - 1)
        finish = (4 + 2) * weight
    return Prediction(products / flops, rows / bandwidth, operands / bandwidth, finish / bandwidth)


def lines(n_tokens: int, n_vocabulary: int, hidden: int) -> Iterator[str]:
    """The table, its assumptions, and the cited figures."""
    step = tile_rows(n_vocabulary, torch.float32.itemsize, torch.device("cuda"))
    yield f"PREDICTION, not a measurement: one H100, {n_tokens} tokens, V {n_vocabulary}, H {hidden}, in ms"
    yield f"(tiles of {step} rows)"
    yield (
        f"{'head':10} {'live f':>6} {'products':>9} {'rows':>6} {'operands':>9} {'finish':>7} "
        f"{'in turn':>8} {'overlapped':>11}"
    )
    for trainable in (True, False):
        for live in (1.0, 0.5, 0.1):
            time = predict(n_tokens, n_vocabulary, hidden, live=live, trainable=trainable)
            columns = zip(
                (time.products, time.rows, time.operands, time.finish, time.in_turn, time.overlapped),
                (9, 6, 9, 7, 8, 11),
                strict=True,
            )
            numbers = " ".join(f"{seconds * 1e3:{width}.1f}" for seconds, width in columns)
            yield f"{'trainable' if trainable else 'frozen':10} {live:6} {numbers}"
    yield ASSUMPTIONS
    yield "Cited beside it (TRL issue 7244: 8192 tokens, V 151936, H 4096):"
    for name, time_cited in CITED:
        yield f"  {name}: {time_cited}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Predicts; measures nothing.")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=4096)
    arguments = parser.parse_args()
    print("\n".join(lines(arguments.tokens, arguments.vocabulary, arguments.hidden)))


if __name__ == "__main__":
    main()
