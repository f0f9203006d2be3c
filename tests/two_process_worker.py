"""One training run with stored rollouts, for test_two_processes.py: ``torchrun two_process_worker.py spec.json``.

The completion of every row is a function of its prompt, its place in the group and the step alone, so that one process
with the whole batch and two processes with half of it each see the same groups.
"""

import json
import os
import random
import sys
import zlib

import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from trl_ext import CurvatureGRPOConfig, CurvatureGRPOTrainer
from trl_ext.tasks.arithmetic import generate_problems

GENERATIONS = 8


def rollout(prompts, trainer):
    tokenizer = trainer.processing_class
    first = trainer.accelerator.process_index * len(prompts)
    prompt_ids, completion_ids = [], []
    for row, prompt in enumerate(prompts):
        text = prompt[0]["content"]
        place = (first + row) % GENERATIONS
        rng = random.Random(zlib.crc32(f"{text}|{place}|{trainer.state.global_step}".encode()))
        prompt_ids.append(tokenizer.encode(f"<user>{text}<assistant>"))
        completion_ids.append([rng.randrange(4, len(tokenizer)) for _ in range(rng.randint(1, 6))])
    return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None}


def reward(completion_ids, **kwargs):
    return [None if sum(ids) % 7 == 0 else (sum(ids) % 5) / 4 for ids in completion_ids]


def main(spec):
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    trainer_class, config_class = {
        "ours": (CurvatureGRPOTrainer, CurvatureGRPOConfig),
        "trl": (GRPOTrainer, GRPOConfig),
    }[spec["trainer"]]
    config = config_class(
        output_dir=spec["folder"],
        num_generations=GENERATIONS,
        per_device_train_batch_size=24 // processes,  # three groups: the second is split between two processes
        max_steps=3,
        optim="sgd",
        learning_rate=0.5,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **spec["options"],
    )
    problems = generate_problems(24)
    trainer = trainer_class(
        model=spec["model"],
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_dict(
            {"prompt": [[{"role": "user", "content": problem.question}] for problem in problems]}
        ),
        processing_class=AutoTokenizer.from_pretrained(spec["model"], padding_side="left"),
        rollout_func=rollout,
    )
    batches = []
    prepare = trainer._prepare_inputs

    def keep(generation_batch):
        inputs = prepare(generation_batch)
        batches.append({name: inputs[name].clone() for name in spec["keep"] if name in inputs})
        return inputs

    trainer._prepare_inputs = keep
    trainer.train()
    rank = trainer.accelerator.process_index
    model = trainer.accelerator.unwrap_model(trainer.model)
    torch.save(
        {
            "parameters": {name: p.detach() for name, p in model.named_parameters()},
            "logs": trainer.state.log_history,
            "advantages": list(trainer._logs["advantages"]),
            "batches": batches,
        },
        f"{spec['out']}.{rank}.pt",
    )
    trainer.end()


if __name__ == "__main__":
    with open(sys.argv[1]) as spec_file:
        main(json.load(spec_file))
