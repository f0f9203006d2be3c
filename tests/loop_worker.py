"""A plain training loop with ``GradientRecorder``, on one process or two: ``run`` is each process of ``processes.py``.

Three prompts of four answers each, in micro-batches that split a prompt's answers. Random tokens, a small Llama in
float64, and a loss that is a sum over the answers, so that a prompt's gradient is that of its answers' loss alone.
"""

import gc
import json
import os
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from grpo_kernels import GradientRecorder

GROUP_B = torch.tensor([7, 7, 3, 7, 3, 3, 9, 9, 7, 3, 9, 9])
REWARD_B = torch.tensor([0.0, 1.0, 1.0, 0.5, 0.0, 1.0, 0.25, 0.0, 0.75, 0.5, 1.0, 0.0])
MEAN_B = torch.where(GROUP_B == 7, 0.5625, torch.where(GROUP_B == 3, 0.625, 0.3125))
ADVANTAGE_B = REWARD_B - MEAN_B
LENGTH_B = [5, 7, 4, 6, 7, 3, 5, 7, 6, 4, 7, 5]
IDS_BT = torch.randint(0, 48, (12, 7), generator=torch.Generator().manual_seed(3))


def make_model(lora=False, checkpointing=False, tied=False):
    """The same weights in every process."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).double()
    if lora:
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).double()
        model.enable_input_require_grads()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def loss_of(model, answers):
    """Of padded rows, one for each answer: advantages times log-probs."""
    lengths = torch.tensor([LENGTH_B[i] for i in answers])
    mask = torch.arange(7) < lengths[:, None]
    ids = IDS_BT[answers]
    logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
    logp = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0] * mask[:, 1:]
    return -(logp.sum(1) * ADVANTAGE_B[answers].double()).sum()


def packed(answers):
    """(ids, positions, block-diagonal mask, borders) of one row that holds these answers."""
    ids = torch.cat([IDS_BT[i, : LENGTH_B[i]] for i in answers])[None]
    lengths = torch.tensor([LENGTH_B[i] for i in answers])
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    segment = torch.arange(len(answers)).repeat_interleave(lengths)
    seen = (segment[:, None] == segment) & torch.ones(len(segment), len(segment)).tril().bool()
    mask = torch.zeros(1, 1, *seen.shape, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)
    return ids, positions, mask, torch.tensor([0, *lengths]).cumsum(0)


def packed_loss(model, answers):
    """Of the same answers in one packed row; and the row's borders."""
    ids, positions, mask, borders = packed(answers)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[0]
    logp = logits[:-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    segment = torch.arange(len(answers)).repeat_interleave(borders.diff())
    logp = logp * (segment[1:] == segment[:-1])
    return -(logp * ADVANTAGE_B[answers].double()[segment[1:]]).sum(), borders


def train_step(model, recorder, micro_batches, pack=False):
    """One step. Each rank's loss is times the number of ranks, as DDP and FSDP2 average gradients."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    model.zero_grad()
    with recorder.step():
        for answers in micro_batches:
            columns = GROUP_B[answers], REWARD_B[answers], ADVANTAGE_B[answers], -ranks * ADVANTAGE_B[answers]
            if pack:
                recorder.rows(*columns, cu_seqlens=packed(answers)[3])
                loss = packed_loss(model, answers)[0]
            else:
                recorder.rows(*columns)
                loss = loss_of(model, answers)
            (ranks * loss).backward()


def wrap(model, engine):
    if engine == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    if engine == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    return model


def run(folder, engine, micro_batches, fails):
    """Rank r trains on ``micro_batches[r]``. ``fails``: the rank that has no memory in the second step, or None."""
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    model = make_model()
    recorder = GradientRecorder(wrap(model, engine) if engine == "ddp" else model, every=1, dim=0)
    wrapped = wrap(model, engine) if engine == "fsdp2" else torch.nn.parallel.DistributedDataParallel(model)
    found = []
    for step in range(2):
        if fails == rank and step == 1:
            recorder._sketch.set_rows = lambda *_: 1 / 0  # type: ignore[union-attr, method-assign]
        train_step(wrapped, recorder, micro_batches[rank])
        recorder.save(folder)
        found.append(recorder.metrics())
    Path(folder, f"metrics.{rank}.json").write_text(json.dumps(found))
    del model, recorder, wrapped  # torch may hang if they go after the process group
    gc.collect()
    dist.destroy_process_group()
