"""``GradientRecorder`` measures how the prompts' gradients interfere, in any training loop.

Shapes: B sequences of a step, S of a micro-batch, R rows, T positions, M replicates of a sketch, K numbers in each.
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
    """The per-sequence gradients of one step, in the order of its ``rows`` calls. Readable after the step."""

    _sketch: GradientSketch
    _recorded: list[StepSketch] = field(default_factory=list)

    @contextmanager
    def rows(self, prompt_S: torch.Tensor, sequence_RT: torch.Tensor | None = None) -> Iterator[None]:
        """Records the forward and backward pass of one micro-batch in this context.

        Args:
            prompt_S: (S,) integers, the prompt of each sequence.
            sequence_RT: (R, T) integers, each position's sequence in [0, S), -1 for none. None: row i is sequence i.
        """
        with self._sketch.rows(prompt_S, sequence_RT):
            yield

    @property
    def step(self) -> StepSketch:
        """The sketches. Raises ``ValueError`` while the step is open."""
        if not self._recorded:
            raise ValueError("the step is still open: read its gradients after the with block")
        return self._recorded[0]

    @property
    def prompt_ids(self) -> torch.Tensor:
        """(B,) the prompt of each sequence."""
        return self.step.prompt_B

    def inner_products(self) -> torch.Tensor:
        """Returns the (B, B) float64 inner products of the per-sequence gradients."""
        return self.step.gram()

    def sketch_rmse(self) -> float:
        """Returns the predicted RMSE of one cosine of two prompts' gradients; 0.0 if the gradients are exact."""
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
        """Compares each parameter's recorded sum with its ``.grad``, which must be this step's alone and not clipped.

        Returns the relative error of each parameter that differs, by name. The next step doesn't record them.
        """
        return self._sketch.exclude_mismatches([parameter.grad for parameter in self._sketch.trainable_parameters])


class GradientRecorder:
    """Records a small sketch of each sequence's gradient in an optimizer step::

        recorder = GradientRecorder(model)
        with recorder.step(seed=number) as gradients:
            for batch in micro_batches:
                with gradients.rows(batch["prompt_id"]):  # (S,) integers, one for each row
                    loss_of(model, batch).backward()
        gradients.check_gradients()
        print(gradients.metrics(rewards)["interference/cos_mean"])
        optimizer.step()

    It adds hooks to the model only while a step is open, and changes no forward or backward value. ``GradientSketch``
    lists the layers that it can record and the wrappers that the model may have.

    Args:
        model: any torch module.
        dim: k; a sketch has k * k numbers per sequence. 0: it keeps exact gradients, for small models.
        layers: patterns (``fnmatch``) of layer names; None: every layer that it can record.

    Raises:
        ValueError: ``dim`` is negative, a pattern matches no layer, or no trainable layer can be recorded.
    """

    def __init__(self, model: nn.Module, dim: int = 64, layers: Sequence[str] | None = None) -> None:
        self.sketch = GradientSketch(model, dim, layers)

    @contextmanager
    def step(self, seed: int) -> Iterator[RecordedGradients]:
        """Records the passes of one optimizer step. ``seed`` draws the random projections: pass the step's number.

        Raises:
            ValueError: ``seed`` isn't an integer.
        """
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise ValueError(f"seed={seed!r} must be a whole number: the step's number")
        with self.sketch.step(seed) as recorded:
            yield RecordedGradients(self.sketch, recorded)
