"""What a normalisation returns.

Shapes: P prompts, G completions of one prompt, F reward functions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Normalized(NamedTuple):
    """Advantages (P, G), and the centre and scale of each group they were made with, (P,) or (P, F), detached.

    Where the method isn't affine in the reward (``rank``, a function of the user's) centre and scale are NaN; where
    each reward function is normalised by itself they have a column for each.
    """

    advantages: torch.Tensor
    centre: torch.Tensor
    scale: torch.Tensor
