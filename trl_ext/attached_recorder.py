"""``attach(trainer)`` records the prompts' gradients in TRL's own trainers, and changes no number that they compute.

The loss of ``GRPOTrainer`` and ``RLOOTrainer`` gets neither groups nor rewards: they shuffle a generation batch, and
pass on tokens and advantages. So ``attach`` wraps four methods::

    _calculate_rewards                 keeps the rewards of all ranks
    _generate_and_score_completions    adds two columns to the batch, which TRL shuffles and splits with the others
    compute_loss                       passes them to ``recorder.rows``
    training_step                      opens and closes the recorder's step, logs and saves

``attached_async.py`` does the same for ``AsyncGRPOTrainer``.

Shapes: B sequences of this rank's generation batch, A of all ranks, F reward functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import DistributedType

from grpo_kernels import GradientRecorder

from . import attached_async
from .attachment import ATTACHED, Attachment, head_parameters, prompt_text
from .compat import TRL_HAS_HEAD, ChangedTRL
from .fused_async import FUSED

GROUP, REWARD = "recorder_group", "recorder_reward"  # our columns of a batch
WRAPPED = ("_calculate_rewards", "_generate_and_score_completions", "compute_loss", "training_step")
READ = ("_metrics", "_logs", "_step", "num_generations", "num_iterations", "reward_weights", "reward_func_names")


def attach(trainer: Any, every: int = 10, **options: Any) -> Attachment:
    """Records every tenth optimizer step of ``trainer.train()``, and returns what undoes it::

        trainer = RLOOTrainer(model=..., reward_funcs=..., args=args, train_dataset=...)
        attach(trainer)
        trainer.train()  # python -m trl_ext report OUTPUT_DIR

    Metrics go into the trainer's log, files into its ``output_dir``. Training stays as it was, bit for bit; that of
    ``AsyncGRPOTrainer`` up to rounding in logged steps, in which a prefix of several samples is forwarded for each.
    With dropout these steps draw other masks.

    Args:
        trainer: TRL's ``GRPOTrainer``, ``RLOOTrainer`` or ``AsyncGRPOTrainer``, or a subclass.
        every: optimizer steps from one logged step to the next.
        options: those of ``GradientRecorder``: ``dim``, ``layers``, ``seed``.

    Raises:
        ValueError: the trainer is another one, has a recorder already, runs DeepSpeed, adds an auxiliary loss to the
            asynchronous one, or an option is wrong.
        ChangedTRL: the installed TRL lacks what this module uses.
    """
    if hasattr(trainer, "_components"):
        raise ValueError("this trainer has a recorder of its own: set interference_every")
    if hasattr(trainer, ATTACHED):
        raise ValueError("a recorder is attached to this trainer already: call detach() first")
    asynchronous = hasattr(trainer, "rollout_queue")
    if not asynchronous and not all(hasattr(trainer, n) for n in ("_generate_and_score_completions", "reward_funcs")):
        raise ValueError(
            f"attach works with TRL's GRPOTrainer, RLOOTrainer and AsyncGRPOTrainer, not with {type(trainer).__name__}"
        )
    needed = attached_async.NEEDED if asynchronous else (*WRAPPED, *READ)
    if missing := [name for name in needed if not hasattr(trainer, name)]:
        raise ChangedTRL(f"{type(trainer).__name__} has no {missing[0]}")
    if trainer.accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError("attach doesn't work with DeepSpeed, which keeps gradients elsewhere: use FSDP2 or DDP")
    if asynchronous and trainer.aux_loss_enabled:
        raise ValueError(
            "attach splits rows of AsyncGRPOTrainer, over which a load-balancing loss doesn't add up: set "
            "router_aux_loss_coef=0"
        )
    fused = getattr(trainer, FUSED, None)
    skip = head_parameters(trainer.model) if TRL_HAS_HEAD and fused is None else []
    recorder = GradientRecorder(trainer.model, every, skip=skip, **options)
    if fused is not None:
        fused.head.head_sketch = recorder.head_sketch
    return attached_async.AttachedAsync(trainer, recorder) if asynchronous else Attached(trainer, recorder)


class Attached(Attachment):
    """A recorder at work in ``GRPOTrainer`` or ``RLOOTrainer``."""

    def __init__(self, trainer: Any, recorder: GradientRecorder) -> None:
        self._reward_A: torch.Tensor | None = None  # of the latest generation batch
        self._first_group = 0  # of the next generation batch
        self._texts: dict[int, str] = {}  # of the prompts since the latest logged step, by group
        wrappers: tuple[Callable[..., Any], ...] = (self._rewards, self._generate, self._loss, self._training_step)
        super().__init__(trainer, recorder, dict(zip(WRAPPED, wrappers, strict=True)), trainer.reward_func_names)

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
        if self.recorder.inside and torch.is_grad_enabled():
            with self.recorder.guarded():
                self.recorder.rows(
                    inputs[GROUP], inputs[REWARD], inputs["advantages"], group_size=self.trainer.num_generations
                )
        return compute(model, {k: v for k, v in inputs.items() if k not in (GROUP, REWARD)}, *args, **kwargs)

    def _training_step(self, run: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
        again = self.trainer._step // self.trainer.args.steps_per_generation % self.trainer.num_iterations
        with self._micro_batch(model, fresh=again == 0):
            return run(model, *args, **kwargs)

    def _prompt_texts(self) -> dict[int, str]:
        """Returns the texts since the latest logged step, and forgets those before the latest generation batch."""
        texts = self._texts
        latest = self._first_group - self.trainer.args.generation_batch_size // self.trainer.num_generations
        self._texts = {group: text for group, text in texts.items() if group >= latest}
        return texts
