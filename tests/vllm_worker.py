"""Runs with a colocated vLLM on a CPU, for test_vllm.py: ``python vllm_worker.py SPEC``, a JSON file.

vLLM's CPU build packs the weights of Linear layers into a layout of its own when it loads them, so that TRL's weight
sync finds nothing to load into; and starts a process of its own for the engine, from which no patch would keep it. Both
are of that build: GPUs have neither.
"""

import functools
import json
import os
import sys

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR")

import torch
from harness import build, prompts
from trl import GRPOTrainer
from trl.generation import vllm_generation

from trl_ext import CurvatureGRPOTrainer

OPTIONS = {
    "per_device_train_batch_size": 16,
    "max_grad_norm": 0.0,
    "generation_kwargs": None,
    "seed": 3,
    "use_vllm": True,
    "vllm_mode": "colocate",
    "vllm_max_model_length": 64,
    "model_init_kwargs": {"dtype": "float32"},
}
KEPT = ("completion_ids", "completion_mask", "sampling_per_token_logps", "old_per_token_logps", "advantages")


def keep_weights_unpacked():
    """vLLM's Linear layers multiply by the weights that are there."""
    from vllm.model_executor.layers import linear, utils

    def dispatch(layer, remove_weight):
        layer.cpu_linear = lambda x, weight, bias: torch.nn.functional.linear(x, weight, bias)

    for module in (linear, utils):
        if hasattr(module, "dispatch_cpu_unquantized_gemm"):
            module.dispatch_cpu_unquantized_gemm = dispatch


def reward(completion_ids, **kwargs):
    return [(sum(ids) % 5) / 4 for ids in completion_ids]


def keep_batches(trainer):
    """The columns ``KEPT`` of every batch that is scored while the trainer trains."""
    batches, score = [], trainer._generate_and_score_completions

    def keep(inputs):
        output = score(inputs)
        batches.append({name: output[name].clone() for name in KEPT if name in output})
        return output

    trainer._generate_and_score_completions = keep
    return batches


def train(spec):
    if spec["dtype"]:  # TRL leaves it to vLLM, which takes half precision for a float32 model
        vllm_generation.LLM = functools.partial(vllm_generation.LLM, dtype=spec["dtype"])
    trainer_class = {"ours": CurvatureGRPOTrainer, "trl": GRPOTrainer}[spec["trainer"]]
    options = {**OPTIONS, **spec["options"]}
    trainer = build(spec["model"], spec["folder"], reward, prompts(32), trainer_class=trainer_class, **options)
    batches = keep_batches(trainer)
    trainer.train()
    dtype = str(trainer.vllm_generation.llm.llm_engine.model_config.dtype)
    torch.save({"logs": trainer.state.log_history, "batches": batches, "dtype": dtype}, spec["out"])


if __name__ == "__main__":
    keep_weights_unpacked()
    with open(sys.argv[1]) as file:
        train(json.load(file))
