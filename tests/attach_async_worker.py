"""TRL's asynchronous trainer of the tiny policy, fed with samples that are made up; ``run`` is one process of a run.

TRL needs a vLLM server, flash attention and a GPU's peak FLOPS. It has protocols for the first; the others are
replaced.
"""

import queue
from collections import Counter
from types import SimpleNamespace

import numpy as np
import torch
from fsdp2_on_cpu import take_processes_for_gpus
from harness import prompts, tokenizer_of
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer, async_grpo_trainer, packing
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

from trl_ext import attach, fuse_head
from trl_ext.head import forward

OPTIONS = {
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "token_budget": -1,
    "max_steps": 1,
    "max_staleness": 0,
    "weight_sync_steps": 1000,
    "optim": "sgd",
    "learning_rate": 0.02,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "seed": 7,
}

FSDP2 = {  # as accelerate launch passes examples/accelerate/fsdp2_cpu.yaml on
    "ACCELERATE_USE_CPU": "false",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def varlen_attention(query, key, value, cu_q, cu_k, longest_q, longest_k, softmax_scale, causal, window_size, **kwargs):
    """Flash attention's variable-length attention in plain torch: (N, heads, D), one block of queries at a time."""
    assert causal and window_size == (-1, -1) and not kwargs
    assert longest_q == cu_q.diff().max() and longest_k == cu_k.diff().max()
    groups, outputs = query.shape[1] // key.shape[1], []
    for i in range(len(cu_q) - 1):
        q = query[cu_q[i] : cu_q[i + 1]].transpose(0, 1)
        k, v = (x[cu_k[i] : cu_k[i + 1]].transpose(0, 1).repeat_interleave(groups, dim=0) for x in (key, value))
        seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        scores = (q @ k.transpose(1, 2) * softmax_scale).masked_fill(~seen, -torch.inf)
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


class FilledWorker:
    """A rollout worker whose samples are there from the start."""

    def __init__(self, samples):
        self.rollout_buffer, self.metrics_queue, self.samples = queue.Queue(), queue.Queue(), samples
        for sample in samples:
            self.rollout_buffer.put_nowait(sample)

    def start(self):
        pass

    def stop(self):
        pass

    def update_model_version(self, model_version):
        pass

    def check_health(self, stale_after_s):
        raise RuntimeError("the samples are used up")


class NoTransfer:
    """Weights that go nowhere."""

    def init_weight_transfer(self):
        pass

    def pause(self):
        pass

    def send_weights(self, iterator):
        list(iterator)

    def resume(self):
        pass

    def destroy(self):
        pass


def made_samples(tokenizer, n_groups, size=4, *, seed=0, shared=True, lengths=(2, 9)):
    """Groups of answers of random tokens, two of which are equal; ``shared``: they begin with the same tokens."""
    rng, samples = np.random.default_rng(seed), []
    for group, prompt in enumerate(prompts(64)["prompt"][:n_groups]):
        prompt_ids = tokenizer.encode(f"<user>{prompt[0]['content']}<assistant>")
        answers = [rng.integers(4, len(tokenizer), rng.integers(*lengths)) for _ in range(size)]
        answers[-1] = answers[0]
        rewards = rng.integers(0, 4, size) / 4
        rewards[0] = 1 - rewards[1]  # no group is dead
        for place, (answer, reward) in enumerate(zip(answers, rewards, strict=True)):
            first = [] if shared else [4 + (group * size + place) % (len(tokenizer) - 4)]
            ids = np.concatenate([first, prompt_ids, answer]).astype(np.int64)
            mask = (np.arange(len(ids)) >= len(ids) - len(answer)).astype(np.int64)
            mask[-1] = place != 1 or len(answer) < 3  # a tail without loss
            samples.append(
                RolloutSample(
                    prompt=prompt,
                    completion=[{"role": "assistant", "content": str(answer.tolist())}],
                    input_ids=ids,
                    completion_mask=mask,
                    old_log_probs=(rng.normal(-np.log(len(tokenizer)), 0.1, len(ids)) * mask).astype(np.float32),
                    advantage=float((reward - rewards.mean()) / (rewards.std() + 1e-8)),
                    model_version=1,  # that of the first step: TRL syncs weights before it
                    group_id=group,
                    metrics={"reward": float(reward), "reward_std": float(rewards.std())},
                )
            )
    return samples


def build(policy, folder, samples, peft_config=None, fsdp2=False, **options):
    packing._flash_attn = lambda: SimpleNamespace(flash_attn_varlen_func=varlen_attention)
    async_grpo_trainer.get_peak_flops_per_device = lambda *args: None
    args = AsyncGRPOConfig(output_dir=str(folder), **{**OPTIONS, **options})
    if fsdp2:
        take_processes_for_gpus()
    torch.manual_seed(0)  # adapters are drawn
    return AsyncGRPOTrainer(
        model=str(policy),
        reward_funcs=len,
        args=args,
        train_dataset=prompts(64),
        processing_class=tokenizer_of(policy),
        peft_config=peft_config,
        rollout_worker=FilledWorker(samples),
        weight_transfer=NoTransfer(),
    )


def micro_batches(trainer):
    """What training_step gets while the trainer trains."""
    seen, step = [], trainer.training_step

    def keep(model, inputs, *args):
        seen.append({name: one.clone() for name, one in inputs.items()})
        return step(model, inputs, *args)

    trainer.training_step = keep
    trainer.train()
    return seen


def one_backward_for_each_group(trainer, batches, samples, groups, skipped):
    """(P, P): the gradients of TRL's loss of its own packed rows, with the advantages of all other groups 0."""
    owner = {float(v): s.group_id for s in samples for v in s.old_log_probs if v != 0}
    rows = []
    for group in groups:
        trainer.model.zero_grad()
        for inputs in batches:
            own = torch.tensor([[owner.get(value) == group for value in inputs["old_log_probs"][0].tolist()]])
            trainer.compute_loss(trainer.model, {**inputs, "advantages": inputs["advantages"] * own}).backward()
        named = [(name, one) for name, one in trainer.model.named_parameters() if one.requires_grad]
        flat = [torch.zeros_like(one) if one.grad is None else one.grad for name, one in named if name not in skipped]
        rows.append(torch.cat([gradient.flatten() for gradient in flat]).double())
    gradient_PN = torch.stack(rows)
    return (gradient_PN @ gradient_PN.T).numpy()


def count_rows(set_attribute=setattr):
    """The rows that each kernel of the fused head gets from now on."""
    found = Counter()

    def count(name, kernel):
        def counted(hidden_NH, *args, **kwargs):
            found[name] += len(hidden_NH)
            return kernel(hidden_NH, *args, **kwargs)

        set_attribute(forward, name, counted)

    for name in ("linear_grpo_loss", "linear_logprob"):
        count(name, getattr(forward, name))
    return found


def run(policy, folder, attached, fsdp2, fused=False):
    """Two steps of two micro-batches, whose rows differ in length: the processes need other numbers of forwards."""
    samples = made_samples(tokenizer_of(policy), 12, lengths=(2, 40))
    trainer = build(policy, folder, samples, fsdp2=fsdp2, max_steps=2, token_budget=90)
    if fused:
        fuse_head(trainer)
    rows = count_rows()
    if attached:
        attach(trainer, every=1, dim=0)
    trainer.train()
    print(f"rank {trainer.accelerator.process_index}: {dict(rows)}")
    named = trainer.accelerator.unwrap_model(trainer.model).named_parameters()
    whole = {name: one.full_tensor() if fsdp2 else one for name, one in named}
    if trainer.accelerator.is_main_process:
        torch.save({name: one.detach() for name, one in whole.items()}, f"{folder}/weights.pt")
