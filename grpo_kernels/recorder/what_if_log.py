"""``WhatIfLog`` compares each logged step with other normalisations, and estimates its noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from grpo_kernels.interference.inner_products import InnerProducts
from grpo_kernels.interference.noise import gradient_noise
from grpo_kernels.interference.what_if import Candidate, candidates

from .failures import OptionalFeature
from .sequence_table import SequenceTable
from .tasks import Tasks
from .what_if_step import SHARED, STATELESS, WhatIfTable, as_plain, comparison_metrics, step_scores, step_table

Products = torch.Tensor | InnerProducts


@dataclass(frozen=True)
class ComparedWith:
    """What a step is compared with.

    Attributes:
        methods: the normalisations.
        used: the run's own, if it is one of them and needs no state.
        function_weights: the weights of the reward functions; None: 1 each.
        prompts: the prompts of a whole batch; None: those of the step.
    """

    methods: Sequence[Candidate]
    used: str | None = None
    function_weights: list[float] | None = None
    prompts: int | None = None


def compared_methods(
    names: Sequence[str | Callable[..., torch.Tensor]] | None, options: Mapping[str, Any]
) -> list[Candidate]:
    """Returns the normalisations with these names, by default all that need no state.

    ``options`` are the run's; the others get those that several methods share.
    """
    shared = {name: options[name] for name in SHARED if name in options}
    return candidates(STATELESS if names is None else tuple(names), **shared)


class WhatIfLog:
    """Compares each logged step with other normalisations; ``latest`` is the latest step's table, for its file.

    Args:
        compared_with: returns what the current step is compared with.
        attempt: ``Collectives.attempt``, so that the feature is switched off on all ranks or on none.
        log_once: ``log_once(text, level)`` logs a text unless it was logged before.
        on: whether steps are compared.
    """

    def __init__(
        self,
        compared_with: Callable[[], ComparedWith],
        attempt: Callable[[Callable[[], dict[str, float]]], dict[str, float]],
        log_once: Callable[[str, str], None],
        *,
        on: bool = True,
    ) -> None:
        self._compared_with, self._attempt, self._log_once = compared_with, attempt, log_once
        self._feature = OptionalFeature("What other normalisations would have done isn't logged", on=on)
        self.latest: WhatIfTable | None = None

    def observe(self, gram_BB: Products, sequences: SequenceTable, tasks: Tasks) -> dict[str, float]:
        """Returns the metrics ``what_if/<method>/cos``, ``what_if/<method>/factor`` and those under ``noise/``."""
        self.latest = None
        return self._feature.run(lambda: self._attempt(lambda: self._observe(gram_BB, sequences, tasks)), {})

    def _observe(self, gram_BB: Products, sequences: SequenceTable, tasks: Tasks) -> dict[str, float]:
        if isinstance(gram_BB, torch.Tensor):  # thousands of small calls: on a GPU, launches would dominate
            gram_BB, sequences = gram_BB.cpu(), sequences.to("cpu")
        scores = step_scores(gram_BB, sequences)
        if scores is None:
            self._log_once(
                "What other normalisations would have done isn't logged: a sequence's tokens don't share one "
                "coefficient (off policy, KL, an entropy bonus or mask, an auxiliary loss).",
                "info",
            )
            return {}
        now = self._compared_with()
        methods = list(now.methods)
        if sequences.function_rewards.shape[1] <= 1:
            methods = [one for one in methods if one.name != "decoupled"]
        full_batch = now.prompts is None or len(scores.rewards_PG) == now.prompts
        table = step_table(scores, sequences, methods, now.function_weights, tasks, full_batch=full_batch)
        noise = gradient_noise(scores)
        self.latest = as_plain(table, noise, now.used, tasks)
        return comparison_metrics(table, noise)
