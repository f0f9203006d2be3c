"""Scores of a step's sequences of advantage 0, of which its gradient shows nothing: a pass of their own beside it.

Each contributes ``z_i = -w_i s_i``, what it would at an advantage of 1, to the sketch that is open, in rows after the
step's own. Gradients are taken by ``torch.autograd.grad``, so that no parameter's ``.grad`` changes, and random numbers
go on as if nothing had been. A pass that fails is the last one, said once, and nobody's training ends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import DistributedType

from grpo_kernels.interference.gradient_sketch import GradientSketch
from trl_ext.loss.token_weights import live_mask
from trl_ext.trl_surface import IMAGES, LossSettings, RunSettings

from .sequences import sequence_coefficients

NOT_HERE = {DistributedType.FSDP: "FSDP", DistributedType.DEEPSPEED: "DeepSpeed"}


class Beside:
    """``score``: a batch's log-probs (B, T), as the loss makes them, with their graph."""

    def __init__(self, run: RunSettings, score: Callable[[dict[str, Any]], torch.Tensor]) -> None:
        self.run, self.score = run, score
        self.wanted = run.options.what_if_dead and run.options.interference_every > 0 and run.options.what_if != []
        self._batches: list[dict[str, Any]] = []
        if self.wanted and run.accelerator.distributed_type in NOT_HERE:
            name = NOT_HERE[run.accelerator.distributed_type]
            self._off(f"under {name} a pass beside the step hasn't been tried")

    def _off(self, reason: str) -> None:
        self.wanted = False
        self.run.say_once(f"what_if_dead=True: sequences of advantage 0 aren't scored from here on: {reason}.")

    def forget(self) -> None:
        """What was kept for a pass."""
        self._batches = []

    def keep(
        self,
        batch: dict[str, Any],
        dead: list[dict[str, Any]],
        settings: LossSettings,
        accumulation: int,
        first: int,
    ) -> None:
        """``dead``: batches of sequences of advantage 0, of this micro-batch and of those that don't run; prompt ids
        from ``first``. Nothing is kept where the step's sequences have no coefficients, or an image."""
        if not self.wanted or sequence_coefficients(batch, settings, accumulation) is None:
            return
        if any(batch.get(name) is not None for name in IMAGES):
            self._off("images travel with the rows")
            return
        for one in dead:
            at_1 = {**one, "advantages": torch.ones_like(one["advantages"])}
            weight_B = sequence_coefficients(at_1, settings, accumulation)
            self._batches.append({**one, "prompt_id": one["prompt_id"] + first, "coefficient": weight_B})

    def sketched(self, sketch: GradientSketch, loss_scale: float) -> dict[str, torch.Tensor] | None:
        """The passes; ``prompt_id``, ``position`` and ``coefficient`` of the rows that they added to the sketch, in
        their order. None: none were."""
        batches, self._batches = self._batches, []
        if not self.wanted or not batches:
            return None
        try:
            for batch in batches:
                self._pass(sketch, batch, loss_scale)
        except Exception as error:
            self._off(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}")
            return None
        names = {"prompt_id": "prompt_id", "position": "group_position", "coefficient": "coefficient"}
        return {name: torch.cat([batch[key] for batch in batches]) for name, key in names.items()}

    def _pass(self, sketch: GradientSketch, batch: dict[str, Any], loss_scale: float) -> None:
        device = self.run.accelerator.device
        sketch.set_rows(batch["prompt_id"], checked=False)
        try:
            on_device = {} if device.type == "cpu" else {"devices": [device], "device_type": device.type}
            with torch.random.fork_rng(**{"devices": [], **on_device}), torch.enable_grad():
                logprobs_BT = self.score(batch)
                loss = (logprobs_BT * live_mask(batch)).sum(1) @ batch["coefficient"].to(logprobs_BT) * loss_scale
                torch.autograd.grad(loss, sketch.trainable_parameters, allow_unused=True)
        finally:
            sketch.end_rows()


def place_scores(
    known: dict[str, Any],
    sketch_B: torch.Tensor,
    beside_B: torch.Tensor,
    scored: dict[str, torch.Tensor],
    num_generations: int,
) -> None:
    """Puts what was sketched beside the step, ``beside_B``, into the rows of the same sequences; in place.

    ``known``: the step's sequences (``join_sequences``), whose sketches ``sketch_B`` has."""
    identity_B = known["prompt_id"] * num_generations + known["position"]
    order_B = identity_B.argsort()
    wanted = scored["prompt_id"] * num_generations + scored["position"]
    at = order_B[torch.searchsorted(identity_B[order_B], wanted)]
    sketch_B[at] = beside_B
    known["made_at"][at] = 1.0
    known["coefficient"][at] = scored["coefficient"].to(known["coefficient"])
