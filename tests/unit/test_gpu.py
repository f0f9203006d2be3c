"""On a GPU, which alone can show it: kernels on real memory, the trainer's autograd, precision, host synchronisation.

``make gpu`` runs these; elsewhere they are skipped.
"""

import contextlib

import pytest
import torch
from harness import EVALUATED, PLAIN, by_length, distance, norm_of, train
from kernel_inputs import CALLS, LAYOUTS, WIDTH, head_inputs, needs_gpu, shared_rows
from one_of_eight import one_of_eight
from peft import LoraConfig
from trl import GRPOTrainer

from grpo_kernels import use_backend
from trl_ext import CurvatureGRPOTrainer, read_interference
from trl_ext.sharing import attention, flash
from trl_ext.sharing.packed_rows import pack

pytestmark = [pytest.mark.gpu, needs_gpu]

LORA = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0)
ALL_ROWS = {**PLAIN, "loss_type": "dapo", "gradient_accumulation_steps": 2, "steps_per_generation": 2}
SETTINGS = {
    "dapo": {},
    "LoRA": {"peft_config": LORA},
    "KL, twice": {"beta": 0.05, "num_iterations": 2},
    "cispo, batch": {"loss_type": "cispo", "scale_rewards": "batch", "peft_config": LORA},
    "sapo": {"loss_type": "sapo"},
    "vespo": {"loss_type": "vespo", "beta": 0.05},
    "luspo": {"loss_type": "luspo", "steps_per_generation": 4},
    "TRL's loss": {"fused_loss": False, "peft_config": LORA},
    "evaluation": {**EVALUATED, "beta": 0.05},
}


def gradients(policy, folder, setting, ours=True, **extra):
    options = {**ALL_ROWS, **SETTINGS[setting], "use_cpu": False, "max_grad_norm": 0.0, **extra}
    trainer_class = CurvatureGRPOTrainer if ours else GRPOTrainer
    return train(policy, folder, by_length, trainer_class=trainer_class, **options).recorder.gradients


def error(found, expected):
    found, expected = ({name: one.float() for name, one in its.items()} for its in (found, expected))
    return float(distance(found, expected) / norm_of(expected))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_gradients_are_trls_in_float32(setting, checkpointing, tiny_policy, tmp_path):
    extra = {"gradient_checkpointing": checkpointing}
    ours = gradients(tiny_policy, tmp_path / "ours", setting, **extra)
    theirs = gradients(tiny_policy, tmp_path / "theirs", setting, ours=False, **extra)
    assert len(ours) == len(theirs) > 0
    for mine, its in zip(ours, theirs, strict=True):
        assert all(tensor.is_cuda for tensor in mine.values())
        assert error(mine, its) < 1e-4


@pytest.mark.parametrize("setting", ["dapo", "LoRA", "KL, twice", "TRL's loss"])
def test_bf16_is_as_near_to_float32_as_trls(setting, tiny_policy, tmp_path):
    """Before anything moves (one step), so that all three see the same rollouts and parameters."""

    def one(name, **extra):
        return gradients(tiny_policy, tmp_path / name, setting, max_steps=1, **extra)[0]

    truth = one("truth", ours=False)
    ours = one("ours", bf16=True)
    theirs = one("theirs", ours=False, bf16=True)
    if any(its.shape != truth[name].shape for name, its in theirs.items()):
        pytest.fail("the rollouts differ")
    print(f"\nbf16 against float32, {setting}: ours {error(ours, truth):.4f}, TRL's {error(theirs, truth):.4f}")
    assert error(ours, truth) < 1.5 * error(theirs, truth) + 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("repeats", [1, 2])
def test_shared_attention_in_parts(dtype, repeats):
    """As near to float64 as with masks, whose attention is torch's own."""
    ids, mask = (tensor.cuda() for tensor in shared_rows())
    rows = pack(ids, mask, WIDTH)
    torch.manual_seed(0)
    sizes = (4, 4 // repeats, 4 // repeats, 4)
    made = [torch.randn(1, heads, len(rows.token_S), 16, dtype=torch.float64, device="cuda") for heads in sizes]

    def found(dtype, in_parts):
        q, k, v = (tensor.to(dtype, copy=True).requires_grad_() for tensor in made[:3])
        assert in_parts == (flash.supports(q, k, v) and dtype != torch.float64)
        if in_parts:
            out = attention.InParts.apply(q, k, v, rows.spans(), 0.3).transpose(1, 2)
        else:
            out = attention.by_masks(
                q, k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1), rows, 0.3, None
            )
        (out * made[3].transpose(1, 2)).sum().backward()
        return [tensor.double() for tensor in (out, q.grad, k.grad, v.grad)]

    truth, parts = found(torch.float64, False), found(dtype, True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash, "supports", lambda *_: False)
        masked = found(dtype, False)
    for exact, one, other in zip(truth, parts, masked, strict=True):
        assert (one - exact).norm() < 1.5 * (other - exact).norm() + 1e-3 * exact.norm()
        assert (one - exact).norm() < 1e-2 * exact.norm()


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_shared_prompts_for_each_attention(implementation, bf16, tiny_policy, tmp_path):
    """Sharing is by an attention of our own; without, by the model's."""
    options = {"model_init_kwargs": {"attn_implementation": implementation}, "bf16": bf16, "max_steps": 1}
    apart, shared = (
        gradients(tiny_policy, tmp_path / str(share), "dapo", share_prompts=share, interference_every=0, **options)[0]
        for share in (False, True)
    )
    assert error(shared, apart) < (3e-2 if bf16 else 1e-4)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_interference_on_a_gpu(lora, tiny_policy, tmp_path):
    options = {"interference_every": 1, "per_device_train_batch_size": 16, "use_cpu": False, "learning_rate": 0.0}
    if lora:
        options["peft_config"] = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    records = {}
    for dim in (0, 64):
        train(tiny_policy, tmp_path / str(dim), by_length, interference_dim=dim, **options)
        records[dim] = read_interference(tmp_path / str(dim))
    for exact, sketched in zip(records[0], records[64], strict=True):
        assert exact.metrics["interference/sketch_check"] == pytest.approx(1, abs=1e-3)
        assert exact.metrics["interference/coverage"] == pytest.approx(1, abs=1e-5)
        assert sketched.metrics["interference/sketch_check"] == pytest.approx(1, abs=0.2)
        assert abs(sketched.gram_BB - exact.gram_BB).max() < 0.2 * exact.gram_BB.diagonal().max()


@pytest.mark.parametrize("known", [True, False], ids=["coefficients", "no coefficients"])
def test_a_large_step_on_a_gpu(known, monkeypatch):
    """One process of eight, 512 prompts of 16 answers: what the allocator has seen, temporaries of operations too."""
    for _ in range(2):  # the first allocates workspaces of libraries
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        one_of_eight(known, monkeypatch, contextlib.nullcontext(), "cuda")
        peak = torch.cuda.max_memory_allocated() - before
    print(f"{peak / 1e6:.1f} MB held by one of eight on a GPU")
    assert peak <= 64e6


def test_logging_changes_no_parameter_on_a_gpu(tiny_policy, tmp_path):
    def parameters(every):
        options = {"interference_every": every, "use_cpu": False, "share_prompts": False}
        trainer = train(tiny_policy, tmp_path / str(every), by_length, **options)
        return [p.detach().clone() for p in trainer.model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(parameters(0), parameters(1), strict=True))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize(("call", "signal", "names"), CALLS, ids=["rewards", "advantages", "advantages_N", "logprob"])
def test_memory_layout_on_a_gpu(call, signal, names, layout):
    given = {name: tensor.cuda() for name, tensor in head_inputs().items()}
    with use_backend("torch"):
        expected = call(given, signal)
    for name in names:
        found = call({**given, name: layout(given[name])}, signal)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("packed", [False, True])
def test_taps_never_wait_for_the_gpu(packed, tiny_policy):
    """A backward of a step that is logged: nothing in it reads a number from the device."""
    from transformers import AutoModelForCausalLM

    from grpo_kernels.interference.gradient_sketch import GradientSketch

    model = AutoModelForCausalLM.from_pretrained(tiny_policy).cuda()
    ids = torch.randint(3, 90, (4, 16), device="cuda")
    sequence = torch.arange(4, device="cuda")[:, None].expand(4, 16).contiguous() if packed else None
    sketch = GradientSketch(model, 64)
    for _ in range(2):  # the first compiles and allocates
        with sketch.step(0) as recorded, sketch.rows(torch.arange(4, device="cuda"), sequence):
            loss = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)[..., 5].sum()
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                loss.backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert recorded[0].gram().diagonal().min() > 0
        model.zero_grad()


def test_scores_from_an_extra_pass_change_no_parameter_on_a_gpu(tiny_policy, tmp_path):
    """``what_if_dead`` with dropout, in bf16 and with checkpointing: parameters and random numbers as without it."""

    def half_dead(completion_ids, **kwargs):
        return [(len(ids) % 5) / 4 if (place // 4) % 2 else 1.0 for place, ids in enumerate(completion_ids)]

    seen = []
    for dead in (False, True):
        options = {"interference_every": 1, "what_if_dead": dead, "per_device_train_batch_size": 16, "max_steps": 3}
        options |= {"use_cpu": False, "bf16": True, "gradient_checkpointing": True}
        lora = LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj"])
        trainer = train(tiny_policy, tmp_path / str(dead), half_dead, peft_config=lora, **options)
        values = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
        seen.append((torch.rand(4, device="cuda"), values))
        logged = [name for log in trainer.state.log_history for name in log if name == "what_if/global/cos"]
        assert bool(logged) == dead
    assert torch.equal(seen[0][0], seen[1][0])
    assert all(torch.equal(a, b) for a, b in zip(seen[0][1], seen[1][1], strict=True))
