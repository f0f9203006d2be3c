"""An extra pass that scores a logged step's sequences of advantage 0, of which the step's gradient shows nothing.

Each contributes ``z_i = -w_i s_i``, what it would at an advantage of 1, to the sketch that is open, in rows after the
step's own. Gradients are taken by ``torch.autograd.grad``, so that no parameter's ``.grad`` changes, and the random
number generator is put back. A pass that fails is the last one, which is logged once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from accelerate.utils import DistributedType

from grpo_kernels.interference.gradient_sketch import GradientSketch
from trl_ext.compat import LossSettings, RunSettings
from trl_ext.schema import Sequences

from .coefficients import sequence_coefficients
from .failures import OptionalPart
from .sequence_table import SequenceTable

UNTESTED = {DistributedType.FSDP: "FSDP", DistributedType.DEEPSPEED: "DeepSpeed"}


class ExtraPass:
    """``score``: a batch's log-probs (B, T), as the loss makes them, with their graph."""

    def __init__(self, run: RunSettings, score: Callable[[Sequences], torch.Tensor]) -> None:
        self.run, self.score = run, score
        wanted = run.options.what_if_dead and run.options.interference_every > 0 and run.options.what_if != []
        self._part = OptionalPart("what_if_dead=True: sequences of advantage 0 aren't scored", on=wanted)
        self._kept: list[tuple[Sequences, SequenceTable]] = []
        if run.accelerator.distributed_type in UNTESTED:
            self._part.switch_off(f"an extra pass under {UNTESTED[run.accelerator.distributed_type]} hasn't been tried")

    def forget(self) -> None:
        """Drops the batches that were kept for a pass."""
        self._kept = []

    def keep(self, batches: list[Sequences], settings: LossSettings, accumulation: int, first_prompt: int) -> None:
        """Keeps batches of sequences of advantage 0; none with images, or whose sequences have no coefficient."""
        for batch in batches if self._part.on else ():
            if batch.has_images:
                self._part.switch_off("images travel with the rows")
                return
            at_one = batch.with_columns(advantages=torch.ones_like(batch.advantages))
            coefficient_B = sequence_coefficients(at_one, settings, accumulation)
            if coefficient_B is not None:
                self._kept.append((batch, SequenceTable.of_batch(batch, first_prompt, coefficient_B)))

    def sketched(self, sketch: GradientSketch, loss_scale: float) -> SequenceTable | None:
        """Runs the passes and returns the sequences whose rows they added to the sketch; None where there are none."""
        kept, self._kept = self._kept, []

        def passes() -> SequenceTable | None:
            for batch, table in kept:
                self._pass(sketch, batch, table, loss_scale)
            return SequenceTable.join([table for _, table in kept]) if kept else None

        return self._part.run(passes, None)

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


def place_scores(
    table: SequenceTable, sketch_B: torch.Tensor, extra: SequenceTable, extra_B: torch.Tensor, num_generations: int
) -> SequenceTable:
    """Puts the sketches ``extra_B`` of the extra pass into the rows that ``sketch_B``, of ``table``, has of the same
    sequences, in place; returns the table with their coefficients."""
    assert table.coefficient is not None and extra.coefficient is not None
    identity_B = table.prompt_id * num_generations + table.position
    order_B = identity_B.argsort()
    wanted = extra.prompt_id * num_generations + extra.position
    at = order_B[torch.searchsorted(identity_B[order_B], wanted)]
    sketch_B[at] = extra_B
    coefficient_B = table.coefficient.index_copy(0, at, extra.coefficient.to(table.coefficient))
    return replace(table, made_at=table.made_at.index_fill(0, at, 1.0), coefficient=coefficient_B)
