"""``CurvatureGRPOTrainer``: TRL's ``GRPOTrainer`` with our normalisation, on what has a gradient.

Flow: TRL generates -> rewards, gathered (``_calculate_rewards``) -> other prompts for dead ones, if asked for
(``resampling.py``) -> advantages by our normalisation (``advantages.py``) -> old and reference log-probs of what is
used (``deferred_logprobs.py``) -> TRL's per-sequence dict, with what later stages need
(``_generate_and_score_completions``) -> micro-batches of what has a gradient (``_prepare_inputs``,
``micro_batches.py``) -> backbone, and hidden states to the loss in one pass (``_compute_loss``, ``fused_loss.py``,
``fused_head.py``).

Shapes: P prompts, G completions of one prompt, B = P*G sequences (of this process), F reward functions.
"""

from __future__ import annotations

import textwrap
import time
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn.utils.rnn import pad_sequence
from transformers import TrainerCallback
from trl import GRPOTrainer

from trl_ext.batches.deferred_logprobs import fill_logprobs, why_complete
from trl_ext.batches.micro_batches import NOTHING, MicroBatches
from trl_ext.interference.log import InterferenceLog
from trl_ext.loss.fused_head import CompletionMask, add_fused_head, head_adapter, head_adapters_allowed, read_settings
from trl_ext.loss.fused_loss import live_mask, one_pass_loss, why_not_one_pass
from trl_ext.loss.token_weights import live_tokens, micro_batch_token_weights, token_weights
from trl_ext.report.live import LiveImages
from trl_ext.report.run_files import RunFiles
from trl_ext.rewards.advantages import (
    compute_advantages,
    normalization_metrics,
    number_of_states,
    observe_rewards,
    weighted_rewards,
)
from trl_ext.rewards.normalization_state import make_state, restore_states
from trl_ext.rewards.prompt_keys import prompt_key, prompt_text
from trl_ext.rewards.resampling import Resampling, check_dataset
from trl_ext.rewards.reward_checks import checked_reward

from .config import resolve_normalization

logger = get_logger(__name__)
STATE_NAME = "CurvatureGRPOTrainer"  # in trainer_state.json, among the states of callbacks


class RestoreState(TrainerCallback):
    """When training starts, a trainer takes up the state it has saved in the checkpoint it resumes from."""

    def __init__(self, trainer: CurvatureGRPOTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._micro_batches.forget()
        self.trainer._generated_at = -1
        saved = state.stateful_callbacks.get(STATE_NAME)
        if saved is not None:
            self.trainer._interference.load_state_dict(saved["interference"])
        if saved is not None and not restore_states(self.trainer._normalization_states, saved["normalization"]):
            logger.warning(
                "The checkpoint was saved with another normalization, reward functions or multi_objective_aggregation: "
                "the normalisation's state starts anew."
            )


class CurvatureGRPOTrainer(GRPOTrainer):
    """A drop-in ``GRPOTrainer``: the same arguments, with a ``CurvatureGRPOConfig`` (or a plain ``GRPOConfig``).

    What it changes of its parent, in the order of the flow, and nothing else:

    * ``__init__``: checks the normalisation before a model is loaded; a reward function that raises, or returns the
      wrong number of rewards or an infinite one, is named; 4-bit layers stay trainable on every CPU.
    * ``_calculate_rewards``: keeps the gathered rewards, and with them the completions' lengths and prompts' keys.
    * ``_generate_and_score_completions``: replaces TRL's advantages, also in the logged table, by
      ``normalization``'s, logs ``normalization/...``, and adds to the per-sequence dict: ``prompt_id`` (B,) int64,
      the group's number in the generation batch, the same on every process; ``group_position`` (B,) int64, in
      [0, G); ``prompt_key`` (B,) int64, the same whenever the prompt comes back; ``group_rewards`` (B, G), the
      weighted rewards of the sequence's whole group, NaN where unscorable; ``token_weight`` (B,), see
      ``token_weights.py``; ``made_advantages`` (B,), a copy of the advantages, by which a subclass's own are noticed.
    * ``training_step`` and ``compute_loss``: every ``interference_every`` optimizer steps each sequence's gradient is
      sketched on the way, and ``interference/...``, ``curvature/...``, ``theory/...`` and ``phase`` are logged.
    * ``_prepare_inputs``: in training hands out the micro-batches of ``micro_batches.py``, in place of TRL's, with the
      ``token_weight`` that each sequence has in TRL's; one in which nothing is to be run has the key ``NOTHING`` alone,
      and ``compute_loss`` answers it with 0.
    * ``_compute_loss``: with ``fused_loss`` the loss in one pass over our head, where it is a sum over single tokens;
      else the parent's, on log-probs of our head, which is said once in the log. A subclass that overrides it keeps
      its own.
    * ``_generate`` keeps the tool mask, and ``_get_per_token_logps_and_entropies`` uses it: tool output is never
      projected. The latter's calls for old and reference log-probs get zeros, which are filled in once rewards are
      known (``deferred_logprobs.py``); a subclass with its own ``_generate_and_score_completions`` gets all at once.
    * ``_save_checkpoint``: the normalisation's state (``normalization_state.py``) goes into ``trainer_state.json``,
      and is taken up again when training resumes.
    * Two callbacks: ``run_files.py`` keeps the configuration and the log in the run's folder, ``report/live.py`` sends
      images to the backends of ``report_to``.
    * ``end``: waits for gloo's worker thread, which could hang the process.

    With TRL's own normalisations the advantages are TRL's to rounding, except that a group whose rewards are all
    equal gets exactly 0 (TRL's float residue gives up to 6e-4).
    """

    _tag_names: ClassVar = ["trl", "grpo", "curvature-grpo"]
    _name = "Curvature-aware GRPO"
    _paper: ClassVar = {
        "title": "Why GRPO Needs Normalization: A Local-Curvature Perspective on Adaptive Gradients",
        "id": "2601.23135",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{ge2026normalization,
                title        = {{Why GRPO Needs Normalization: A Local-Curvature Perspective on Adaptive Gradients}},
                author       = {Cheng Ge and Caitlyn Heqi Yin and Hao Liang and Jiawei Zhang},
                year         = 2026,
                eprint       = {arXiv:2601.23135},
            }"""),
    }

    def __init__(self, model: Any, reward_funcs: Any = None, args: Any = None, *rest: Any, **kwargs: Any) -> None:
        if args is not None:
            resolve_normalization(args)
        if getattr(args, "resample_zero_variance", False):
            check_dataset(kwargs.get("train_dataset", rest[0] if rest else None))
        fused = getattr(args, "fused_loss", True)
        with head_adapters_allowed() if fused else nullcontext():
            super().__init__(model, reward_funcs, args, *rest, **kwargs)
        self._normalization, self._normalization_options = resolve_normalization(self.args)
        self.reward_funcs: list[Any] = [
            checked_reward(function, name)
            for function, name in zip(self.reward_funcs, self.reward_func_names, strict=True)
        ]
        # On CPUs with bf16 instructions bitsandbytes repacks a 4-bit weight for good at the first forward in eval mode
        # (generation), and its product with a repacked weight has no gradient: nothing would be trained, silently.
        for module in self.model.modules():
            if getattr(module, "support_avx512bf16_for_cpu", False):
                module.support_avx512bf16_for_cpu = False
        self._normalization_states = [
            make_state(self._normalization, self._normalization_options)
            for _ in range(number_of_states(len(self.reward_funcs), self.multi_objective_aggregation))
        ]
        self.add_callback(RestoreState(self))
        self.add_callback(RunFiles(self._describe))
        self.add_callback(LiveImages(self))
        self._seconds: dict[str, float] = {}  # of this optimizer step, by stage
        self._gathered_rewards_BF = torch.empty(0, 0)
        self._fused_loss = fused
        self._completion_mask = CompletionMask()
        self._tool_mask_BT: torch.Tensor | None = None
        self._said: set[str] = set()
        self._interference = InterferenceLog(self)
        if fused:
            self._add_fused_heads()
        self._skip_zero_advantage = getattr(args, "skip_zero_advantage", True)
        self._full_entropy = getattr(args, "full_entropy", False)
        self._micro_batches = MicroBatches(self)
        self._resampling = Resampling(self) if getattr(args, "resample_zero_variance", False) else None
        self._generated_at, self._generation_of_step = -1, 0  # the optimizer step, and how many it has had before
        self._logprobs_wait = False  # TRL's calls for old and reference log-probs get zeros, to be filled in
        self._logprobs_due = 0  # calls that got zeros

    def _add_fused_heads(self) -> None:
        base = self.model.get_base_model() if is_peft_model(self.model) else self.model
        head = base.get_output_embeddings()
        if isinstance(head, BaseTunerLayer):
            if self.args.cast_lm_head_to_fp32:
                raise ValueError("cast_lm_head_to_fp32=True can't be used with an adapter on lm_head")
            head_adapter(head, torch.zeros(1, head.get_base_layer().in_features, device=self.model.device))  # refuses
        settings = read_settings(base)
        add_fused_head(
            base,
            settings,
            self._completion_mask,
            entropy=True,
            head_sketch=lambda *of_head: self._interference.head_sketch(*of_head),
        )
        if self.ref_model is not None:
            add_fused_head(
                self.accelerator.unwrap_model(self.ref_model), settings, self._completion_mask, entropy=False
            )

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        self._logprobs_wait = False
        with self._stage("rewards"):
            rewards_BF = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._gathered_rewards_BF = rewards_BF
        device = self._gathered_rewards_BF.device
        lengths_and_keys = [[len(ids), prompt_key(p)] for ids, p in zip(completion_ids_list, prompts, strict=True)]
        gathered = self.accelerator.gather(torch.tensor(lengths_and_keys, dtype=torch.int64, device=device))
        self._gathered_lengths_B, self._gathered_keys_B = gathered.unbind(1)
        return self._gathered_rewards_BF

    def _generate_and_reward(self, inputs):
        """TRL's dict, its log-probs zeros where they can wait until it is known which sequences are used."""
        self._logprobs_due = 0
        if self._resampling is not None:
            for column in self._logs["extra"].values():
                column.clear()  # a reward function that logs none in this generation leaves no other's there
        try:
            return super()._generate_and_score_completions(inputs)
        finally:
            self._tool_mask_BT = None  # TRL shuffles the rows next
            self._logprobs_wait = False

    def _generate_and_score_completions(self, inputs):
        mode = "train" if self.model.training else "eval"
        if mode == "train":
            again = self.state.global_step == self._generated_at
            self._generation_of_step = self._generation_of_step + 1 if again else 0
            self._generated_at = self.state.global_step
        output = self._generate_and_reward(inputs)
        if mode == "train" and self._resampling is not None:
            output = self._resampling.fill(output, len(inputs))

        rewards_BF = self._gathered_rewards_BF  # of all processes
        weights_F = self.reward_weights.to(rewards_BF.device)
        num_generations = self.num_generations if mode == "train" else self.num_generations_eval
        aggregation = self.multi_objective_aggregation
        if mode == "train":
            observe_rewards(self._normalization_states, rewards_BF, weights_F, num_generations, aggregation)
        state = self._normalization_states[0]
        if not state.ready:
            self._say_once(f"normalization={self._normalization!r} is 'std' until it has seen {state.needs_signal}.")
        normalized = compute_advantages(
            rewards_BF,
            weights_F,
            num_generations,
            self._normalization,
            self._normalization_options,
            aggregation,
            self._normalization_states,
            lengths=self._gathered_lengths_B.view(-1, num_generations).to(rewards_BF.dtype),
            prompt_keys=self._gathered_keys_B[::num_generations],
        )
        advantages_B = normalized.advantages.flatten()
        self._replace_logged_advantages(advantages_B)
        metrics = normalization_metrics(rewards_BF, weights_F, num_generations, aggregation, normalized)
        for name, value in {**metrics, **state.metrics()}.items():
            self._metrics[mode][name].append(value)

        n_local = len(inputs)
        local = slice(self.accelerator.process_index * n_local, (self.accelerator.process_index + 1) * n_local)
        position_B = torch.arange(rewards_BF.shape[0], device=rewards_BF.device)
        rewards_PG = weighted_rewards(rewards_BF, weights_F).view(-1, num_generations)
        output["advantages"] = advantages_B[local]
        output["made_advantages"] = advantages_B[local].clone()
        output["prompt_id"] = (position_B // num_generations)[local]
        output["group_position"] = (position_B % num_generations)[local]
        output["group_rewards"] = rewards_PG[output["prompt_id"]]
        output["prompt_key"] = self._gathered_keys_B[local]
        if mode == "train":
            prompts = list(self._logs["prompt"])[-len(rewards_BF) :]
            if self._generation_of_step == 0:
                self._interference.prompt_texts = {}
            self._interference.prompt_texts |= {
                key: prompt_text(prompt) for key, prompt in zip(self._gathered_keys_B.tolist(), prompts, strict=False)
            }
        weights_B = token_weights(
            live_tokens(output),
            self.loss_type,
            micro_batch_size=self.args.per_device_train_batch_size if mode == "train" else n_local,
            max_completion_length=self.max_completion_length,
            num_items_in_batch=output["num_items_in_batch"],
            num_processes=self.accelerator.num_processes,
            steps_per_generation=self.args.steps_per_generation if mode == "train" else 1,
        )
        if weights_B is not None:
            output["token_weight"] = weights_B
        if self._logprobs_due:
            batch_size = self.args.per_device_train_batch_size
            if mode == "eval":
                batch_size = self.args.per_device_eval_batch_size
            with self._stage("log_probs"):
                fill_logprobs(self, output, batch_size, training=mode == "train")
        return output

    def _replace_logged_advantages(self, advantages_B: torch.Tensor) -> None:
        """TRL has just appended its own advantages of this batch to the completions table: put ours there."""
        logged = self._logs["advantages"]
        for _ in range(min(len(advantages_B), len(logged))):
            logged.pop()
        logged.extend(advantages_B.tolist())

    def _generate(self, prompts):
        with self._stage("generation"):
            generated = super()._generate(prompts)
        completion_ids, tool_mask = generated[1], generated[2]
        self._tool_mask_BT = None
        if tool_mask is not None and len(tool_mask) == len(completion_ids):
            rows = [torch.tensor(row, device=self.accelerator.device) for row in tool_mask]
            self._tool_mask_BT = pad_sequence(rows, batch_first=True, padding_value=1)
        self._logprobs_wait = why_complete(self) is None  # from here to the rewards the calls for them are TRL's
        return generated

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *rest, **kwargs):
        if self._logprobs_wait and all(kwargs.get(name) is None for name in kwargs if name != "batch_size"):
            self._logprobs_due += 1
            return torch.zeros(len(input_ids), logits_to_keep, device=input_ids.device), None, None
        mask_BT = self._tool_mask_BT
        if mask_BT is not None:
            if len(mask_BT) != len(input_ids) or mask_BT.shape[1] > logits_to_keep:
                mask_BT = None
            elif mask_BT.shape[1] < logits_to_keep:  # pad_to_multiple_of
                mask_BT = torch.nn.functional.pad(mask_BT, (0, logits_to_keep - mask_BT.shape[1]), value=1)
        with self._completion_mask.of(mask_BT):
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *rest, **kwargs
            )

    def _describe(self) -> dict[str, Any]:
        """For the run's folder: every option, and what else tells runs apart."""
        return {
            **self.args.to_dict(),
            "model_name_or_path": self.model.config._name_or_path,
            "trainer": type(self).__name__,
            "reward_functions": self.reward_func_names,
            "num_processes": self.accelerator.num_processes,
            "adapter": type(self.model).__name__ if is_peft_model(self.model) else None,
        }

    @contextmanager
    def _stage(self, name: str):
        """Seconds of a stage of training, logged under ``compute/`` at the end of the optimizer step."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self.model.training:
                self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def _log_seconds(self) -> None:
        """``compute/seconds_training`` is the rest of the step: planning, forward, backward, logging interference."""
        whole = self._seconds.pop("step", 0.0)
        self._seconds["training"] = max(0.0, whole - sum(self._seconds.values()))
        for name, seconds in self._seconds.items():
            self._metrics["train"][f"compute/seconds_{name}"].append(seconds)
        self._seconds = dict.fromkeys(self._seconds, 0.0)  # a stage that the next step hasn't takes none of its time

    def _say_once(self, text: str, level: str = "warning") -> None:
        if text not in self._said:
            self._said.add(text)
            getattr(logger, level)(text)

    def observe_orthogonality(self, orthogonality: float) -> None:
        """For ``adaptive``: how orthogonal the prompts' gradients are, in [0, 1]; the same number on every process."""
        for state in self._normalization_states:
            state.observe_orthogonality(orthogonality)

    def observe_curvature(self, prompt_id_P: torch.Tensor, curvature_P: torch.Tensor) -> None:
        """For ``curvature``: measured curvatures of prompts of the latest batch; the same on every process."""
        for state in self._normalization_states:
            state.observe_curvature(prompt_id_P, curvature_P)

    def compute_loss(self, model, inputs, *rest, **kwargs):
        if NOTHING in inputs:
            return torch.zeros((), device=self.accelerator.device, requires_grad=True)
        self._interference.rows(inputs)
        return super().compute_loss(model, inputs, *rest, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        with self._stage("step"):
            self._interference.before_micro_batch()
            try:
                loss = super().training_step(model, inputs, num_items_in_batch)
            except BaseException:
                self._interference.abandon()
                raise
            self._interference.after_micro_batch(last=self.accelerator.sync_gradients)
        if self.accelerator.sync_gradients:
            self._log_seconds()
        return loss

    def _save_checkpoint(self, model, trial):
        # written with trainer_state.json, the last file of a checkpoint: it is there whenever the checkpoint is whole
        self.state.stateful_callbacks[STATE_NAME] = {
            "normalization": [state.state_dict() for state in self._normalization_states],
            "interference": self._interference.state_dict(),
        }
        super()._save_checkpoint(model, trial)

    def _compute_loss(self, model, inputs):
        if not self._fused_loss:
            return super()._compute_loss(model, inputs)
        obstacle = why_not_one_pass(self, inputs)
        if obstacle is None:
            return one_pass_loss(self, model, inputs)
        self._say_once(f"The loss isn't made in one pass, but by TRL on our head's log-probs: {obstacle}.")
        if "tool_mask" not in inputs:
            return super()._compute_loss(model, inputs)
        try:
            # What isn't projected has log-prob 0; were the old one of a tool token -100, its ratio would overflow.
            self._tool_mask_BT = inputs["tool_mask"]
            live = live_mask(inputs)
            names = ("old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps")
            inputs = {**inputs, **{n: inputs[n] * live for n in names if inputs.get(n) is not None}}
            return super()._compute_loss(model, inputs)
        finally:
            self._tool_mask_BT = None

    def _prepare_inputs(self, generation_batch):
        inputs = super()._prepare_inputs(generation_batch)
        if self.model.training:
            return self._micro_batches.next()
        if "token_weight" not in inputs:
            inputs["token_weight"] = micro_batch_token_weights(live_tokens(inputs))
        return inputs

    def end(self):
        several = self.accelerator.num_processes > 1
        super().end()
        if several:
            # Gloo's worker thread may still hold a tensor of the last exchange, and needs Python's lock to let go of
            # it. Freeing the trainer (its DDP reducer) keeps that lock while it waits for the thread: the process hung
            # in one of four runs. So the thread gets its turn before anything is freed.
            time.sleep(0.5)
