"""``LoggedStep``: what one logged step has gathered on this process, until it is measured.

Shapes: B sequences, M parts of a sketch, N numbers of a part.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from grpo_kernels.interference.gradient_sketch import GradientSketch
from grpo_kernels.interference.inner_products import squared_norms
from trl_ext.compat import LossSettings, RunSettings, StepPosition
from trl_ext.schema import Sequences

from .coefficients import sequence_coefficients
from .extra_pass import ExtraPass, place_scores
from .layer_check import LayerCheck
from .measure import RecordedStep
from .sequence_table import SequenceTable


def loss_scale(accelerator: Any) -> float:
    """The factor of a GradScaler on the loss, 1.0 without one."""
    scaler = getattr(accelerator, "scaler", None)
    return scaler.get_scale() if scaler is not None else 1.0


@dataclass
class LoggedStep:
    """``number``: from 1, as the log counts optimizer steps that are done. ``first_micro_batch``: TRL's count of
    micro-batches when the step began. ``skipped``: sequences that don't run. ``check``: made at the end of the step, by
    DeepSpeed before the optimizer's step."""

    number: int
    first_micro_batch: int
    sequences: list[SequenceTable] = field(default_factory=list)
    skipped: list[SequenceTable] = field(default_factory=list)
    check: LayerCheck | None = None

    def first_prompt(self, position: StepPosition, prompts_per_generation: int) -> int:
        """An optimizer step that takes several generations counts the prompts of each after those before."""
        length = position.steps_per_generation
        return (position.micro_batch // length - self.first_micro_batch // length) * prompts_per_generation

    def add(
        self,
        batch: Sequences,
        skipped: Sequences | None,
        first_prompt: int,
        settings: LossSettings,
        accumulation: int,
    ) -> None:
        """Adds a micro-batch's sequences, and those that are left out of the step."""
        coefficient_B = sequence_coefficients(batch, settings, accumulation)
        self.sequences.append(SequenceTable.of_batch(batch, first_prompt, coefficient_B))
        if skipped is not None:
            self.skipped.append(SequenceTable.of_skipped(skipped, first_prompt))

    def take(
        self, sketch: GradientSketch, features_PH: torch.Tensor | None, extra_pass: ExtraPass, run: RunSettings
    ) -> RecordedStep:
        """Ends the sketch's step, after the extra pass, and returns all that this process has recorded."""
        scale, processes = loss_scale(run.accelerator), run.accelerator.num_processes
        extra = extra_pass.sketched(sketch, scale)
        recorded = sketch.take()
        table, n_run = SequenceTable.join([*self.sequences, *self.skipped]), sum(map(len, self.sequences))
        sketch_BMN, extra_BMN = recorded.sketch[:n_run], recorded.sketch[n_run:]
        if len(table) > n_run:
            sketch_BMN = torch.cat([sketch_BMN, sketch_BMN.new_zeros(len(table) - n_run, *sketch_BMN.shape[1:])])
        if extra is not None and table.coefficient is not None:
            table = place_scores(table, sketch_BMN, extra, extra_BMN, run.num_generations)
        sketch_BMN.div_(processes * scale)
        coefficient_B = None if table.coefficient is None else table.coefficient / processes
        return RecordedStep(
            sketch_BMN=sketch_BMN,
            sections=recorded.sections,
            sequences=replace(table, square=squared_norms(sketch_BMN.flatten(1)), coefficient=coefficient_B),
            features_PH=features_PH,
        )
