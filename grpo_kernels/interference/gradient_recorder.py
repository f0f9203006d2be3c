"""``GradientRecorder``: how the prompts' gradients interfere, in any training loop.

Shapes: B sequences of a step, S of a micro-batch, R rows, T positions, M parts of a sketch, K numbers in each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from .gradient_sketch import GradientSketch, StepSketch
from .metrics import interference_metrics
from .sketch_error import predicted_rmse
from .step_gradients import PromptGroups, StepGradients, group_by_prompt


@dataclass
class RecordedGradients:
    """One step's gradients by sequence, in the order of its ``rows``; readable once the step is over."""

    _sketch: GradientSketch
    _recorded: list[StepSketch] = field(default_factory=list)

    @contextmanager
    def rows(self, prompt_S: torch.Tensor, sequence_RT: torch.Tensor | None = None) -> Iterator[None]:
        """Around the forward and backward passes of a micro-batch.

        Args:
            prompt_S: (S,) integers, the prompt of each sequence.
            sequence_RT: where a row isn't a sequence: (R, T), each position's sequence in [0, S), -1 for none.
        """
        with self._sketch.rows(prompt_S, sequence_RT):
            yield

    @property
    def step(self) -> StepSketch:
        """The sketches; ``ValueError`` while the step is open."""
        if not self._recorded:
            raise ValueError("the step isn't over: read its gradients after the with block")
        return self._recorded[0]

    @property
    def prompt_ids(self) -> torch.Tensor:
        """(B,) the prompt of each sequence."""
        return self.step.prompt_B

    def inner_products(self) -> torch.Tensor:
        """(B, B) float64 inner products of the sequences' parts of the gradient."""
        return self.step.gram()

    def sketch_rmse(self) -> float:
        """The predicted error of one cosine of two prompts' gradients; 0.0 where nothing is sketched."""
        sketch_BMK = self.step.sketch
        return predicted_rmse(sketch_BMK, self.prompt_ids) if sketch_BMK.shape[1] > 1 else 0.0

    def by_prompt(
        self, reward_B: torch.Tensor, coefficient_B: torch.Tensor | None = None, baseline_size: int = 0
    ) -> PromptGroups:
        """Groups the step's gradients by prompt. Takes the arguments of ``StepGradients``."""
        gram_BB = self.inner_products()
        return group_by_prompt(StepGradients(gram_BB, self.prompt_ids, reward_B, coefficient_B, baseline_size))

    def metrics(
        self, reward_B: torch.Tensor, coefficient_B: torch.Tensor | None = None, baseline_size: int = 0
    ) -> dict[str, float]:
        """Computes ``interference_metrics`` of the step. Takes the arguments of ``StepGradients``."""
        groups = self.by_prompt(reward_B, coefficient_B, baseline_size)
        return interference_metrics(groups, sketch_rmse=self.sketch_rmse())

    def check_gradients(self) -> dict[str, float]:
        """Compares what was recorded with each parameter's ``.grad``, which must be of this step alone and not clipped.

        Returns the relative errors of the parameters that differ, by name. They aren't recorded from the next step on.
        """
        return self._sketch.leave_out_wrong([parameter.grad for parameter in self._sketch.trainable_parameters])


class GradientRecorder:
    """Records each sequence's part of the gradient of an optimizer step, small enough to keep::

        recorder = GradientRecorder(model)
        with recorder.step(seed=number) as gradients:
            for batch in micro_batches:
                with gradients.rows(batch["prompt_id"]):  # (S,) integers, one for each row
                    loss_of(model, batch).backward()
        gradients.check_gradients()
        print(gradients.metrics(rewards)["interference/cos_mean"])
        optimizer.step()

    Between steps nothing hangs on the model, and no forward or backward value changes. See ``GradientSketch`` for the
    layers that are recorded, and what may wrap the model.

    Args:
        model: any torch module.
        dim: width k of the sketch, of k * k numbers a sequence. 0: gradients are kept as they are, for small models.
        layers: patterns (``fnmatch``) of layer names; None: all that can be recorded.

    Raises:
        ValueError: dim negative; a pattern that matches no layer; nothing trainable to record.
    """

    def __init__(self, model: nn.Module, dim: int = 64, layers: Sequence[str] | None = None) -> None:
        self.sketch = GradientSketch(model, dim, layers)

    @contextmanager
    def step(self, seed: int) -> Iterator[RecordedGradients]:
        """Records the passes of one optimizer step. ``seed`` draws the projections: give the step's number.

        Raises:
            ValueError: ``seed`` isn't a whole number.
        """
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise ValueError(f"seed={seed!r} must be a whole number: the step's number")
        with self.sketch.step(seed) as recorded:
            yield RecordedGradients(self.sketch, recorded)
