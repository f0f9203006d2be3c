"""``AttachedAsync`` records the prompts' gradients in TRL's ``AsyncGRPOTrainer``. ``attach`` makes it.

The loss gets each token's advantage and its sample's place in the row, but neither groups nor rewards, and a row's
samples share their common prefixes. So two methods are wrapped::

    get_train_dataloader    watches the rollout queue, and adds our columns to the collator's batches
    training_step           opens and closes the recorder's step; in a logged step, forwards the samples unshared

A step's gradient and loss stay as they were up to rounding. The log keeps the loss and the metrics of TRL's own row,
which a logged step forwards once more without gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from grpo_kernels import GradientRecorder

from .async_metrics import COUNTS, unlogged
from .attachment import Attachment, prompt_text
from .unshared_rows import ADVANTAGE, GROUP, REWARD, SIZE, Batch, Forward, UnsharedRow, sample_columns, unshare

WRAPPED = ("get_train_dataloader", "training_step")
NEEDED = (*WRAPPED, *COUNTS, "compute_loss", "_metrics", "_rollout_dataset", "aux_loss_enabled")
REMEMBERED = 4096  # groups whose prompts' texts are kept
NEVER = 2**31  # a group size that no step reaches


class AttachedAsync(Attachment):
    """A recorder at work in ``AsyncGRPOTrainer``."""

    def __init__(self, trainer: Any, recorder: GradientRecorder) -> None:
        self._groups: dict[int, SeenGroup] = {}  # on the first rank, which has the queue
        wrappers: tuple[Callable[..., Any], ...] = (self._dataloader, self._training_step)
        super().__init__(trainer, recorder, dict(zip(WRAPPED, wrappers, strict=True)), [])

    # ---- the wrapped methods; the first argument is TRL's

    def _dataloader(self, make: Callable[[], Any]) -> Any:
        loader = make()
        if (dataset := self.trainer._rollout_dataset) is not None:
            dataset.queue = WatchedQueue(dataset.queue, self._observe)
        inner = getattr(loader, "base_dataloader", loader)  # accelerate's wraps the one that calls the collator
        collate = inner.collate_fn

        def collate_with_columns(examples: list[Any]) -> Batch:
            batch = collate(examples)
            with self.recorder.guarded():
                batch |= sample_columns(examples[0], self._group_size)
            return batch

        inner.collate_fn = collate_with_columns
        return loader

    def _training_step(self, run: Callable[..., torch.Tensor], model: Any, inputs: Batch, *args: Any) -> torch.Tensor:
        with self._micro_batch(model, fresh=True):
            if not self.recorder.recording:
                return run(model, inputs, *args)
            row, count, shared = self._unshare(inputs)
            if row is None or not shared:
                self._assign(None if row is None else row.forwards[0])
                return run(model, inputs, *args)
            loss = self._packed_loss(model, inputs)
            with unlogged(self.trainer):
                for forward in [*row.forwards, *[None] * (count - len(row.forwards))]:
                    self._assign(forward)
                    run(model, row.idle if forward is None else forward.inputs, *args)
            self.trainer._step_microbatches += 1
            return loss

    # ---- a logged step

    def _unshare(self, inputs: Batch) -> tuple[UnsharedRow | None, int, bool]:
        """Returns this rank's row, the most forwards of a rank, and whether samples of any rank share a position.

        A collective. The row is None on all ranks if it failed on one.
        """
        row = None
        with self.recorder.guarded():
            row = unshare(inputs, self.trainer.args.token_budget)
        found = [1, 0, 0] if row is None else [0, len(row.forwards), int(row.shared)]
        found_RN = self.trainer.accelerator.gather(torch.tensor([found], device=self.trainer.accelerator.device))
        failed, count, shared = found_RN.amax(0).tolist()
        if failed and row is not None:
            with self.recorder.guarded():
                raise RuntimeError("another rank failed")
        return None if failed else row, count, bool(shared)

    def _packed_loss(self, model: Any, inputs: Batch) -> torch.Tensor:
        """Returns the loss of TRL's own row, and adds to TRL's metrics and counts.

        It runs before the passes that have gradients, because FSDP2 reshards the root's parameters after a backward.
        """
        model.train()  # as TRL's training_step does
        if callable(train := getattr(self.trainer.optimizer, "train", None)):
            train()
        with torch.no_grad():
            return self.trainer.compute_loss(model, self.trainer._prepare_inputs(inputs))

    def _assign(self, forward: Forward | None) -> None:
        """Assigns the next forward and backward pass to its samples; None: it adds nothing to the gradient."""
        with self.recorder.guarded():
            if forward is None:
                self.recorder.end_rows()
                return
            group_S, size_S, reward_S, advantage_S = (
                forward.inputs[name][0, forward.samples] for name in (GROUP, SIZE, REWARD, ADVANTAGE)
            )
            self.recorder.rows(group_S, reward_S, advantage_S, segments=forward.segment_RT, group_size=size_S)

    # ---- the queue's samples, on the first rank

    def _observe(self, sample: Any) -> None:
        """Keeps a sample's prompt, and whether a conversation of its group became several samples."""
        with self.recorder.guarded():
            group = self._groups.setdefault(sample.group_id, SeenGroup(prompt_text(sample.prompt)))
            if (before := group.latest) is not None and before.completion == sample.completion:
                group.forked |= not np.array_equal(before.input_ids, sample.input_ids)
            group.latest = sample
            while len(self._groups) > REMEMBERED:
                del self._groups[next(iter(self._groups))]

    def _group_size(self, group_id: int) -> int:
        """Returns the samples of a whole group. One with forks counts as partial: its samples aren't its answers."""
        return NEVER if self._groups[group_id].forked else self.trainer.args.num_generations

    def _prompt_texts(self) -> dict[int, str]:
        return {group_id: group.text for group_id, group in self._groups.items()}


@dataclass
class SeenGroup:
    """A group of which the queue gave samples.

    Attributes:
        text: the prompt's.
        latest: the latest sample.
        forked: whether a conversation became several samples, because its history was rewritten.
    """

    text: str
    latest: Any = None
    forked: bool = False


class WatchedQueue:
    """The rollout queue; calls ``observe`` with each sample that is taken from it."""

    def __init__(self, queue: Any, observe: Callable[[Any], None]) -> None:
        self._queue, self._observe = queue, observe

    def get(self, *args: Any, **kwargs: Any) -> Any:
        sample = self._queue.get(*args, **kwargs)
        self._observe(sample)
        return sample

    def qsize(self) -> int:
        return self._queue.qsize()
