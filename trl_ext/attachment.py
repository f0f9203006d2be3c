"""``Attachment`` puts a ``GradientRecorder`` to work in a trainer of TRL's: what all kinds of trainers have in common.

TRL multiplies by the LM head's weight without calling the head, so a tap can't record it. That parameter, and the
embeddings if they are tied to it, aren't recorded: the log names them, and they aren't in ``interference/coverage``.
After ``fuse_head`` they are, because our kernel computes the head's gradient.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers import TrainerCallback

from grpo_kernels import GradientRecorder
from grpo_kernels.interference.layer_taps import active_module
from grpo_kernels.recorder.run_statistics import RunStatistics

from .report.run_files import RunFiles, describe_run

STATE = "GradientRecorder"  # in trainer_state.json
ATTACHED = "_attached_recorder"


def head_parameters(model: torch.nn.Module) -> list[str]:
    """Returns the names of the LM head's parameters, and of those tied to them."""
    find_head: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = active_module(find_head())
    own = set() if head is None else {id(parameter) for parameter in head.parameters()}
    return [name for name, one in model.named_parameters(remove_duplicate=False) if id(one) in own]


def prompt_text(prompt: Any) -> str:
    """Returns a prompt's text; of a conversation, that of its last message. Empty if it has none."""
    content = prompt if isinstance(prompt, str) or not prompt else prompt[-1].get("content")
    if isinstance(content, str):
        return content
    return " ".join(str(part.get("text") or "") for part in content or [] if isinstance(part, dict))


class Attachment(ABC):
    """A recorder at work in a trainer of TRL's.

    Attributes:
        recorder: the ``GradientRecorder``.

    Args:
        trainer: TRL's.
        recorder: records the trainer's model.
        wrappers: by name of a method of the trainer's, the function to call in its place. Its first argument is TRL's.
        reward_names: the names of the reward functions, for the run's configuration.
    """

    def __init__(
        self,
        trainer: Any,
        recorder: GradientRecorder,
        wrappers: Mapping[str, Callable[..., Any]],
        reward_names: list[str],
    ) -> None:
        self.trainer, self.recorder = trainer, recorder
        recorder.device = trainer.accelerator.device
        recorder.loss_scale = self._loss_scale
        self._before = {name: vars(trainer).get(name) for name in wrappers}
        for name, wrapper in wrappers.items():
            setattr(trainer, name, partial(wrapper, getattr(trainer, name)))
        setattr(trainer, ATTACHED, self)
        describe = partial(describe_run, trainer.args, trainer.model, type(trainer), reward_names)
        self._callbacks = [RecorderState(recorder), RunFiles(describe)]
        for callback in self._callbacks:
            trainer.add_callback(callback)

    def detach(self) -> None:
        """Restores the trainer's methods. Nothing happens if the recorder is detached already."""
        if getattr(self.trainer, ATTACHED, None) is not self:
            return
        self.recorder.abandon()  # a callback may detach between the micro-batches of a step
        for name, before in self._before.items():
            delattr(self.trainer, name)
            if before is not None:
                setattr(self.trainer, name, before)
        for callback in self._callbacks:
            self.trainer.remove_callback(callback)
        delattr(self.trainer, ATTACHED)

    def _loss_scale(self) -> float:
        scaler = getattr(self.trainer.accelerator, "scaler", None)
        return 1.0 if scaler is None else scaler.get_scale()

    @contextmanager
    def _micro_batch(self, model: Any, *, fresh: bool) -> Iterator[None]:
        """Opens the recorder's step at the optimizer step's first micro-batch; closes, logs and saves it at the last.

        ``fresh``: as in ``GradientRecorder.step``.
        """
        trainer, recorder = self.trainer, self.recorder
        if not recorder.inside:
            recorder.model, recorder.number = trainer.accelerator.unwrap_model(model), trainer.state.global_step
            recorder.begin(fresh=fresh)
        try:
            yield
        except BaseException:
            recorder.abandon()
            raise
        if trainer.accelerator.sync_gradients:
            recorder.end()
            for name, value in recorder.metrics().items():
                trainer._metrics["train"][name].append(value)
            with recorder.guarded():
                recorder.save(trainer.args.output_dir, self._prompt_texts())

    @abstractmethod
    def _prompt_texts(self) -> dict[int, str]:
        """Returns the prompts' texts by group. It is called at the end of each optimizer step."""


class RecorderState(TrainerCallback):
    """Saves the recorder's state in ``trainer_state.json``, and restores it when training resumes."""

    def __init__(self, recorder: GradientRecorder) -> None:
        self.recorder = recorder

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.recorder.abandon()  # a step that an exception interrupted
        if state.global_step == 0:  # a trainer may train several times
            self.recorder.statistics, self.recorder.started = RunStatistics(), time.time()
        if (saved := state.stateful_callbacks.get(STATE)) is not None:
            with self.recorder.guarded():
                self.recorder.load_state_dict(saved)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.recorder.metrics():
            state.stateful_callbacks[STATE] = self.recorder.state_dict()
