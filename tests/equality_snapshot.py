"""Trains a tiny model in 37 settings, and compares what two versions of the code make of it, bit for bit.

    python tests/equality_snapshot.py run before.pt              # in a checkout of the commit to compare with
    python tests/equality_snapshot.py run after.pt               # in this one, on the same machine
    python tests/equality_snapshot.py compare before.pt after.pt

``run`` takes names of settings behind the file, and then runs these alone. A snapshot holds for each setting every
parameter after three optimizer steps and every logged number but times. ``compare`` prints what differs, and exits with
1 where something does; a number that only the first has is listed apart, as one may be taken away on purpose.

The script and ``harness.py`` need only public names and the built-in policy, so that they run older checkouts too.
``PYTHONPATH`` says which one.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRITON_INTERPRET="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import torch
from harness import TIMINGS, build, lora, parameters, prompts, reward_with_dead, save_policy, short
from transformers import PrinterCallback, trainer_utils

# the quick ones log no interference; every normalisation once, each in other company
SETTINGS = {
    "plain": {},
    "no_fused_loss": {"fused_loss": False},
    "no_skipping": {"skip_zero_advantage": False},
    "no_sharing": {"share_prompts": False},
    "kl": {"beta": 0.05},
    "kl_two_iterations": {"beta": 0.05, "num_iterations": 2, "loss_type": "grpo"},
    "accumulation": {"gradient_accumulation_steps": 2, "steps_per_generation": 4},
    "several_generations": {"gradient_accumulation_steps": 4, "steps_per_generation": 2, "loss_type": "dr_grpo"},
    "bnpo": {"loss_type": "bnpo", "scale_rewards": "batch"},
    "cispo": {"loss_type": "cispo", "scale_rewards": "none"},
    "sapo": {"loss_type": "sapo"},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "vespo": {"loss_type": "vespo"},
    "entropy_bonus": {"entropy_coef": 0.01},
    "quantile": {"top_entropy_quantile": 0.5},
    "gdpo": {"multi_objective_aggregation": "normalize_then_sum", "functions": 2},
    "lora": {"lora": True, "beta": 0.02},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 1},
    "resampling": {"resample_zero_variance": True, "dead": True},
    "logged": {"interference_every": 1},
    "logged_dead": {"interference_every": 2, "dead": True, "what_if_dead": True},
    "logged_parts": {"interference_every": 1, "interference_parts": True, "loss_type": "grpo"},
    "logged_exact": {"interference_every": 1, "interference_dim": 0},
    "logged_lora": {"interference_every": 1, "lora": True, "gradient_checkpointing": True},
    "logged_accumulation": {"interference_every": 1, "gradient_accumulation_steps": 2},
    "two_ranks": {"ranks": 2, "beta": 0.02},
    "two_ranks_logged": {"ranks": 2, "interference_every": 1, "dead": True},
    "power": {"normalization": "power", "normalization_kwargs": {"alpha": 0.5}},
    "loo": {"normalization": "loo"},
    "max_rl": {"normalization": "max_rl", "interference_every": 3},
    "none": {"normalization": "none"},
    "global": {"normalization": "global"},
    "beta": {"normalization": "beta", "interference_every": 3},
    "decoupled": {"normalization": "decoupled", "functions": 2},
    "running_std": {"normalization": "running_std"},
    "curvature": {"normalization": "curvature", "interference_every": 1},
}
OWN_NAMES = ("lora", "ranks", "functions", "dead")  # of this script; all others are options


def train(name: str, folder: str) -> dict:
    """Parameters and logs of one setting, of this rank."""
    setting = SETTINGS[name]
    several, reward = setting.get("functions", 1) > 1, reward_with_dead(0.4 if setting.get("dead") else 0.0)
    options = {
        "per_device_train_batch_size": 16 // setting.get("ranks", 1),
        "max_steps": 3,
        "learning_rate": 0.05,
        "interference_every": 0,
        "interference_dim": 16,
        "reward_weights": [0.75, 0.5] if several else None,
        "peft_config": lora() if "lora" in setting else None,
        **{key: value for key, value in setting.items() if key not in OWN_NAMES},
    }
    policy, rewards = Path(folder) / "model", [reward, short] if several else reward
    trainer = build(policy, Path(folder), rewards, prompts(48), **options)
    trainer.remove_callback(PrinterCallback)
    trainer_utils.set_seed(5)
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {"parameters": parameters(model), "logs": [numbers(log) for log in trainer.recorder.logs]}


def numbers(log: dict) -> dict:
    """All but times."""
    times = (*TIMINGS, "seconds")
    return {k: v for k, v in log.items() if isinstance(v, int | float) and not any(word in k for word in times)}


def child(name: str, folder: str, out: str) -> None:
    """A setting of several ranks, in one of them."""
    found = train(name, folder)
    if int(os.environ["RANK"]) == 0:
        torch.save(found, out)


def run_ranks(name: str, ranks: int, folder: str) -> dict:
    """A setting of several ranks, from outside."""
    found = Path(folder) / "found.pt"
    launch = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"]
    command = [sys.executable, *launch, __file__, "child", name, folder, str(found)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-5000:])
    return torch.load(found)


def run(out: str, names: list[str]) -> None:
    """One setting after the other; one that fails leaves its error."""
    snapshot = {}
    for name in names or SETTINGS:
        ranks = SETTINGS[name].get("ranks", 1)
        try:
            with tempfile.TemporaryDirectory() as folder:
                save_policy(Path(folder) / "model")
                snapshot[name] = train(name, folder) if ranks == 1 else run_ranks(name, ranks, folder)
        except Exception as error:
            snapshot[name] = {"error": str(error)}
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
        else:
            print(f"{name}: {len(snapshot[name]['logs'])} log lines", flush=True)
    torch.save(snapshot, out)


def compare(before_path: str, after_path: str) -> int:
    """Prints what differs between two snapshots; 0 where nothing does."""
    before, after = torch.load(before_path), torch.load(after_path)
    differing = 0
    for name in [name for name in before if name in after]:
        one, two = before[name], after[name]
        if "error" in one or "error" in two:
            lines = [f"failed {'before' if 'error' in one else 'after'}"]
        else:
            lines = [*differences(one, two)]
        differing += bool(lines)
        print(f"{name}: {f'{len(lines)} differences' if lines else 'equal'}", *lines[:12], sep="\n    ")
        keys = [{key for log in run.get("logs", []) for key in log} for run in (one, two)]
        if "error" not in one | two and keys[0] != keys[1]:
            print(f"    gone: {sorted(keys[0] - keys[1]) or 'nothing'}; new: {sorted(keys[1] - keys[0]) or 'nothing'}")
    return differing


def differences(one: dict, two: dict) -> Iterator[str]:
    """A line for each parameter, and for each logged number that both have, that isn't the same bit for bit."""
    for key, value in one["parameters"].items():
        if not torch.equal(value, two["parameters"][key]):
            yield f"parameter {key}: {(value - two['parameters'][key]).abs().max():.2e} apart"
    for row, (old, now) in enumerate(zip(one["logs"], two["logs"], strict=True)):
        for key in sorted(old.keys() & now.keys()):
            if old[key] != now[key] and not (math.isnan(old[key]) and math.isnan(now[key])):
                yield f"log line {row}, {key}: {old[key]!r} became {now[key]!r}"


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "compare":
        sys.exit(min(compare(*arguments), 1))
    if command == "run":
        run(arguments[0], arguments[1:])
    else:
        child(*arguments)
