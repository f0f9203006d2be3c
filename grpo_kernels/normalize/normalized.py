"""Defines the result of a normalisation.

Shapes: P prompts, G completions of one prompt, F reward functions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Normalized(NamedTuple):
    """The result of a normalisation, detached.

    Attributes:
        advantages: (P, G).
        centre, scale: (P,), or (P, F) if each reward function is normalised by itself. NaN if the method isn't affine
            in the reward (``rank``, a user's function).
    """

    advantages: torch.Tensor
    centre: torch.Tensor
    scale: torch.Tensor
