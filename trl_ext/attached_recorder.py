"""``attach(trainer)`` records the prompts' gradients in TRL's own ``GRPOTrainer`` and ``RLOOTrainer``.

The loss of these trainers gets neither groups nor rewards: RLOO and GRPO shuffle a generation batch, and pass on tokens
and advantages. So ``attach`` wraps four methods of the trainer, and changes no number that they compute::

    _calculate_rewards                 keeps the rewards of all ranks
    _generate_and_score_completions    adds two columns to the batch, which TRL shuffles and splits with the others
    compute_loss                       passes them to ``recorder.rows``
    training_step                      opens and closes the recorder's step, logs and saves

TRL multiplies by the LM head's weight without calling the head, so a tap can't record it. That parameter, and the
embeddings if they are tied to it, aren't recorded: the log names them, and they aren't in ``interference/coverage``.

Shapes: B sequences of this rank's generation batch, A of all ranks, F reward functions.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from accelerate.utils import DistributedType
from transformers import TrainerCallback

from grpo_kernels import GradientRecorder
from grpo_kernels.interference.layer_taps import active_module

from .compat import TRL_HAS_HEAD, ChangedTRL
from .report.run_files import RunFiles, describe_run

GROUP, REWARD = "recorder_group", "recorder_reward"  # our columns of a batch
WRAPPED = ("_calculate_rewards", "_generate_and_score_completions", "compute_loss", "training_step")
READ = ("_metrics", "_logs", "_step", "num_generations", "num_iterations", "reward_weights", "reward_func_names")
STATE = "GradientRecorder"  # in trainer_state.json
ATTACHED = "_attached_recorder"


def attach(trainer: Any, every: int = 10, **options: Any) -> Attached:
    """Records every tenth optimizer step of ``trainer.train()``, and returns what undoes it::

        trainer = RLOOTrainer(model=..., reward_funcs=..., args=args, train_dataset=...)
        attach(trainer)
        trainer.train()  # python -m trl_ext report OUTPUT_DIR

    Metrics go into the trainer's log, files into its ``output_dir``. Training stays as it was, bit for bit.

    Args:
        trainer: TRL's ``GRPOTrainer`` or ``RLOOTrainer``, or a subclass.
        every: optimizer steps from one logged step to the next.
        options: those of ``GradientRecorder``: ``dim``, ``layers``, ``seed``.

    Raises:
        ValueError: the trainer is another one, has a recorder already, runs DeepSpeed, or an option is wrong.
        ChangedTRL: the installed TRL lacks what this module uses.
    """
    if hasattr(trainer, "_components"):
        raise ValueError("this trainer has a recorder of its own: set interference_every")
    if hasattr(trainer, ATTACHED):
        raise ValueError("a recorder is attached to this trainer already: call detach() first")
    if not all(hasattr(trainer, name) for name in ("_generate_and_score_completions", "reward_funcs")):
        raise ValueError(f"attach works with TRL's GRPOTrainer and RLOOTrainer, not with {type(trainer).__name__}")
    if missing := [name for name in (*WRAPPED, *READ) if not hasattr(trainer, name)]:
        raise ChangedTRL(f"{type(trainer).__name__} has no {missing[0]}")
    if trainer.accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError("attach doesn't work with DeepSpeed, which keeps gradients elsewhere: use FSDP2 or DDP")
    skip = head_parameters(trainer.model) if TRL_HAS_HEAD else []
    return Attached(trainer, GradientRecorder(trainer.model, every, skip=skip, **options))


def head_parameters(model: torch.nn.Module) -> list[str]:
    """Returns the names of the LM head's parameters, and of those tied to them."""
    find_head: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = active_module(find_head())
    own = set() if head is None else {id(parameter) for parameter in head.parameters()}
    return [name for name, one in model.named_parameters(remove_duplicate=False) if id(one) in own]


class Attached:
    """A recorder at work in a trainer of TRL's.

    Attributes:
        recorder: the ``GradientRecorder``.
    """

    def __init__(self, trainer: Any, recorder: GradientRecorder) -> None:
        self.trainer, self.recorder = trainer, recorder
        self._open: ExitStack | None = None  # the recorder's step
        self._reward_A: torch.Tensor | None = None  # of the latest generation batch
        self._first_group = 0  # of the next generation batch
        self._texts: dict[int, str] = {}  # of the prompts since the latest logged step, by group
        recorder.loss_scale = self._loss_scale
        self._before = {name: vars(trainer).get(name) for name in WRAPPED}
        wrappers: tuple[Callable[..., Any], ...] = (self._rewards, self._generate, self._loss, self._training_step)
        for name, wrapper in zip(WRAPPED, wrappers, strict=True):
            setattr(trainer, name, partial(wrapper, getattr(trainer, name)))
        setattr(trainer, ATTACHED, self)
        describe = partial(describe_run, trainer.args, trainer.model, type(trainer), trainer.reward_func_names)
        self._callbacks = [RecorderState(recorder), RunFiles(describe)]
        for callback in self._callbacks:
            trainer.add_callback(callback)

    def detach(self) -> None:
        """Restores the trainer's methods."""
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

    # ---- the wrapped methods; the first argument is TRL's

    def _rewards(self, calculate: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        reward_AF = calculate(*args, **kwargs)
        with self.recorder.guarded():
            weights_F = self.trainer.reward_weights.to(reward_AF.device)
            unscorable_A = reward_AF.isnan().all(1)
            self._reward_A = (reward_AF * weights_F).nansum(1).masked_fill(unscorable_A, torch.nan)
        return reward_AF

    def _generate(self, generate: Callable[..., Any], inputs: Any, *args: Any, **kwargs: Any) -> Any:
        batch = generate(inputs, *args, **kwargs)
        if self.trainer.model.training:
            with self.recorder.guarded():
                batch |= self._columns(len(inputs), batch["advantages"].device)
        return batch

    def _columns(self, count: int, device: torch.device) -> dict[str, torch.Tensor]:
        """Returns our columns (B,) of a generation batch of ``count`` sequences on each rank."""
        reward_A, size = self._reward_A, self.trainer.num_generations
        if reward_A is None or len(reward_A) != count * self.trainer.accelerator.num_processes:
            raise ValueError("the rewards aren't those of the generation batch")
        group_A = torch.arange(len(reward_A), device=device) // size + self._first_group
        prompts = list(self.trainer._logs["prompt"])[-len(reward_A) :][::size]
        self._texts |= {self._first_group + i: prompt_text(prompt) for i, prompt in enumerate(prompts)}
        self._first_group += len(reward_A) // size
        here = slice(
            count * self.trainer.accelerator.process_index, count * (self.trainer.accelerator.process_index + 1)
        )
        return {GROUP: group_A[here], REWARD: reward_A[here].to(device)}

    def _loss(self, compute: Callable[..., Any], model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self._open is not None and torch.is_grad_enabled():
            with self.recorder.guarded():
                self.recorder.rows(
                    inputs[GROUP], inputs[REWARD], inputs["advantages"], group_size=self.trainer.num_generations
                )
        return compute(model, {k: v for k, v in inputs.items() if k not in (GROUP, REWARD)}, *args, **kwargs)

    def _training_step(self, run: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
        trainer, recorder = self.trainer, self.recorder
        if self._open is None:
            recorder.model, recorder.number = trainer.accelerator.unwrap_model(model), trainer.state.global_step
            again = trainer._step // trainer.args.steps_per_generation % trainer.num_iterations
            self._open = ExitStack()
            self._open.enter_context(recorder.step(fresh=again == 0))
        try:
            loss = run(model, *args, **kwargs)
        except BaseException:
            step, self._open = self._open, None
            step.__exit__(*sys.exc_info())
            raise
        if trainer.accelerator.sync_gradients:
            step, self._open = self._open, None
            step.close()
            self._log()
        return loss

    def _log(self) -> None:
        """Logs and saves the step that has just ended, if it was logged."""
        for name, value in self.recorder.metrics().items():
            self.trainer._metrics["train"][name].append(value)
        self.recorder.save(self.trainer.args.output_dir, self._texts)
        latest = self._first_group - self.trainer.args.generation_batch_size // self.trainer.num_generations
        self._texts = {group: text for group, text in self._texts.items() if group >= latest}


def prompt_text(prompt: Any) -> str:
    """Returns a prompt's text; of a conversation, that of its last message."""
    content = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    if isinstance(content, str):
        return content
    return " ".join(part.get("text", "") for part in content if isinstance(part, dict))


class RecorderState(TrainerCallback):
    """Saves the recorder's state in ``trainer_state.json``, and restores it when training resumes."""

    def __init__(self, recorder: GradientRecorder) -> None:
        self.recorder = recorder

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (saved := state.stateful_callbacks.get(STATE)) is not None:
            self.recorder.load_state_dict(saved)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.recorder.metrics():
            state.stateful_callbacks[STATE] = self.recorder.state_dict()
