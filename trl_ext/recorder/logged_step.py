"""``LoggedStep`` collects one logged step's sequences on this rank until the step is measured.

Shapes: B sequences, M replicates of a sketch, N numbers of a replicate.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from grpo_kernels.interference.gradient_sketch import GradientSketch
from grpo_kernels.interference.inner_products import squared_norms
from grpo_kernels.recorder.layer_check import LayerCheck
from grpo_kernels.recorder.measure import RecordedStep
from grpo_kernels.recorder.sequence_table import SequenceTable
from trl_ext.compat import LossSettings, RunSettings, StepPosition
from trl_ext.schema import Sequences

from .batch_table import table_of_batch, table_of_skipped
from .coefficients import sequence_coefficients
from .extra_pass import ExtraPass, place_scores


def loss_scale(accelerator: Any) -> float:
    """Returns the factor of a GradScaler on the loss; 1.0 without one."""
    scaler = getattr(accelerator, "scaler", None)
    return scaler.get_scale() if scaler is not None else 1.0


@dataclass
class LoggedStep:
    """One logged step on this rank.

    Attributes:
        number: the number of optimizer steps after this one, as in TRL's log.
        first_micro_batch: TRL's count of micro-batches at the start of the step.
        generation: the number of generation batches before the step's first one; an iteration counts as one.
        iteration: how often the step's generation batch was trained on before.
        sequences: the sequences of each micro-batch.
        skipped: the sequences that the plan skips.
        check: the gradient check at the end of the step; with DeepSpeed, before the optimizer step.
    """

    number: int
    first_micro_batch: int
    generation: int
    iteration: int
    sequences: list[SequenceTable] = field(default_factory=list)
    skipped: list[SequenceTable] = field(default_factory=list)
    check: LayerCheck | None = None

    def first_prompt(self, position: StepPosition, prompts_per_generation: int) -> int:
        """Returns the number of the generation batch's first prompt; a step may use several generation batches."""
        length = position.steps_per_generation
        return (position.micro_batch // length - self.first_micro_batch // length) * prompts_per_generation

    def add(
        self, batch: Sequences, skipped: Sequences | None, first_prompt: int, settings: LossSettings, accumulation: int
    ) -> None:
        """Adds a micro-batch's sequences, and the sequences that the plan skips."""
        coefficient_B = sequence_coefficients(batch, settings, accumulation)
        self.sequences.append(table_of_batch(batch, first_prompt, coefficient_B))
        if skipped is not None:
            self.skipped.append(table_of_skipped(skipped, first_prompt))

    def take(
        self, sketch: GradientSketch, features_PH: torch.Tensor | None, extra_pass: ExtraPass, run: RunSettings
    ) -> RecordedStep:
        """Runs the extra pass, ends the sketch's step, and returns what this rank recorded."""
        scale, processes = loss_scale(run.accelerator), run.accelerator.num_processes
        extra = extra_pass.run_passes(sketch, scale)
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
