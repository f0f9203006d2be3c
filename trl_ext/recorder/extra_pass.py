"""Scores a logged step's sequences of advantage 0 in an extra pass, because they contribute nothing to its gradient.

Each adds ``z_i = -w_i s_i``, its gradient at an advantage of 1, to the open sketch, in rows after the step's own. The
pass uses ``torch.autograd.grad``, which doesn't change ``.grad``, and restores the random number generator. If a pass
fails, the feature is switched off.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate.utils import DistributedType

from grpo_kernels.interference.gradient_sketch import GradientSketch
from grpo_kernels.recorder.failures import OptionalFeature
from grpo_kernels.recorder.sequence_table import SequenceTable
from trl_ext.compat import LossSettings, RunSettings
from trl_ext.schema import Sequences

from .batch_table import table_of_batch
from .coefficients import sequence_coefficients

UNTESTED = {DistributedType.FSDP: "FSDP", DistributedType.DEEPSPEED: "DeepSpeed"}


class ExtraPass:
    """Collects batches of sequences of advantage 0, and scores them at the end of the step.

    ``score`` returns a batch's log-probs (B, T) with their graph, as the loss computes them.
    """

    def __init__(self, run: RunSettings, score: Callable[[Sequences], torch.Tensor]) -> None:
        self.run, self.score = run, score
        wanted = run.options.what_if_dead and run.options.interference_every > 0 and run.options.what_if != []
        self._feature = OptionalFeature("what_if_dead=True: sequences of advantage 0 aren't scored", on=wanted)
        self._kept: list[tuple[Sequences, SequenceTable]] = []
        engine = UNTESTED.get(run.accelerator.distributed_type)
        if engine is not None:
            self._feature.switch_off(f"the extra pass hasn't been tested with {engine}")

    def forget(self) -> None:
        """Drops the collected batches."""
        self._kept = []

    def keep(self, batches: list[Sequences], settings: LossSettings, accumulation: int, first_prompt: int) -> None:
        """Collects batches of sequences of advantage 0, unless they have images or no coefficients."""
        for batch in batches if self._feature.on else ():
            if batch.has_images:
                self._feature.switch_off("batches with images aren't supported")
                return
            at_one = batch.with_columns(advantages=torch.ones_like(batch.advantages))
            coefficient_B = sequence_coefficients(at_one, settings, accumulation)
            if coefficient_B is not None:
                self._kept.append((batch, table_of_batch(batch, first_prompt, coefficient_B)))

    def run_passes(self, sketch: GradientSketch, loss_scale: float) -> SequenceTable | None:
        """Adds the collected sequences to the sketch, and returns them; None if there are none."""
        kept, self._kept = self._kept, []

        def passes() -> SequenceTable | None:
            for batch, table in kept:
                self._pass(sketch, batch, table, loss_scale)
            return SequenceTable.join([table for _, table in kept]) if kept else None

        return self._feature.run(passes, None)

    def _pass(self, sketch: GradientSketch, batch: Sequences, table: SequenceTable, loss_scale: float) -> None:
        device = self.run.accelerator.device
        sketch.set_rows(table.prompt_id, checked=False)
        try:
            devices, kind = ([], "cuda") if device.type == "cpu" else ([device], device.type)
            with torch.random.fork_rng(devices, device_type=kind), torch.enable_grad():
                logprobs_BT = self.score(batch)
                assert table.coefficient is not None
                loss = (logprobs_BT * batch.live_mask).sum(1) @ table.coefficient.to(logprobs_BT) * loss_scale
                torch.autograd.grad(loss, sketch.trainable_parameters, allow_unused=True)
        finally:
            sketch.end_rows()
