"""Counts the operations of a training step of a model of Qwen2.5-1.5B's depth, by cause.

    python benchmarks/operations.py [--layers 28]

An operation is one that torch's dispatcher runs: on a GPU most are a launch, and views are none. Their number depends
on the number of layers and not on widths, so the model is narrow and runs on a CPU. Counted are planning, forward and
backward of one optimizer step, without generation, rewards and the optimizer. Compiled regions, and what attention runs
in them, are counted apart.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from datasets import Dataset
from peft import LoraConfig
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from trl_ext import CurvatureGRPOConfig, CurvatureGRPOTrainer
from trl_ext.compilation import Compilation
from trl_ext.sharing import parts
from trl_ext.tasks.small_policy import build_tokenizer

PROMPTS, ANSWERS = 8, 8
# (part of a file's path, function or "") -> cause; the innermost frame of the stack that fits decides
CAUSES = (
    ("trl_ext/sharing/attention", "attention", "attention"),
    ("trl_ext/sharing/parts", "", "attention"),
    ("trl_ext/sharing/packed_rows", "", "planning and packing"),
    ("integrations/sdpa_attention", "", "attention"),
    ("transformers/masking_utils", "", "masks"),
    ("modeling_qwen2", "apply_rotary_pos_emb", "rotation"),
    ("tuners/lora", "", "LoRA"),
    ("modeling_qwen2", "", "rest of the layers"),
    ("transformers/activations", "", "rest of the layers"),
    ("trl_ext/plan", "", "planning and packing"),
    ("grpo_kernels/head", "", "head and loss"),
    ("trl_ext/head", "", "head and loss"),
    ("trl_ext/objective", "", "head and loss"),
    ("trl/trainer", "", "head and loss"),
)
ACCUMULATION, OTHER = "accumulation of gradients", "other"
REGION, IN_REGIONS = "compiled regions", "attention in compiled regions"
VIEWS = "of the operations, views"
APART = (VIEWS, REGION, IN_REGIONS)  # rows below the sum


@dataclass(frozen=True)
class Case:
    """A trainer to count: TRL's or ours, with checkpointing or not, compiled or not."""

    ours: bool
    checkpointing: bool
    compiled: bool = False

    def __str__(self) -> str:
        how = "compiled" if self.compiled else "", "checkpointing" if self.checkpointing else ""
        return ", ".join(filter(None, ("ours" if self.ours else "TRL", *how)))


CASES = (Case(False, True), Case(True, True), Case(False, False), Case(True, False), Case(True, True, True))
CASES += (Case(True, False, True),)


class Operations(TorchDispatchMode):
    """Counts operations by cause; of the backward by the cause of the forward operation that made the node."""

    def __init__(self, lora: set[int]) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.views = 0
        self._in_region = False
        self._lora = lora
        self._cause_of_node: dict[int, str] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Keeps Dynamo on."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cause = self._cause()
        self.found[cause] += 1
        self.views += bool(func.is_view and cause != IN_REGIONS)
        return func(*args, **(kwargs or {}))

    def _cause(self) -> str:
        if self._in_region:
            return IN_REGIONS
        cause, recomputed = self._of_stack(sys._getframe(2))
        node = torch._C._current_autograd_node()
        if recomputed:
            return f"recomputed {cause}"
        if node is None:
            self._cause_of_node.setdefault(torch._C._autograd._get_sequence_nr() - 1, cause)
            return cause
        if cause != OTHER:  # in Python's backward
            return f"{cause}, backward"
        if node.name() == "torch::autograd::AccumulateGrad":
            return ACCUMULATION
        return f"{self._cause_of_node.get(node._sequence_nr(), OTHER)}, backward"

    def _of_stack(self, frame: FrameType | None) -> tuple[str, bool]:
        """Returns the cause by the frames up to autograd's, and whether a checkpoint recomputes it."""
        cause = OTHER
        while frame is not None:
            path, name = frame.f_code.co_filename, frame.f_code.co_name
            if name == "recompute_fn" and path.endswith("torch/utils/checkpoint.py"):
                return cause, True
            if name == "_engine_run_backward":
                return cause, False
            if cause == OTHER:
                cause = self._of_frame(path, name, frame)
            frame = frame.f_back
        return cause, False

    def _of_frame(self, path: str, name: str, frame: FrameType) -> str:
        if path.endswith("nn/modules/linear.py"):
            return "LoRA" if id(frame.f_locals["self"]) in self._lora else "bare products"
        for part, function, cause in CAUSES:
            if part in path and function in ("", name):
                return cause
        return OTHER

    def compiler(self) -> Any:
        """Returns a backend of ``torch.compile`` whose regions count as one."""

        def make(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            def region(*args: Any) -> Any:
                self.found[REGION] += 1
                with _disable_current_modes():
                    return graph(*args)

            return region

        return aot_autograd(fw_compiler=make, bw_compiler=make, partition_fn=min_cut_rematerialization_partition)

    @contextmanager
    def in_regions(self) -> Iterator[None]:
        """Counts what attention runs inside of compiled regions."""

        def counted(compute: Any) -> Any:
            def run(*args: Any) -> Any:
                if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
                    return compute(*args)
                self._in_region = True
                try:
                    with self:
                        return compute(*args)
                finally:
                    self._in_region = False

            return run

        with ExitStack() as stack:
            for name in ("forward", "backward"):
                stack.enter_context(mock.patch.object(parts, name, counted(getattr(parts, name))))
            yield


def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Returns short made-up answers of different lengths: on a CPU short spans run together, as all do on a GPU."""
    generator = torch.Generator().manual_seed(1)
    lengths = [8 + i % 9 for i in range(len(prompts))]
    return {
        "prompt_ids": [[5 + int(prompt), *range(6, 12 + int(prompt))] for prompt in prompts],
        "completion_ids": [torch.randint(4, 90, (n,), generator=generator).tolist() for n in lengths],
        "logprobs": None,
    }


def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [float(place % 2) for place in range(len(completion_ids))]


def build(case: Case, layers: int) -> Any:
    """Returns the case's trainer, for two optimizer steps of one micro-batch each."""
    trainer_class, config_class = (
        (CurvatureGRPOTrainer, CurvatureGRPOConfig) if case.ours else (GRPOTrainer, GRPOConfig)
    )
    tokenizer = build_tokenizer((1, 4))
    tokenizer.padding_side = "left"
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 12, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_hidden_layers=layers, vocab_size=len(tokenizer)))
    ours = {"interference_every": 0, "compile_layers": case.compiled} if case.ours else {}
    args = config_class(
        output_dir=tempfile.mkdtemp(),
        num_generations=ANSWERS,
        per_device_train_batch_size=PROMPTS * ANSWERS,
        max_completion_length=32,
        max_steps=2,
        gradient_checkpointing=case.checkpointing,
        **{"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True},
        **ours,
    )
    return trainer_class(
        model=model,
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": [str(i) for i in range(PROMPTS)]}),
        processing_class=tokenizer,
        rollout_func=rollout,
        peft_config=LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0),
    )


def lora_layers(model: torch.nn.Module) -> set[int]:
    """Returns the ids of the Linear layers of adapters."""
    return {id(layer) for name, layer in model.named_modules() if ".lora_A." in name or ".lora_B." in name}


def count(case: Case, layers: int = 28) -> Counter[str]:
    """Returns the operations of the second step, by cause; the first step compiles."""
    trainer = build(case, layers)
    mode = Operations(lora_layers(trainer.model))
    if case.compiled:
        torch._dynamo.reset()
        trainer._components.compiled._compilation = Compilation(mode.compiler(), None)
    step, generate = trainer.training_step, trainer._generate_and_score_completions

    def counted(*args: Any) -> Any:
        mode.found.clear()
        mode.views = 0
        with mode if trainer.state.global_step else ExitStack():
            return step(*args)

    def uncounted(*args: Any) -> Any:
        with _disable_current_modes():
            return generate(*args)

    trainer.training_step, trainer._generate_and_score_completions = counted, uncounted
    with mode.in_regions():
        trainer.train()
    return mode.found + Counter({VIEWS: mode.views})


def by_cause(found: Counter[str]) -> dict[str, int]:
    """Returns the operations by cause, forward and backward together; what is recomputed is a cause of its own."""
    summed: Counter[str] = Counter()
    for name, number in found.items():
        summed["recomputed" if name.startswith("recomputed") else name.removesuffix(", backward")] += number
    return dict(summed)


def table(layers: int) -> str:
    """Returns the counts of all cases as a Markdown table."""
    columns = [by_cause(count(case, layers)) for case in CASES]
    names = sorted(set().union(*columns) - {*APART}, key=lambda name: -max(c.get(name, 0) for c in columns))
    eager = [sum(number for name, number in column.items() if name not in APART) for column in columns]
    lines = ["| cause | " + " | ".join(map(str, CASES)) + " |", "|---" * (len(CASES) + 1) + "|"]
    rows = [(name, [column.get(name, 0) for column in columns]) for name in names]
    rows += [("**operations**", eager), *((name, [column.get(name, 0) for column in columns]) for name in APART)]
    return "\n".join(lines + [f"| {name} | " + " | ".join(map(str, numbers)) + " |" for name, numbers in rows])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=28)
    print(table(parser.parse_args().layers))
