"""Micro-batches by the memory there is: chosen by a rehearsal, kept in checkpoints, halved when a step runs out of it."""

import random

import numpy as np
import pytest
import torch
from harness import FOUR, TIMINGS, assert_same_gradients, build, lora, messages, parameters, train

from trl_ext import components
from trl_ext.plan import device_memory, rehearsal
from trl_ext.sharing.packed_rows import KEYWORD

QUIET = {"interference_every": 0, "loss_type": "grpo"}
BYTES_OF_A_TOKEN = 1000


class SavedBytes:
    """Stands in for a GPU's memory: what autograd keeps for the backward is what a computation takes."""

    def __init__(self, free):
        self._free, self.passes = free, 0

    def free(self):
        return self._free

    def peak(self, run):
        kept, self.passes = {}, self.passes + 1

        def pack(tensor):
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run()
        return sum(kept.values())


class Linear(SavedBytes):
    """Takes a thousand bytes for each token of the backbone, and 500 more."""

    def __init__(self, free, sizes):
        super().__init__(free)
        self.sizes = sizes

    def peak(self, run):
        del self.sizes[:]
        super().peak(run)
        return 500 + BYTES_OF_A_TOKEN * sum(self.sizes)


def watch(trainer, fails=lambda number, tokens: False, in_backward=False):
    """Returns the tokens of each training forward; the n-th runs out of memory where ``fails(n, tokens)``."""
    sizes, failing = [], [False]

    class FailsInBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden):
            return hidden.clone()

        @staticmethod
        def backward(ctx, grad):
            raise torch.OutOfMemoryError("stand-in")

    def before(module, args, kwargs):
        if not (torch.is_grad_enabled() and module.training):
            return
        tokens = kwargs["input_ids"].numel()
        sizes.append(tokens)
        failing[0] = fails(len(sizes), tokens)
        if failing[0] and not in_backward:
            raise torch.OutOfMemoryError("stand-in")

    def after(module, args, output):
        if failing[0]:
            output.last_hidden_state = FailsInBackward.apply(output.last_hidden_state)
            failing[0] = False

    model = trainer.accelerator.unwrap_model(trainer.model)
    backbone = (model.get_base_model() if hasattr(model, "get_base_model") else model).model
    backbone.register_forward_pre_hook(before, with_kwargs=True)
    backbone.register_forward_hook(after)
    return sizes


def above(most):
    return lambda number, tokens: tokens > most


def at(*numbers):
    return lambda number, tokens: number in numbers


def assert_equal(small, free):
    """Gradients and parameters to 1e-6, and every logged number but times and the counts of passes and positions."""
    assert_same_gradients(small.recorder.gradients, free.recorder.gradients, tolerance=1e-6)
    torch.testing.assert_close(parameters(small.model), parameters(free.model), rtol=1e-6, atol=1e-6)
    for log, theirs in zip(small.recorder.logs, free.recorder.logs, strict=True):
        assert log.keys() == theirs.keys()
        for name, value in theirs.items():
            if isinstance(value, float) and not any(word in name for word in (*TIMINGS, "seconds", "compute/")):
                assert log[name] == pytest.approx(value, rel=1e-5, abs=1e-6, nan_ok=True), name
            if name in ("compute/sequences_skipped_frac", "compute/padding_removed_frac"):
                assert log[name] == pytest.approx(value) or "unshared" in str(small.args.output_dir)


GENERATIONS = {"gradient_accumulation_steps": 4, "steps_per_generation": 2}
CASES = {
    "plain": (above(40), {}),
    "four micro-batches": (above(40), FOUR),
    "the last call alone": (at(2), FOUR),
    "each of two calls": (at(1, 4), FOUR),
    "kl": (above(40), {"beta": 0.05, "num_iterations": 2, "max_steps": 4}),
    "kl, four micro-batches": (above(70), {"beta": 0.05, "num_iterations": 2, "max_steps": 4, **FOUR}),
    "several generations": (above(60), GENERATIONS),
    "the second generation": (at(2), GENERATIONS),
    "unshared": (above(60), {"share_prompts": False}),
    "dapo": (above(20), {"loss_type": "dapo"}),
    "LoRA": (above(40), {"peft_config": lora()}),
}


@pytest.mark.parametrize("in_backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", CASES)
def test_a_step_out_of_memory_is_repeated_at_half_the_size(name, in_backward, tiny_policy, tmp_path, caplog):
    fails, options = CASES[name]
    options = {**QUIET, "max_steps": 3, **options}
    free = train(tiny_policy, tmp_path / "free", **options)
    small = build(tiny_policy, tmp_path / "small", **options)
    sizes = watch(small, fails, in_backward)
    small.train()
    halvings = messages(caplog, "Out of memory: this step is repeated")
    assert halvings and len(halvings) == len(set(halvings)) < len(sizes)
    assert_equal(small, free)
