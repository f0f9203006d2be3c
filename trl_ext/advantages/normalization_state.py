"""What a normalisation remembers from step to step: running variance, measured curvature, the theorem's constant C.

Shapes: P prompts, G completions of one prompt.

Each kind observes the gathered rewards of a generation batch, and hands ``normalize_rewards`` the entry of ``context``
that it needs. All are functions of gathered numbers alone, so every process holds the same; ``state_dict`` is saved in
the checkpoint's ``trainer_state.json``, where floats are written so that they are read back bit for bit.

What is measured while training (by the interference logging, or by your own callback) comes in by
``observe_curvature``. A kind that has no use for it lets it pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from grpo_kernels import METHODS
from grpo_kernels.normalize.group_statistics import masked_statistics
from grpo_kernels.normalize.std_rule import std_exponent

# a curvature below this share of the mean curvature divides by that share: a quotient stays bounded
CURVATURE_FLOOR = 0.1
ROUNDING = 1e-6  # of a weighted sum of rewards that is to be at most 1


def moving_average(previous: float | None, value: float, decay: float) -> float:
    """``decay * previous + (1 - decay) * value``; the value where there is no previous one."""
    return value if previous is None else decay * previous + (1 - decay) * value


class NormalizationState:
    """Remembers nothing: for the methods that need no state. Also the interface of those that do."""

    not_ready = ""  # when and why the method is no more than ``std``, as the end of a sentence

    def __init__(self, decay: float = 0.9) -> None:
        self.decay = decay

    def observe_rewards(self, rewards_PG: torch.Tensor) -> None:
        """The rewards of a new training batch, of all processes, NaN where unscorable."""

    def observe_curvature(self, prompt_id_P: torch.Tensor, curvature_P: torch.Tensor) -> None:
        """Measured curvatures of some prompts of the latest batch: their ``prompt_id`` and one number each."""

    @property
    def ready(self) -> bool:
        """Whether what the method needs is known."""
        return True

    def context(self, rewards_PG: torch.Tensor) -> dict[str, Any]:
        """The entries of ``normalize_rewards``'s context for these rewards."""
        return {}

    def metrics(self) -> dict[str, float]:
        """What is logged of the state, under ``normalization/``."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what ``state_dict`` returned."""


class RunningVariance(NormalizationState):
    """``running_std``: a moving average of the mean group variance, 0 for an all-equal group, as Adam's second moment.

    v <- decay v + (1 - decay) (mean over the groups of their sample variance), starting from the first batch's, and
    the current batch is in it before it is used: so no group's std is more than sqrt(P / (1 - decay)) times the scale.
    """

    def __init__(self, decay: float = 0.9) -> None:
        super().__init__(decay)
        self.variance: float | None = None

    def _batch_variance(self, rewards_PG: torch.Tensor) -> float | None:
        count, _, std = masked_statistics(rewards_PG.double(), ~rewards_PG.isnan(), dim=(1,))
        comparable = count > 1
        return std[comparable].square().mean().item() if comparable.any() else None

    def observe_rewards(self, rewards_PG):
        variance = self._batch_variance(rewards_PG)
        if variance is not None:
            self.variance = moving_average(self.variance, variance, self.decay)

    def context(self, rewards_PG):
        if self.variance is None:  # an evaluation before the first training batch
            return {"running_variance": self._batch_variance(rewards_PG) or 0.0}
        return {"running_variance": self.variance}

    def metrics(self):
        return {} if self.variance is None else {"normalization/running_std": self.variance**0.5}

    def state_dict(self):
        return {"variance": self.variance}

    def load_state_dict(self, state):
        self.variance = state["variance"]


class MeasuredConstant(NormalizationState):
    """``adaptive``: alpha of ``power`` is what the theorem's constant C calls for (``std_rule.std_exponent``).

    C = 8/3 of a moving average of the mean over the groups of the population std of their rewards; the current batch is
    in it. It is defined for rewards in [0, 1]: once another was seen, alpha is 1, which is ``std``.
    ``mean`` is as good where alpha falls, but at about twice the learning rate: by SGD a run whose alpha moves changes
    its steps' length; AdamW takes no notice.
    """

    not_ready = "in this run: a reward was outside [0, 1], where the constant C that decides says nothing"

    def __init__(self, decay: float = 0.9) -> None:
        super().__init__(decay)
        self.sigma: float | None = None
        self.outside = False

    @property
    def ready(self):
        return not self.outside

    def observe_rewards(self, rewards_PG):
        beyond = (rewards_PG < -ROUNDING) | (rewards_PG > 1 + ROUNDING)  # NaN is neither
        self.outside |= bool(beyond.any())
        count, _, std = masked_statistics(rewards_PG.double(), ~rewards_PG.isnan(), dim=(1,))
        comparable = count > 1
        if comparable.any():
            sigma = (std * ((count - 1) / count).sqrt())[comparable]
            self.sigma = moving_average(self.sigma, sigma.mean().item(), self.decay)

    @property
    def alpha(self) -> float:
        return 1.0 if self.outside or self.sigma is None else std_exponent(8 / 3 * self.sigma)

    def context(self, rewards_PG):
        return {"alpha": self.alpha}

    def metrics(self):
        return {"normalization/alpha": self.alpha}

    def state_dict(self):
        return {"sigma": self.sigma, "outside": self.outside}

    def load_state_dict(self, state):
        self.sigma, self.outside = state["sigma"], bool(state["outside"])


class MeasuredCurvature(NormalizationState):
    """``curvature``: the measured curvature at a group's pass rate takes the place of the std, its proxy.

    A prompt comes back too rarely for an average of its own, so curvatures are kept by pass rate, in G + 1 bins
    (round(G m)): a moving average of the curvature and one of the std of the groups that were measured. Curvature has
    the unit of a squared gradient norm, so that only its shape over the bins is used: scale_b = |kappa_b| (sum of std)
    / (sum of |kappa|), both over the measured bins. It is at least a tenth of the mean scale, and a bin that hasn't
    been measured divides by the group's own std.
    """

    not_ready = "until it has seen the curvature along the prompts' gradients"

    def __init__(self, decay: float = 0.9) -> None:
        super().__init__(decay)
        self.curvature: list[float | None] = []  # by bin
        self.std: list[float | None] = []
        self._latest: list[tuple[int, float]] = []  # (bin, std) of each group of the latest batch, -1: not comparable

    @property
    def ready(self):
        return any(value is not None for value in self.curvature)

    @staticmethod
    def _bins(rewards_PG: torch.Tensor) -> tuple[list[int], list[float]]:
        count, mean, std = masked_statistics(rewards_PG.double(), ~rewards_PG.isnan(), dim=(1,))
        bins = (mean * rewards_PG.shape[1]).round().long()
        return torch.where(count > 1, bins, -1).flatten().tolist(), std.flatten().tolist()

    def observe_rewards(self, rewards_PG):
        if len(self.curvature) != rewards_PG.shape[1] + 1:  # first batch, or resumed with another number of generations
            bins = rewards_PG.shape[1] + 1
            self.curvature, self.std = [None] * bins, [None] * bins
        self._latest = list(zip(*self._bins(rewards_PG), strict=True))

    def observe_curvature(self, prompt_id_P, curvature_P):
        seen: dict[int, list[tuple[float, float]]] = {}
        for prompt, curvature in zip(prompt_id_P.tolist(), curvature_P.tolist(), strict=True):
            if not 0 <= prompt < len(self._latest):
                raise ValueError(f"prompt_id {prompt} is not in the latest batch of {len(self._latest)} prompts")
            place, std = self._latest[prompt]
            if place >= 0 and curvature == curvature:
                seen.setdefault(place, []).append((curvature, std))
        for place, pairs in seen.items():
            curvature, std = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
            self.curvature[place] = moving_average(self.curvature[place], curvature, self.decay)
            self.std[place] = moving_average(self.std[place], std, self.decay)

    def context(self, rewards_PG):
        bins, stds = self._bins(rewards_PG)
        measured = {b: abs(value) for b, value in enumerate(self.curvature) if value is not None}
        total = sum(measured.values())
        scales = stds
        # an evaluation may have another number of generations, and then other bins
        if total > 0 and len(self.curvature) == rewards_PG.shape[1] + 1:
            unit = sum(self.std[b] or 0.0 for b in measured) / total
            least = CURVATURE_FLOOR * unit * total / len(measured)
            scales = [
                max(unit * measured[b], least) if b in measured else std for b, std in zip(bins, stds, strict=True)
            ]
        return {"curvature_scale": torch.tensor(scales, dtype=rewards_PG.dtype, device=rewards_PG.device)}

    def metrics(self):
        return {"normalization/curvature_bins": float(sum(value is not None for value in self.curvature))}

    def state_dict(self):
        return {"curvature": self.curvature, "std": self.std}

    def load_state_dict(self, state):
        self.curvature, self.std = list(state["curvature"]), list(state["std"])


STATES: dict[str, type[NormalizationState]] = {
    "running_std": RunningVariance,
    "adaptive": MeasuredConstant,
    "curvature": MeasuredCurvature,
}


def make_state(method: Any, options: Mapping[str, Any]) -> NormalizationState:
    """The state of this normalisation, empty; one for each reward function that is normalised by itself."""
    if not isinstance(method, str) or method not in STATES:
        return NormalizationState()
    return STATES[method](options.get("decay", METHODS[method].options["decay"].default))


def restore_states(states: Sequence[NormalizationState], saved: Sequence[Mapping[str, Any]]) -> bool:
    """Each takes over what was saved of it. False, and nothing is taken, where another normalisation saved it."""
    if len(saved) != len(states) or any(set(one) != set(s.state_dict()) for one, s in zip(saved, states, strict=True)):
        return False
    for state, one in zip(states, saved, strict=True):
        state.load_state_dict(one)
    return True
