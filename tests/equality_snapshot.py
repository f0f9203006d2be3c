"""Trains a tiny model in 30 settings, and compares what two versions of the code make of it, bit for bit.

    python tests/equality_snapshot.py run before.pt              # in a checkout of the commit to compare with
    python tests/equality_snapshot.py run after.pt               # in this one, on the same machine
    python tests/equality_snapshot.py compare before.pt after.pt

``run`` takes names of settings behind the file, and then runs these alone. A snapshot holds for each setting every
parameter after three optimizer steps and every logged number but times. ``compare`` prints what differs, and exits with
1 where something does; a number that only the first has is listed apart, as one may be taken away on purpose.

The script needs only the public names, so that it runs in older checkouts too. ``PYTHONPATH`` says which one.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRITON_INTERPRET="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
    trainer_utils,
)

from trl_ext import CurvatureGRPOConfig, CurvatureGRPOTrainer

WORDS = ["<pad>", "<eos>", *(str(i) for i in range(20)), *"abcdefghij"]
TIMES = re.compile("runtime|per_second|step_time|seconds|profiling|total_flos|^epoch$")

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
    "adaptive": {"normalization": "adaptive"},
    "curvature": {"normalization": "curvature", "interference_every": 1},
}
OWN_NAMES = ("lora", "ranks", "functions", "dead")  # of this script; all others are options


def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def save_model(folder: Path) -> None:
    """A folder, from which TRL loads the reference model too."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
    )
    model.save_pretrained(folder)


def share_of_numbers(completion_ids, **kwargs):
    """In eighths, so that sums are exact."""
    return [round(8 * sum(i < 12 for i in ids) / max(len(ids), 1)) / 8 for ids in completion_ids]


def dead_thirds(completion_ids, prompts, **kwargs):
    """The same, but every third prompt's answers all get one reward."""
    values = share_of_numbers(completion_ids)
    return [0.5 if int(p.split()[0]) % 3 == 0 else v for p, v in zip(prompts, values, strict=True)]


def short(completion_ids, **kwargs):
    """None, not scored, for every fifth sum of ids."""
    return [None if sum(ids) % 5 == 0 else float(len(ids) < 5) for ids in completion_ids]


class Recorder(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append({k: v for k, v in logs.items() if isinstance(v, int | float) and not TIMES.search(k)})


def train(name: str, folder: str) -> dict:
    """Parameters and logs of one setting, of this rank."""
    setting = SETTINGS[name]
    options = {key: value for key, value in setting.items() if key not in OWN_NAMES}
    several, reward = setting.get("functions", 1) > 1, dead_thirds if setting.get("dead") else share_of_numbers
    args = CurvatureGRPOConfig(
        output_dir=folder,
        **{
            "num_generations": 4,
            "per_device_train_batch_size": 16 // setting.get("ranks", 1),
            "per_device_eval_batch_size": 8,
            "max_completion_length": 8,
            "max_steps": 3,
            "learning_rate": 0.05,
            "optim": "sgd",
            "lr_scheduler_type": "constant",
            "generation_kwargs": {"sequence_bias": [[[1], 1.5]]},
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "interference_every": 0,
            "interference_dim": 16,
            "reward_weights": [0.75, 0.5] if several else None,
            "seed": 5,
            **options,
        },
    )
    rows = [" ".join(WORDS[2 + (7 * i + 3 * j) % 30] for j in range(3 + i % 5)) for i in range(48)]
    prompts = Dataset.from_dict({"prompt": [f"{i % 20} {row}" for i, row in enumerate(rows)]})
    recorder = Recorder()
    trainer = CurvatureGRPOTrainer(
        model=str(Path(folder) / "model"),
        reward_funcs=[reward, short] if several else reward,
        args=args,
        train_dataset=prompts,
        eval_dataset=prompts.select(range(4)) if "eval_strategy" in setting else None,
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0) if "lora" in setting else None,
        callbacks=[recorder],
    )
    trainer.remove_callback(PrinterCallback)
    trainer_utils.set_seed(5)
    trainer.train()
    parameters = {n: p.detach().clone() for n, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters()}
    return {"parameters": parameters, "logs": recorder.logs}


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
                save_model(Path(folder) / "model")
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
    differs = 0
    for name in [name for name in before if name in after]:
        one, two = before[name], after[name]
        if "error" in one or "error" in two:
            print(f"{name}: failed {'before' if 'error' in one else 'after'}")
            differs += 1
            continue
        lines = [
            f"parameter {key}: {(value - two['parameters'][key]).abs().max():.2e} apart"
            for key, value in one["parameters"].items()
            if not torch.equal(value, two["parameters"][key])
        ]
        gone, new = set(), set()
        for row, (old, now) in enumerate(zip(one["logs"], two["logs"], strict=True)):
            gone |= old.keys() - now.keys()
            new |= now.keys() - old.keys()
            for key in sorted(old.keys() & now.keys()):
                if old[key] != now[key] and not (math.isnan(old[key]) and math.isnan(now[key])):
                    lines.append(f"log line {row}, {key}: {old[key]!r} became {now[key]!r}")
        differs += bool(lines)
        print(f"{name}: {'equal' if not lines else f'{len(lines)} differences'}")
        for line in lines[:12]:
            print(f"    {line}")
        if gone or new:
            print(f"    gone: {', '.join(sorted(gone)) or 'nothing'}; new: {', '.join(sorted(new)) or 'nothing'}")
    return differs


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "compare":
        sys.exit(min(compare(*arguments), 1))
    if command == "run":
        run(arguments[0], arguments[1:])
    else:
        child(*arguments)
