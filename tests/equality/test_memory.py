"""Micro-batches by memory: chosen by a rehearsal, kept in checkpoints, halved when a step runs out of it."""

import random

import numpy as np
import pytest
import torch
from harness import FOUR, TIMINGS, assert_same_gradients, build, lora, messages, parameters, train
from transformers import AutoModelForCausalLM

from trl_ext.plan import device_memory
from trl_ext.plan.rehearsal import MARGIN

QUIET = {"interference_every": 0, "loss_type": "grpo"}


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


class ByTokens(SavedBytes):
    """Takes 1000 bytes for each token of the backbone, and 500 more."""

    def __init__(self, free, sizes):
        super().__init__(free)
        self.sizes = sizes

    def peak(self, run):
        super().peak(run)
        return 500 + 1000 * self.sizes[-1]


def states_of(trainer):
    """Returns the bytes of two float32 tensors for each trained parameter."""
    return 8 * sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)


def with_memory(trainer, memory):
    trainer._components.memory = memory
    return trainer


def with_room_for(trainer, tokens, sizes):
    """Gives the trainer a device on which ``tokens`` fit, with the margin."""
    return with_memory(trainer, ByTokens(int((1000 * tokens + 600) / (1 - MARGIN)) + states_of(trainer), sizes))


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
    assert_same_gradients(small.recorder.gradients, free.recorder.gradients, tolerance=1e-6, small_kl=True)
    torch.testing.assert_close(parameters(small.model), parameters(free.model), rtol=1e-6, atol=1e-6)
    for log, theirs in zip(small.recorder.logs, free.recorder.logs, strict=True):
        assert log.keys() == theirs.keys()
        for name, value in theirs.items():
            if isinstance(value, float) and not any(word in name for word in (*TIMINGS, "seconds", "compute/")):
                assert log[name] == pytest.approx(value, rel=1e-5, abs=1e-6, nan_ok=True), name
        assert log.get("compute/sequences_skipped_frac") == theirs.get("compute/sequences_skipped_frac")


def in_float64(policy):
    """The policy in a precision in which the order of a sum doesn't matter to 1e-6."""
    return AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float64)


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
    "dapo": (above(30), {"loss_type": "dapo"}),
    "LoRA": (above(40), {"peft_config": lora()}),
}


@pytest.mark.parametrize("in_backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", CASES)
def test_a_step_out_of_memory_is_repeated_at_half_the_size(name, in_backward, tiny_policy, tmp_path, caplog):
    fails, options = CASES[name]
    options = {**QUIET, "max_steps": 3, **options}
    free = train(tiny_policy, tmp_path / "free", model=in_float64(tiny_policy), **options)
    small = build(tiny_policy, tmp_path / "small", model=in_float64(tiny_policy), **options)
    sizes = watch(small, fails, in_backward)
    small.train()
    halvings = messages(caplog, "Out of memory: this step is repeated")
    assert halvings and len(halvings) == len(set(halvings)) < len(sizes)
    assert_equal(small, free)


def test_later_steps_keep_the_size_and_a_step_may_have_more_micro_batches_than_calls(tiny_policy, tmp_path, caplog):
    trainer = build(tiny_policy, tmp_path, **QUIET, max_steps=4)
    sizes = watch(trainer, above(40))
    trainer.train()
    assert len(messages(caplog, "Out of memory")) == 1
    assert [size > 40 for size in sizes].index(False) == 1 and max(sizes[1:]) <= 40
    assert all(log["compute/micro_batches"] > 1 for log in trainer.recorder.logs[:-1])
    assert trainer.state.global_step == trainer._step == 4


def test_interference_of_a_repeated_step_is_dropped_and_of_the_next_is_logged(tiny_policy, tmp_path, caplog):
    options = {"interference_every": 1, "loss_type": "grpo", "max_steps": 3, **FOUR}
    free = train(tiny_policy, tmp_path / "free", **options)
    small = build(tiny_policy, tmp_path / "small", **options)
    watch(small, at(1))
    small.train()
    assert len(messages(caplog, "Interference of optimizer step 1 isn't logged: it ran out of memory.")) == 1
    logged = ["interference/cos_mean" in log for log in small.recorder.logs]
    assert logged == [False, True, True, False]
    assert_same_gradients(small.recorder.gradients, free.recorder.gradients, tolerance=1e-6)
    assert small.recorder.logs[2]["interference/cos_mean"] == pytest.approx(
        free.recorder.logs[2]["interference/cos_mean"], abs=1e-4
    )


def test_dropout_draws_from_the_saved_random_state(tiny_policy, tmp_path):
    """A repeated step begins with the random numbers that it began with: of two repeats of one plan both are equal."""
    trainer = build(tiny_policy, tmp_path, **QUIET, max_steps=1)
    states, batches = [], trainer._components.micro_batches

    def before(module, args):
        if torch.is_grad_enabled() and module.training:
            states.append(torch.get_rng_state())
            torch.rand(7)
            if len(states) == 1:
                raise torch.OutOfMemoryError("stand-in")

    trainer.model.model.register_forward_pre_hook(before)
    trainer.train()
    assert batches.repeated_step == 0
    assert torch.equal(states[0], states[1]) and not torch.equal(states[1], states[2])


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({"skip_zero_advantage": False}, "TRL's own micro-batches ran"),
        ({}, "Each micro-batch has one sequence already"),
    ],
)
def test_what_cannot_be_repeated_ends_with_advice(options, advice, tiny_policy, tmp_path):
    trainer = build(tiny_policy, tmp_path, **QUIET, **options)
    watch(trainer, above(1))
    with pytest.raises(torch.OutOfMemoryError, match=f"stand-in\nSet tokens_per_micro_batch to .*{advice}"):
        trainer.train()


def test_several_processes_end_with_advice(tiny_policy, tmp_path, monkeypatch):
    trainer = build(tiny_policy, tmp_path, **QUIET)
    monkeypatch.setattr(type(trainer._components.micro_batches), "_one_process", False)
    watch(trainer, above(40))
    with pytest.raises(torch.OutOfMemoryError, match="With several processes, or an engine, a step can't be repeated"):
        trainer.train()


def test_out_of_memory_in_generation_or_rewards_is_not_caught(tiny_policy, tmp_path):
    def reward(prompts, **kwargs):
        raise torch.OutOfMemoryError("a reward model's")

    with pytest.raises(Exception, match="a reward model's") as caught:
        train(tiny_policy, tmp_path, reward, **QUIET)
    assert "tokens_per_micro_batch" not in str(caught.value)


# ---- the rehearsal


@pytest.mark.parametrize("options", [{}, {"beta": 0.05}, {"peft_config": lora()}, {"gradient_checkpointing": True}])
def test_the_rehearsal_changes_nothing(options, tiny_policy, tmp_path):
    options = {**QUIET, "max_steps": 2, **options}
    plain = train(tiny_policy, tmp_path / "plain", **options)
    memory = SavedBytes(10**12)
    rehearsed = with_memory(build(tiny_policy, tmp_path / "rehearsed", **options), memory)
    rehearsed.train()
    assert memory.passes == 2
    for ours, theirs in zip(rehearsed.recorder.gradients, plain.recorder.gradients, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert all(map(torch.equal, parameters(rehearsed.model).values(), parameters(plain.model).values()))


def draw(module, args):
    """Draws from each of the random states."""
    torch.rand(3), random.random(), np.random.rand()


def test_the_rehearsal_leaves_gradients_random_states_modes_and_buffers(tiny_policy, tmp_path):
    trainer = build(tiny_policy, tmp_path, **QUIET)
    trainer.model.eval()
    trainer.model.model.layers[0].train()
    trainer.model.model.register_forward_pre_hook(draw)
    found, components = SavedBytes(10**9), trainer._components
    with_memory(trainer, found)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    modes = [module.training for module in trainer.model.modules()]
    before = parameters(trainer.model)
    with components.patches.applied():
        components.choose_size()
    assert found.passes == 2 and components.micro_batches.size.tokens > 0
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])
    assert modes == [module.training for module in trainer.model.modules()]
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert all(map(torch.equal, parameters(trainer.model).values(), before.values()))


def test_the_size_is_what_the_free_memory_takes_less_the_optimizers_state_and_a_margin(tiny_policy, tmp_path, caplog):
    """By hand: a token takes 1000 bytes, and everything else 500."""
    trainer = build(tiny_policy, tmp_path, **QUIET)
    sizes = watch(trainer)
    states = states_of(trainer)
    with_memory(trainer, ByTokens(states + 10**6, sizes))
    with caplog.at_level("INFO"):
        trainer.train()
    tokens = int((10**6 * (1 - MARGIN) - 500) / 1000)
    assert trainer._components.micro_batches.size.tokens == tokens
    assert len(messages(caplog, f"A micro-batch has at most {tokens} packed tokens, which fit into memory.")) == 1


@pytest.mark.parametrize("tokens", [40, 1000])
def test_steps_split_by_the_rehearsed_size(tokens, tiny_policy, tmp_path):
    """One micro-batch where it fits, in place of two; more than TRL's calls where it doesn't."""
    options = {**QUIET, "max_steps": 2, "gradient_accumulation_steps": 2}
    free = train(tiny_policy, tmp_path / "free", **options)
    trainer = build(tiny_policy, tmp_path / "ours", **options)
    sizes = watch(trainer)
    with_room_for(trainer, tokens, sizes)
    trainer.train()
    of_steps = sizes[3:]
    assert max(of_steps) <= tokens
    assert (len(of_steps) == 2) if tokens == 1000 else len(of_steps) > 4
    assert_equal(trainer, free)


def test_a_resumed_run_splits_alike(tiny_policy, tmp_path):
    options = {**QUIET, "save_strategy": "steps", "save_steps": 1}
    whole = build(tiny_policy, tmp_path / "whole", **options, max_steps=4)
    sizes = watch(whole, above(40))
    whole.train()
    cut = build(tiny_policy, tmp_path / "cut", **options, max_steps=4)
    again = watch(cut)
    cut.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert again == sizes[-len(again) :] and len(again) > 4
    torch.testing.assert_close(parameters(cut.model), parameters(whole.model), rtol=0, atol=0)
    other = build(tiny_policy, tmp_path / "other", **options, max_steps=4, tokens_per_micro_batch=1000)
    other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert other._components.micro_batches.size.tokens == 1000


def test_a_rehearsed_size_is_kept_in_checkpoints(tiny_policy, tmp_path):
    options = {**QUIET, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    first = build(tiny_policy, tmp_path / "first", **options)
    with_room_for(first, 40, watch(first)).train()
    second = build(tiny_policy, tmp_path / "second", **options)
    sizes = watch(second)
    with_room_for(second, 1000, sizes).train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-2"))
    assert max(sizes) <= 40
    assert all(map(torch.equal, parameters(first.model).values(), parameters(second.model).values()))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("none left"), RuntimeError("odd")])
def test_a_rehearsal_that_fails_leaves_the_size_as_it_was(error, tiny_policy, tmp_path, caplog):
    trainer = build(tiny_policy, tmp_path, **QUIET)

    class Broken(SavedBytes):
        def peak(self, run):
            raise error

    with_memory(trainer, Broken(10**9)).train()
    assert len(messages(caplog, "A micro-batch's memory isn't measured", str(error))) == 1
    assert trainer._components.micro_batches.size.tokens is None


def test_least_over_ranks_counts(tiny_policy, tmp_path):
    """Every rank uses the least number of all, and none if one failed."""
    trainer = build(tiny_policy, tmp_path, **QUIET)
    components = trainer._components
    for other, expected in ((30, 30), (-1, None)):
        components.memory, components.micro_batches.size = SavedBytes(10**9), type(components.micro_batches.size)(None)
        components.micro_batches.least_over_ranks = lambda number, other=other: min(number, other)
        with components.patches.applied():
            components.choose_size()
        assert components.micro_batches.size.tokens == expected


def test_a_cpu_has_no_memory_to_ask_for():
    assert device_memory.memory_of(torch.device("cpu")) is None
    assert isinstance(device_memory.memory_of(torch.device("cuda")), device_memory.CudaMemory)


def test_a_gpus_memory_is_what_is_free_and_what_torch_has_reserved_for_nothing(monkeypatch):
    allocated = [30]
    numbers = {"mem_get_info": (100, 500), "memory_reserved": 50, "max_memory_allocated": 75}
    for name, number in numbers.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, number=number: number)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    memory = device_memory.CudaMemory(torch.device("cuda"))
    assert memory.free() == 100 + 50 - 30
    assert memory.peak(lambda: allocated.append(1)) == 75 - 30 and len(allocated) == 2


@pytest.mark.parametrize("options", [{"skip_zero_advantage": False}, {"loss_type": "vespo"}, {"share_prompts": False}])
def test_a_run_that_packs_no_rows_rehearses_nothing(options, tiny_policy, tmp_path):
    memory = SavedBytes(10**9)
    with_memory(build(tiny_policy, tmp_path, **{**QUIET, **options}), memory).train()
    assert memory.passes == 0


def test_a_step_that_is_not_logged_and_runs_out_of_memory_leaves_the_next_one_logged(tiny_policy, tmp_path):
    """In its first call of several, so that the repeated calls aren't the ones that close the recorder's step."""
    options = {"interference_every": 2, "loss_type": "grpo", "max_steps": 4, **FOUR}
    trainer = build(tiny_policy, tmp_path, **options)
    failed = []

    def once(number, tokens):
        failed.extend([number] if trainer.state.global_step == 1 and not failed else [])
        return failed == [number]

    watch(trainer, once)
    trainer.train()
    assert failed
    assert ["interference/cos_mean" in log for log in trainer.recorder.logs] == [True, False, True, False, False]
