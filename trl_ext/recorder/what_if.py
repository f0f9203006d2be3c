"""Compares each logged step with other normalisations, and estimates its noise."""

from __future__ import annotations

from collections.abc import Callable

import torch

from grpo_kernels.interference.inner_products import InnerProducts
from grpo_kernels.interference.noise import gradient_noise
from grpo_kernels.interference.what_if import Candidate, candidates
from grpo_kernels.recorder.failures import OptionalFeature
from grpo_kernels.recorder.sequence_table import SequenceTable
from grpo_kernels.recorder.tasks import Tasks
from grpo_kernels.recorder.what_if_step import (
    SHARED,
    STATELESS,
    WhatIfTable,
    as_plain,
    comparison_metrics,
    step_scores,
    step_table,
)
from trl_ext.advantages.normalizer import UsedNormalization
from trl_ext.compat import RunSettings

Products = torch.Tensor | InnerProducts


class WhatIfLog:
    """Compares each logged step with other normalisations; ``latest`` is the latest step's table, for its file.

    ``used`` returns the run's current normalisation. ``attempt`` is ``Collectives.attempt``, so that the feature is
    switched off on all ranks or on none.
    """

    def __init__(
        self,
        run: RunSettings,
        used: Callable[[], UsedNormalization],
        attempt: Callable[[Callable[[], dict[str, float]]], dict[str, float]],
    ) -> None:
        self.run, self._used, self._attempt = run, used, attempt
        missing = "What other normalisations would have done isn't logged"
        self._feature = OptionalFeature(missing, on=run.options.what_if != [])
        self.latest: WhatIfTable | None = None

    def observe(self, gram_BB: Products, sequences: SequenceTable, tasks: Tasks) -> dict[str, float]:
        """Returns the metrics ``what_if/<method>/cos``, ``what_if/<method>/factor`` and those under ``noise/``."""
        self.latest = None
        return self._feature.run(lambda: self._attempt(lambda: self._observe(gram_BB, sequences, tasks)), {})

    def _methods(self, used: str | None) -> list[Candidate]:
        """Returns the normalisations to compare with; they get the run's options unless it uses a function."""
        names, options = self.run.options.what_if, self.run.options.normalization_kwargs
        given = options if used is not None and isinstance(options, dict) else {}
        shared = {name: given[name] for name in SHARED if name in given}
        return candidates(STATELESS if names is None else tuple(names), **shared)

    def _observe(self, gram_BB: Products, sequences: SequenceTable, tasks: Tasks) -> dict[str, float]:
        if isinstance(gram_BB, torch.Tensor):  # thousands of small calls: on a GPU, launches would dominate
            gram_BB, sequences = gram_BB.cpu(), sequences.cpu()
        scores = step_scores(gram_BB, sequences)
        if scores is None:
            self.run.log_once(
                "What other normalisations would have done isn't logged: a sequence's tokens don't share one "
                "coefficient (off policy, KL, an entropy bonus or mask, an auxiliary loss).",
                level="info",
            )
            return {}
        now = self._used()
        used = now.name if now.name in STATELESS and not now.by_function else None
        methods = self._methods(now.name)
        if sequences.function_rewards.shape[1] == 1:
            methods = [one for one in methods if one.name != "decoupled"]
        full_batch = len(scores.rewards_PG) == self.run.prompts_per_generation
        table = step_table(scores, sequences, methods, now.function_weights, tasks, full_batch=full_batch)
        noise = gradient_noise(scores)
        self.latest = as_plain(table, noise, used, tasks)
        return comparison_metrics(table, noise)
