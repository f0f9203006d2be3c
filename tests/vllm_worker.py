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
from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer
from trl.generation import vllm_generation

from trl_ext import CurvatureGRPOConfig, CurvatureGRPOTrainer
from trl_ext.tasks.arithmetic import generate_problems


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


def train(spec):
    if spec["dtype"]:  # TRL leaves it to vLLM, which takes half precision for a float32 model
        vllm_generation.LLM = functools.partial(vllm_generation.LLM, dtype=spec["dtype"])
    config_class, trainer_class = {
        "ours": (CurvatureGRPOConfig, CurvatureGRPOTrainer),
        "trl": (GRPOConfig, GRPOTrainer),
    }[spec["trainer"]]
    problems = generate_problems(32)
    trainer = trainer_class(
        model=spec["model"],
        reward_funcs=reward,
        args=config_class(
            output_dir=spec["folder"],
            num_generations=4,
            per_device_train_batch_size=16,
            max_completion_length=8,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            logging_steps=1,
            save_strategy="no",
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=3,
            use_vllm=True,
            vllm_mode="colocate",
            vllm_max_model_length=64,
            model_init_kwargs={"dtype": "float32"},
            **{"optim": "sgd", **spec["options"]},
        ),
        train_dataset=Dataset.from_dict(
            {"prompt": [[{"role": "user", "content": problem.question}] for problem in problems]}
        ),
        processing_class=AutoTokenizer.from_pretrained(spec["model"], padding_side="left"),
    )
    batches = []
    score = trainer._generate_and_score_completions

    def keep(inputs):
        output = score(inputs)
        names = ("completion_ids", "completion_mask", "sampling_per_token_logps", "old_per_token_logps", "advantages")
        batches.append({name: output[name].clone() for name in names if name in output})
        return output

    trainer._generate_and_score_completions = keep
    trainer.train()
    dtype = str(trainer.vllm_generation.llm.llm_engine.model_config.dtype)
    torch.save({"logs": trainer.state.log_history, "batches": batches, "dtype": dtype}, spec["out"])


if __name__ == "__main__":
    keep_weights_unpacked()
    with open(sys.argv[1]) as file:
        train(json.load(file))
