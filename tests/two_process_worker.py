"""One training run with stored rollouts, on one process or two: ``run_processes`` starts it, ``main`` is each process.

The completion of every row is a function of its prompt, its place in the group and the step alone, so that one process
with the whole batch and two processes with half of it each see the same groups.
"""

import json
import os
import pkgutil
import random
import signal
import zlib
from collections import Counter
from pathlib import Path

import torch
from fsdp2_on_cpu import take_processes_for_gpus
from harness import assert_same_numbers, config, reward_with_dead, table, tokenizer_of, two_tasks
from peft import LoraConfig
from processes import Started, start
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from grpo_kernels.recorder import measure
from trl_ext import CurvatureGRPOConfig, CurvatureGRPOTrainer
from trl_ext.plan.rehearsal import MARGIN
from trl_ext.recorder import recorder as interference_recorder
from trl_ext.report import watch

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


class Room:
    """Stands in for a device on which ``tokens`` packed tokens of a micro-batch fit, 1000 bytes each."""

    def __init__(self, trainer, tokens):
        states = 8 * sum(p.numel() for p in trainer.model.parameters())
        rows = trainer.args.per_device_train_batch_size // 2
        self._free = int((1000 * tokens + 600) / (1 - MARGIN)) + states
        self._peaks = [1000 * (16 + n * rows * trainer.max_completion_length) for n in (1, 2)]

    def free(self):
        return self._free

    def peak(self, run):
        run()
        return self._peaks.pop(0)


class Signals(TrainerCallback):
    """Made-up measurements after every step; keeps the normalisation's state; kills the process at a step."""

    def __init__(self, trainer, kill_at):
        self.trainer, self.kill_at, self.states = trainer, kill_at, []

    def _keep(self):
        states = [state.state_dict() for state in self.trainer._components.normalizer.states]
        self.states.append(json.loads(json.dumps(states)))

    def on_train_begin(self, args, state, control, **kwargs):
        self._keep()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.observe_curvature(torch.arange(3), torch.tensor([1.0, 2.0, 3.0]) / state.global_step)
        self._keep()
        if state.global_step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def whole(parameter):
    """From FSDP2's shards or ZeRO-3's."""
    if isinstance(parameter, DTensor):
        return parameter.full_tensor()
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.data.clone()
    return parameter.clone()


def run_out_of_memory(trainer, module, name, at_step):
    """What this function is called for has no room at that step, once."""
    owner, calls = pkgutil.resolve_name(module), []
    whole = getattr(owner, name)

    def no_room(*args, **kwargs):
        if trainer.state.global_step == at_step:
            calls.append(name)
            if len(calls) == 1:
                raise torch.OutOfMemoryError("there is no room for 64.00 MiB")
        return whole(*args, **kwargs)

    setattr(owner, name, no_room)


# what a run may be besides its folder, out, model and options; "trainer" is "ours" or "trl"
DEFAULTS = {
    "trainer": "ours",
    "dead": 0.0,
    "environment": {},
    "keep": (),
    "signals": False,
    **dict.fromkeys(["lora", "engine", "resume", "kill_at", "wrong_layer", "blind", "most_dense", "no_memory", "room"]),
}


def start_processes(count: int, policy: Path, folder: Path, **arguments) -> Started:
    """``arguments``: of ``DEFAULTS``, all others are options of the configuration."""
    folder.mkdir(exist_ok=arguments.get("resume") is not None)
    spec = {name: arguments.pop(name) for name in DEFAULTS if name in arguments}
    spec |= {"folder": str(folder), "out": str(folder / "result"), "model": str(policy), "options": arguments}
    return start(count, main, spec, folder=folder)


def run_processes(count: int, policy: Path, folder: Path, **arguments) -> list[dict]:
    """The run on one process or on two, each forked; what it left behind, by process."""
    started = start_processes(count, policy, folder, **arguments)
    assert started.finish() == [0] * count, started.text()[-3000:]
    return [torch.load(folder / f"result.{rank}.pt") for rank in range(count)]


def assert_same_run(ours: dict, theirs: dict) -> None:
    torch.testing.assert_close(
        torch.tensor(ours["advantages"]), torch.tensor(theirs["advantages"]), rtol=1e-5, atol=1e-6
    )
    for logs in zip(ours["logs"], theirs["logs"], strict=True):
        assert_same_numbers(*logs, rel=1e-4, ignore=("normalization/", "compute/"))
    torch.testing.assert_close(ours["parameters"], theirs["parameters"], rtol=1e-5, atol=1e-5)


def main(spec):
    trainer = train(spec)
    if hasattr(trainer, "end"):  # an older transformers has none
        trainer.end()


def train(spec):
    """The run, and what it left behind in ``spec["out"]``; the trainer."""
    spec = {**DEFAULTS, **spec}
    os.environ.update(spec["environment"])
    trainer = build(spec)
    make_faults(trainer, spec)
    batches, live_by_step = keep_batches(trainer, spec["keep"])
    signals = Signals(trainer, spec["kill_at"])
    if spec["signals"]:
        trainer.add_callback(signals)
    trainer.train(resume_from_checkpoint=spec["resume"])
    model = trainer.accelerator.unwrap_model(trainer.model)
    result = {
        "parameters": {name: whole(p).detach() for name, p in model.named_parameters()},
        "logs": trainer.state.log_history,
        "advantages": table(trainer, "advantages"),
        "batches": batches,
        "live_by_step": list(live_by_step.values()),
        "states": signals.states,
        "size": trainer._components.micro_batches.size.tokens if spec["trainer"] == "ours" else None,
    }
    torch.save(result, f"{spec['out']}.{trainer.accelerator.process_index}.pt")
    return trainer


def build(spec):
    trainer_class, config_class = {
        "ours": (CurvatureGRPOTrainer, CurvatureGRPOConfig),
        "trl": (GRPOTrainer, GRPOConfig),
    }[spec["trainer"]]
    # three groups: the second is split between two processes
    size = 24 // int(os.environ.get("WORLD_SIZE", "1"))
    options = {"num_generations": GENERATIONS, "learning_rate": 0.5, "max_steps": 3, "seed": 42}
    options |= {"per_device_train_batch_size": size, **spec["options"]}
    args = config(spec["folder"], config_class, **options)
    if spec["engine"] == "fsdp2":
        take_processes_for_gpus()
    torch.manual_seed(1)  # adapters are drawn
    return trainer_class(
        model=spec["model"],
        reward_funcs=reward_with_dead(spec["dead"], reward),
        args=args,
        train_dataset=two_tasks(24),
        processing_class=tokenizer_of(spec["model"]),
        rollout_func=rollout,
        peft_config=LoraConfig(task_type="CAUSAL_LM", **spec["lora"]) if spec["lora"] else None,
    )


def make_faults(trainer, spec):
    """What goes wrong in this run on purpose."""
    rank = trainer.accelerator.process_index
    if spec["wrong_layer"]:  # multiplies what it is given by three, which its tap can't know, and isn't rehearsed
        interference_recorder.probe_layers = lambda *args: None
        layer = trainer.model.get_submodule(spec["wrong_layer"])
        layer.forward = lambda x, forward=layer.forward: forward(3 * x)
    if spec["blind"] == rank:  # a process that can't look at its log
        watch.diagnose = lambda run: 1 / 0
    if spec["most_dense"] is not None:
        measure.MAX_DENSE = spec["most_dense"]
    if spec["room"]:
        trainer._components.memory = Room(trainer, spec["room"][rank])
    if spec["no_memory"] and rank == 1:
        run_out_of_memory(trainer, *spec["no_memory"])


def keep_batches(trainer, names):
    """(these columns of every micro-batch, {step: its live sequences}), filled while the trainer trains."""
    batches, live_by_step, prepare = [], Counter(), trainer._prepare_inputs

    def keep(generation_batch):
        inputs = prepare(generation_batch)
        live_by_step[trainer.state.global_step] += int((inputs.get("advantages", torch.zeros(0)) != 0).sum())
        batches.append({name: inputs[name].clone() for name in names if name in inputs})
        return inputs

    trainer._prepare_inputs = keep
    return batches, live_by_step
