"""Keeps the state of a normalisation from step to step: running variance, measured curvature, recent mean, baselines.

Shapes: P prompts, G completions of one prompt.

Each state observes the gathered rewards of a generation batch, and passes ``normalize_rewards`` the entry of
``context`` that its method needs. States depend on gathered numbers only, so every rank holds the same. ``state_dict``
is saved in the checkpoint's ``trainer_state.json``, which restores floats bit for bit.

``observe_curvature`` gets curvatures measured during training, from the interference logging or from a user's callback.
Only ``MeasuredCurvature`` uses them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from grpo_kernels import METHODS
from grpo_kernels.normalize.group_statistics import masked_statistics
from grpo_kernels.normalize.methods import option_or_default

# The smallest scale, relative to the mean scale of the measured bins: it keeps advantages bounded.
CURVATURE_FLOOR = 0.1

State = Mapping[str, float | Sequence[float | None] | None]  # for JSON


def moving_average(previous: float | None, value: float, decay: float) -> float:
    """Returns ``decay * previous + (1 - decay) * value``, or ``value`` if there is no previous one."""
    return value if previous is None else decay * previous + (1 - decay) * value


class NormalizationState:
    """The interface of a state, and the empty state of methods that need none."""

    not_ready = ""  # when and why the method falls back to ``std``; the end of a log message
    includes_batch = True  # whether it observes a training batch before that batch's advantages, or after

    def __init__(self, decay: float = 0.9) -> None:
        self.decay = decay

    def observe_rewards(self, rewards_PG: torch.Tensor, task_P: torch.Tensor | None = None) -> None:
        """Updates the state with a training batch's rewards (P, G) of all ranks, NaN where unscorable.

        ``task_P``: (P,) the prompts' task keys; None: they all have the same task.
        """

    def observe_curvature(self, prompt_id_P: torch.Tensor, curvature_P: torch.Tensor) -> None:
        """Updates the state with curvatures (P,) of prompts of the latest batch, given by ``prompt_id`` (P,)."""

    @property
    def ready(self) -> bool:
        """Whether the state has what the method needs."""
        return True

    def context(
        self, rewards_PG: torch.Tensor, task_P: torch.Tensor | None = None
    ) -> Mapping[str, torch.Tensor | float]:
        """Returns the entries of ``normalize_rewards``'s context for these rewards."""
        return {}

    def metrics(self) -> dict[str, float]:
        """Returns the state's metrics, under ``normalization/``."""
        return {}

    def state_dict(self) -> State:
        """Returns the state as plain numbers and lists, for JSON."""
        return {}

    def load_state_dict(self, state: Any) -> None:
        """Restores the state from what ``state_dict`` returned."""


class RunningVariance(NormalizationState):
    """Keeps the moving average of the groups' mean variance, for ``running_std``; like Adam's second moment.

    v <- decay v + (1 - decay) (mean over the groups of their sample variance, 0 for a group of equal rewards), starting
    from the first batch's mean. The current batch is included before v is used, so no group's std is more than
    sqrt(P / (1 - decay)) times the scale.
    """

    def __init__(self, decay: float = 0.9) -> None:
        super().__init__(decay)
        self.variance: float | None = None

    def _batch_variance(self, rewards_PG: torch.Tensor) -> float | None:
        count, _, std = masked_statistics(rewards_PG.double(), ~rewards_PG.isnan(), dim=(1,))
        comparable = count > 1
        return std[comparable].square().mean().item() if comparable.any() else None

    def observe_rewards(self, rewards_PG, task_P=None):
        variance = self._batch_variance(rewards_PG)
        if variance is not None:
            self.variance = moving_average(self.variance, variance, self.decay)

    def context(self, rewards_PG, task_P=None):
        if self.variance is None:  # evaluation before the first training batch
            return {"running_variance": self._batch_variance(rewards_PG) or 0.0}
        return {"running_variance": self.variance}

    def metrics(self):
        return {} if self.variance is None else {"normalization/running_std": self.variance**0.5}

    def state_dict(self):
        return {"variance": self.variance}

    def load_state_dict(self, state):
        self.variance = state["variance"]


class MeasuredCurvature(NormalizationState):
    """Replaces the std of a group, a proxy, by the curvature measured at its pass rate, for ``curvature``.

    A prompt returns too rarely for an average of its own. So the state has G + 1 bins by pass rate (mean reward m goes
    to bin round(G m)). Each bin keeps a moving average of the curvature, and one of the std of the measured groups.

    Curvature has the unit of a squared gradient norm, so only its shape over the bins is used:
    scale_b = |kappa_b| (sum of std) / (sum of |kappa|), summed over the measured bins, and at least a tenth of the mean
    scale. In a bin that wasn't measured, the scale is the group's own std.
    """

    not_ready = "until it has seen the curvature along the prompts' gradients"

    def __init__(self, decay: float = 0.9) -> None:
        super().__init__(decay)
        self.curvature: list[float | None] = []  # by bin
        self.std: list[float | None] = []
        self._latest: list[
            tuple[int, float]
        ] = []  # (bin, std) of the latest batch's groups; bin -1: fewer than 2 rewards

    @property
    def ready(self):
        return any(value is not None for value in self.curvature)

    @staticmethod
    def _bins(rewards_PG: torch.Tensor) -> tuple[list[int], list[float]]:
        count, mean, std = masked_statistics(rewards_PG.double(), ~rewards_PG.isnan(), dim=(1,))
        bins = (mean * rewards_PG.shape[1]).round().long()
        return torch.where(count > 1, bins, -1).flatten().tolist(), std.flatten().tolist()

    def observe_rewards(self, rewards_PG, task_P=None):
        if len(self.curvature) != rewards_PG.shape[1] + 1:  # first batch, or a resume with another G
            bins = rewards_PG.shape[1] + 1
            self.curvature, self.std = [None] * bins, [None] * bins
        self._latest = list(zip(*self._bins(rewards_PG), strict=True))

    def observe_curvature(self, prompt_id_P, curvature_P):
        measured: dict[int, list[tuple[float, float]]] = {}  # by bin: (curvature, std) of its groups
        for prompt, curvature in zip(prompt_id_P.tolist(), curvature_P.tolist(), strict=True):
            if not 0 <= prompt < len(self._latest):
                raise ValueError(f"prompt_id {prompt} is not in the latest batch of {len(self._latest)} prompts")
            b, std = self._latest[prompt]
            if b >= 0 and curvature == curvature:  # not NaN
                measured.setdefault(b, []).append((curvature, std))
        for b, pairs in measured.items():
            curvature, std = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
            self.curvature[b] = moving_average(self.curvature[b], curvature, self.decay)
            self.std[b] = moving_average(self.std[b], std, self.decay)

    def context(self, rewards_PG, task_P=None):
        bins, stds = self._bins(rewards_PG)
        measured = {b: abs(value) for b, value in enumerate(self.curvature) if value is not None}
        total = sum(measured.values())
        scales = stds
        # with another G, as an evaluation may have, the bins don't fit
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


class RecentMean(NormalizationState):
    """Keeps the mean rewards of the last ``window`` batches, the current one included, for ``ha_dw``."""

    def __init__(self, window: int = 10) -> None:
        super().__init__()
        self.window = window
        self.means: list[float] = []

    def observe_rewards(self, rewards_PG, task_P=None):
        mean = float(rewards_PG.double().nanmean())
        if math.isfinite(mean):  # else no completion was scored
            self.means = [*self.means, mean][-self.window :]

    def context(self, rewards_PG, task_P=None):
        if self.means:
            return {"recent_mean": sum(self.means) / len(self.means)}
        return {"recent_mean": float(rewards_PG.double().nanmean().nan_to_num(0.0))}  # evaluation before training

    def state_dict(self):
        return {"means": self.means}

    def load_state_dict(self, state):
        self.means = list(state["means"])[-self.window :]


class RoleBaselines(NormalizationState):
    """Keeps a moving average of rewards for each task (SPIRAL: for each game and role), for ``rae``.

    Each completion is compared with the average of those before it, b, and then b <- decay b + (1 - decay) r; b starts
    at 0. So its own reward isn't in its baseline. The order is that of the batch of all ranks.
    """

    includes_batch = False

    def __init__(self, decay: float = 0.95) -> None:
        super().__init__(decay)
        self.baselines: dict[int, float] = {}

    def _scan(
        self, rewards_PG: torch.Tensor, task_P: torch.Tensor | None
    ) -> tuple[list[list[float]], dict[int, float]]:
        """Returns each completion's baseline, and the baselines after the last one."""
        rows: list[list[float]] = []
        latest = dict(self.baselines)
        tasks = [0] * len(rewards_PG) if task_P is None else task_P.tolist()
        for task, rewards in zip(tasks, rewards_PG.double().tolist(), strict=True):
            rows.append([])
            for reward in rewards:
                baseline = latest.setdefault(task, 0.0)
                rows[-1].append(baseline)
                if reward == reward:  # not NaN
                    latest[task] = self.decay * baseline + (1 - self.decay) * reward
        return rows, latest

    def observe_rewards(self, rewards_PG, task_P=None):
        self.baselines = self._scan(rewards_PG, task_P)[1]

    def context(self, rewards_PG, task_P=None):
        rows, _ = self._scan(rewards_PG, task_P)
        return {"role_baseline": rewards_PG.new_tensor(rows).reshape(rewards_PG.shape)}

    def state_dict(self):
        return {"tasks": list(self.baselines), "baselines": list(self.baselines.values())}

    def load_state_dict(self, state):
        self.baselines = dict(zip(state["tasks"], state["baselines"], strict=True))


STATES: dict[str, type[NormalizationState]] = {
    "running_std": RunningVariance,
    "curvature": MeasuredCurvature,
    "ha_dw": RecentMean,
    "rae": RoleBaselines,
}


def make_state(method: Any, options: Mapping[str, Any]) -> NormalizationState:
    """Returns a new state for this normalisation."""
    if not isinstance(method, str) or method not in STATES:
        return NormalizationState()
    return STATES[method](**{name: option_or_default(method, options, name) for name in METHODS[method].options})


def restore_states(states: Sequence[NormalizationState], saved: Sequence[Mapping[str, Any]]) -> bool:
    """Restores each state. Returns False, and restores nothing, if ``saved`` is of another normalisation."""
    if len(saved) != len(states):
        return False
    pairs = list(zip(states, saved, strict=True))
    if any(set(entry) != set(state.state_dict()) for state, entry in pairs):
        return False
    for state, entry in pairs:
        state.load_state_dict(entry)
    return True
