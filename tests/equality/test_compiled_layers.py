"""Compiled decoder layers: the gradients of uncompiled ones, few compilations, and what falls back and says so."""

import copy
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend
from harness import EVALUATED, assert_same_gradients, build, distance, logged, lora, messages, norm_of, train
from kernel_inputs import WIDTH, shared_rows
from poison import poisoned_memory
from tiny_models import TINY
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig

from trl_ext.compilation import Compilation
from trl_ext.compiled_layers import COMPILED, CompiledLayers, Sizes
from trl_ext.head.forward import FusedHead, HeadCall
from trl_ext.head.patch import add_fused_head
from trl_ext.head.settings import read_settings
from trl_ext.sharing import operators, parts
from trl_ext.sharing.hooks import add_sharing_hooks
from trl_ext.sharing.packed_rows import pack, spans_of

EAGER = {"torch_compile_backend": "aot_eager"}
SIZES = {**TINY, "vocab_size": 97, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch):
    """``torch_compile`` sets variables, which would compile the models of later tests too."""
    torch._dynamo.reset()
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    monkeypatch.setenv("ACCELERATE_DYNAMO_MODE", "default")


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


# ---- the trainer


@pytest.mark.parametrize(
    "options",
    [
        {"peft_config": lora(), "gradient_checkpointing": True, "checkpoint_layers": 1},
        {"share_prompts": False, "bf16": True},
    ],
    ids=["lora, a layer checkpointed", "not shared, autocast"],
)
def test_gradients_of_a_run(options, tiny_policy, tmp_path, caplog):
    options = {"interference_every": 0, **options}
    expected = train(tiny_policy, tmp_path, **options).recorder.gradients
    before = graphs()
    trainer = train(tiny_policy, tmp_path, **options, **EAGER)
    assert graphs() > before and not messages(caplog, "aren't compiled")
    assert_same_gradients(trainer.recorder.gradients, expected)


def test_steps_that_log_interference_run_uncompiled(tiny_policy, tmp_path):
    options = {"interference_every": 2, "interference_dim": 0, "max_steps": 2}
    expected = train(tiny_policy, tmp_path / "eager", **options)
    before, counted = graphs(), []
    trainer = build(tiny_policy, tmp_path / "compiled", compile_layers=True, **options)
    trainer._components.compiled._compilation = Compilation("aot_eager", None)
    step = trainer.training_step
    trainer.training_step = lambda *given: (step(*given), counted.append(graphs()))[0]
    trainer.train()
    assert counted[0] == before < counted[1]
    assert_same_gradients(trainer.recorder.gradients, expected.recorder.gradients)
    ours, theirs = (logged(one, "interference/coverage") for one in (trainer, expected))
    assert len(ours) == len(theirs) == 1 and ours[0]["interference/coverage"] == pytest.approx(1.0)
    assert ours[0]["interference/cos_mean"] == pytest.approx(theirs[0]["interference/cos_mean"], abs=1e-6)


def test_the_model_is_not_compiled_as_a_whole_and_is_left_as_it_was(tiny_policy, tmp_path):
    trainer = build(tiny_policy, tmp_path, beta=0.1, **EVALUATED, **EAGER)
    assert trainer.accelerator.state.dynamo_plugin.backend == DynamoBackend.NO
    with trainer._components.patches.applied():
        assert all(COMPILED in vars(layer) for layer in trainer.model.model.layers)
        for copied in (copy.deepcopy(trainer.model), pickle.loads(pickle.dumps(trainer.model))):
            assert not any(vars(layer).get(COMPILED) for layer in copied.model.layers)
            assert copied(torch.ones(1, 3, dtype=torch.long)).logits.shape[:2] == (1, 3)
    trainer.train()
    assert logged(trainer, "eval_reward")
    assert type(trainer.model_wrapped) is type(trainer.model)
    assert not any({"forward", COMPILED} & vars(layer).keys() for layer in trainer.model.model.layers)


def test_accelerate_launch_compiles_layers_too(tiny_policy, tmp_path, monkeypatch, caplog):
    """The model as a whole would call no taps, and compile again for every packed row."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "aot_eager")
    before = graphs()
    trainer = train(tiny_policy, tmp_path, interference_every=2, interference_dim=0)
    assert graphs() - before == 2 and type(trainer.model_wrapped) is type(trainer.model)
    assert logged(trainer, "interference/coverage")[0]["interference/coverage"] == pytest.approx(1.0)
    assert len(messages(caplog, "Layers are compiled: ACCELERATE_DYNAMO_BACKEND is set")) == 1


# ---- what isn't compiled


def test_attention_by_masks_falls_back_and_says_why(tiny_policy, tmp_path, caplog):
    trainer = build(tiny_policy, tmp_path, interference_every=0, **EAGER)
    for layer in trainer.model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    trainer.train()
    assert trainer.state.global_step == 2
    (message,) = messages(caplog, "Layers aren't compiled from here on")
    assert "attention with dropout or a sliding window isn't compiled" in message


@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.nightly), True])
def test_a_backward_that_can_not_be_compiled(checkpointing, tiny_policy, tmp_path, caplog):
    options = {"interference_every": 0, "gradient_checkpointing": checkpointing}
    expected = train(tiny_policy, tmp_path, **options).recorder.gradients

    def broken(graph, inputs):
        raise RuntimeError("no such instruction")

    trainer = build(tiny_policy, tmp_path, compile_layers=True, **options)
    backend = aot_autograd(fw_compiler=lambda graph, inputs: graph, bw_compiler=broken)
    trainer._components.compiled._compilation = Compilation(backend, None)
    trainer.train()
    assert len(messages(caplog, "aren't compiled from here on", "no such instruction")) == 1
    assert_same_gradients(trainer.recorder.gradients, expected)


@pytest.mark.parametrize(
    ("engine", "model", "reason"),
    [
        (DistributedType.FSDP, LlamaConfig(**SIZES), "hasn't been tried with FSDP"),
        (DistributedType.NO, None, "has no decoder layers"),
    ],
)
def test_engines_and_models_that_are_not_compiled(engine, model, reason):
    model = torch.nn.Linear(2, 2) if model is None else AutoModelForCausalLM.from_config(model)
    said = []
    accelerator = SimpleNamespace(distributed_type=engine, deepspeed_plugin=None)
    run = SimpleNamespace(log_once=said.append, compilation=Compilation("eager", None), accelerator=accelerator)
    assert CompiledLayers(run, model).patches() == []
    assert len(said) == 1 and reason in said[0]


# ---- a model by itself


def compiled_model(config, backend, dtype=torch.float32):
    """A model with our head, and its layers; compiled within ``layers.allowed``."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype).train()
    run = SimpleNamespace(
        log_once=pytest.fail, compilation=Compilation(backend, None), accelerator=Accelerator(cpu=True)
    )
    layers = CompiledLayers(run, model)
    add_fused_head(model, FusedHead(read_settings(model), entropy=False, size_of=layers.size_of))
    add_sharing_hooks(model)
    for patch in layers.patches():
        patch()
    return model, layers


def gradient(model, layers, ids, mask, width, *, compiled, thread=None):
    labels = torch.where(mask.bool(), ids, -100)
    labels[:, :width] = -100
    with layers.allowed(compiled):
        call = HeadCall(prompt_width=width)
        out = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True, head_call=call)
        loss = out.log_probs.double().sum()
        if thread is None:
            loss.backward()
        else:
            thread.submit(loss.backward).result()
    found = {name: parameter.grad.double() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def drawn_rows(generator):
    """Up to 24 answers to up to 4 prompts, of all lengths."""
    count = int(torch.randint(1, 25, (), generator=generator))
    prompts = torch.randint(2, 97, (4, 12), generator=generator)
    which = torch.randint(0, 4, (count,), generator=generator)
    ids = torch.cat([prompts[which], torch.randint(2, 97, (count, 20), generator=generator)], 1)
    lengths = torch.randint(1, 21, (count, 1), generator=generator)
    return ids, (torch.arange(32) < 12 + lengths).long()


def test_two_hundred_micro_batches_make_few_shapes():
    counter = CompileCounterWithBackend("aot_eager")
    model, layers = compiled_model(LlamaConfig(**{**SIZES, "num_hidden_layers": 1}), counter)
    backbone, generator = model.model, torch.Generator().manual_seed(0)
    sizes = set()
    with layers.allowed(True):
        for _ in range(200):
            ids, mask = drawn_rows(generator)
            rows = pack(ids, mask, 12, layers.size_of)
            sizes.add(len(rows.token_S))
            backbone(**rows.inputs(ids), use_cache=False)
    assert 2 <= len(sizes) <= 8
    assert 2 <= counter.frame_count <= 8
    compiled, expected = (gradient(model, layers, ids, mask, 12, compiled=on) for on in (True, False))
    assert distance(compiled, expected) <= 1e-5 * norm_of(expected)


def test_a_backward_that_autograd_runs_in_another_thread_falls_back_too():
    """As on a GPU. A checkpoint of the older kind compiles the backward there, without this thread's settings."""

    def broken(graph, inputs):
        raise RuntimeError("no such instruction")

    backend = aot_autograd(fw_compiler=lambda graph, inputs: graph, bw_compiler=broken)
    model, layers = compiled_model(LlamaConfig(**{**SIZES, "num_hidden_layers": 1}), backend)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    said, (ids, mask) = [], shared_rows()
    layers._log_once = said.append
    expected = gradient(model, layers, ids, mask, WIDTH, compiled=False)
    with ThreadPoolExecutor(1) as thread:
        found = gradient(model, layers, ids, mask, WIDTH, compiled=True, thread=thread)
    assert len(said) == 1 and "no such instruction" in said[0]
    assert distance(found, expected) <= 1e-5 * norm_of(expected)


@pytest.mark.nightly
def test_sliding_windows_that_hide_nothing():
    config = Gemma3TextConfig(**SIZES, sliding_window=40, layer_types=["sliding_attention", "full_attention"])
    model, layers = compiled_model(config, "aot_eager")
    ids, mask = shared_rows()
    compiled, expected = (gradient(model, layers, ids, mask, WIDTH, compiled=on) for on in (True, False))
    assert distance(compiled, expected) <= 1e-5 * norm_of(expected)


@needs_compiler
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.nightly), torch.bfloat16])
def test_inductor(dtype):
    """Float32 is eager's to 1e-5; bfloat16 is as near to float64 as eager's is."""
    ids, mask = shared_rows()

    def found(dtype, compiled):
        model, layers = compiled_model(LlamaConfig(**{**SIZES, "num_hidden_layers": 1}), "inductor", dtype)
        return gradient(model, layers, ids, mask, WIDTH, compiled=compiled)

    compiled, eager = found(dtype, True), found(dtype, False)
    if dtype == torch.float32:
        assert distance(compiled, eager) <= 1e-5 * norm_of(eager)
        return
    truth = found(torch.float64, False)
    assert 0 < distance(compiled, truth) <= 1.1 * distance(eager, truth) + 1e-3 * norm_of(truth)


# ---- the operator and the sizes

LENGTHS = [3, 1, 5], [4, 0, 7], [4, 0, 2, 5]


def table_of(lengths):
    return torch.tensor([len(lengths[0]), len(lengths[2]), *(n for part in lengths for n in part), 0, 0])


def drawn(tokens, dtype=torch.float64, heads=(4, 2, 2)):
    torch.manual_seed(0)
    return [torch.randn(1, tokens, n, 8, dtype=dtype).transpose(1, 2).requires_grad_() for n in heads]


def test_the_operator():
    given = drawn(23)
    torch.library.opcheck(operators.packed_attention, (*given, table_of(LENGTHS), 0.3))
    torch.autograd.gradcheck(lambda *qkv: operators.packed_attention(*qkv, table_of(LENGTHS), 0.3)[0], given)


def test_padding_is_nobodys_and_has_no_gradient():
    """Padding tokens and uninitialised memory hold NaN; outputs and gradients don't change."""
    whole, spans = drawn(27), spans_of(*LENGTHS)
    own = [x[:, :, :20].detach().requires_grad_() for x in whole]
    with torch.no_grad():
        for x in whole:
            x[:, :, 20:] = torch.nan
    cotangent = torch.randn(1, 27, 4, 8, dtype=torch.float64)
    with poisoned_memory():
        out = operators.packed_attention(*whole, table_of(LENGTHS), 0.3)[0]
        out.backward(cotangent)
    expected = parts.InParts.apply(*own, spans, 0.3).transpose(1, 2)
    expected.backward(cotangent[:, :20])
    torch.testing.assert_close(out[:, :20], expected)
    assert not out[:, 20:].any()
    for padded, exact in zip(whole, own, strict=True):
        torch.testing.assert_close(padded.grad[:, :, :20], exact.grad)
        assert not padded.grad[:, :, 20:].any()


def test_sizes_are_few_and_waste_little():
    sizes = Sizes()
    torch.manual_seed(0)
    counts = torch.randint(700, 6000, (200,)).tolist()
    found = [sizes.round_up(count) for count in counts]
    assert len(set(found)) <= 8 and set(found) == set(sizes.used)
    assert all(size >= count for size, count in zip(found, counts, strict=True))
    assert sum(found) < 1.2 * sum(counts)
    assert sizes.round_up(1) == min(sizes.used)


def test_sizes_of_ever_longer_rows_double_at_last():
    sizes = Sizes()
    found = [sizes.round_up(count) for count in range(100, 40_000, 50)]
    assert all(size >= count for size, count in zip(found, range(100, 40_000, 50), strict=True))
    assert len(sizes.used) <= 8 + 7  # from 1024 to 65536
