"""FSDP2 on two gloo processes, for test_fused_trainer.py: our head and the sketch, sharded against whole."""

import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from grpo_kernels.interference.gradient_sketch import GradientSketch
from trl_ext.loss.fused_head import CompletionMask, add_fused_head, read_settings


def with_our_head(folder, tied):
    torch.manual_seed(0)  # an untied head is made anew
    model = AutoModelForCausalLM.from_pretrained(folder, tie_word_embeddings=tied)
    add_fused_lm_head(model, temperature=0.9, outputs=("log_probs", "entropy"))
    add_fused_head(
        model, read_settings(model), CompletionMask(), entropy=True, head_sketch=lambda *of: model.taps.head_sketch(*of)
    )
    return model


def backward(model, ids, advantages):
    """Also returns each sequence's sketch."""
    model.taps = GradientSketch(model, 16)
    with model.taps.step(seed=3) as recorded, model.taps.rows(torch.arange(len(ids))):
        backward_pass(model, ids, advantages)
    return recorded[0].sketch


def backward_pass(model, ids, advantages):
    labels = ids.clone()
    labels[:, :3] = -100
    count = ids.shape[1] - 3
    grpo_inputs = {
        "sequence_N": torch.arange(len(ids)).repeat_interleave(count),
        "advantages": advantages,
        "weights_B": torch.full((len(ids),), 0.25 / count),
    }
    loss = model(input_ids=ids, labels=labels, fused_lm_head=True, grpo_inputs=grpo_inputs).grpo_loss
    logprobs = model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs
    (loss + 0.01 * (logprobs * advantages[:, None]).sum()).backward()


def main(folder):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    ids, advantages = torch.randint(4, 100, (4, 9)), torch.tensor([1.0, -1.0, 0.0, 0.5])
    for tied in (True, False):
        whole = with_our_head(folder, tied)
        sketch = backward(whole, ids, advantages)
        expected = {name: parameter.grad for name, parameter in whole.named_parameters()}
        model = with_our_head(folder, tied)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        if not tied:  # a group of its own, which nothing gathers: the head's forward is never called
            fully_shard(model.lm_head, mesh=mesh)
        fully_shard(model, mesh=mesh)
        half = slice(2 * rank, 2 * rank + 2)
        torch.testing.assert_close(backward(model, ids[half], advantages[half]), sketch[half], rtol=1e-3, atol=1e-4)
        assert sketch[2 * rank + 1].norm() > 0.1  # the third advantage is 0
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor)
            # FSDP averages over processes; the losses here are sums over each process's sequences
            torch.testing.assert_close(2 * parameter.grad.full_tensor(), expected[name], rtol=1e-4, atol=1e-6, msg=name)
        print("equal", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    time.sleep(0.5)
