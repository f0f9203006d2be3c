"""Assigns layers to eight parts of a language model by their names, to show where in the model prompts interfere.

The parts are attention and MLP by thirds of the depth, norms, and embedding with head (whose weights may be tied).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from .metrics import cosines

THIRDS = ("early", "middle", "late")
PARTS_OF_MODEL = (*(f"{kind}_{third}" for kind in ("attention", "mlp") for third in THIRDS), "norms", "embedding_head")
_BLOCK = re.compile(r"(?:^|\.)(\d+)\.")
_ATTENTION = re.compile(r"attn|attention|(?:^|\.)[qkvo]_proj|c_attn|query_key_value")


def block_of(name: str) -> int | None:
    """Returns the number of a layer's block, the first number in its name; None for a layer outside all blocks."""
    found = _BLOCK.search(name)
    return None if found is None else int(found.group(1))


def part_of(name: str, kind: str, n_blocks: int) -> str:
    """Returns the layer's part, one of ``PARTS_OF_MODEL``.

    Experts and the mixers of state-space models belong to the MLPs. A layer outside all blocks belongs to the last
    third.

    Args:
        name, kind: as in ``layer_taps.Layer``.
        n_blocks: number of blocks of the model.
    """
    if kind in ("embedding", "head"):
        return "embedding_head"
    if kind == "norm":
        return "norms"
    block = block_of(name)
    third = THIRDS[-1 if block is None or n_blocks == 0 else min(2, 3 * block // n_blocks)]
    return f"{'attention' if _ATTENTION.search(name) else 'mlp'}_{third}"


def part_metrics(grams_PP: Mapping[str, torch.Tensor], errors: Mapping[str, float]) -> dict[str, float]:
    """Returns the metrics of each part of the model, under ``parts/<part>/``.

    * ``share``: the part's share of the prompts' summed squared gradients.
    * ``cos_mean``, ``cos_abs_mean``: over pairs of prompts that have a gradient in the part.
    * ``sketch_rmse``: the error of one of these cosines.

    Args:
        grams_PP: by part, (P, P) inner products of the prompts' gradients in it.
        errors: by part, the error of one cosine.
    """
    total = sum(float(gram_PP.diagonal().sum()) for gram_PP in grams_PP.values())
    metrics: dict[str, float] = {}
    if total <= 0:
        return metrics
    for part, gram_PP in grams_PP.items():
        square_P = gram_PP.diagonal()
        metrics[f"parts/{part}/share"] = float(square_P.sum()) / total
        live_P = square_P > 0
        if int(live_P.sum()) < 2:
            continue
        cosine_N = cosines(gram_PP, live_P)
        metrics[f"parts/{part}/cos_mean"] = float(cosine_N.mean())
        metrics[f"parts/{part}/cos_abs_mean"] = float(cosine_N.abs().mean())
        metrics[f"parts/{part}/sketch_rmse"] = errors[part]
    return metrics
