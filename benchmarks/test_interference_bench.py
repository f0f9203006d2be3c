"""Cost of a step that logs interference, in the real trainer; its peak memory; and peers that do the same job.

Counted: a whole optimizer step of SmolLM2-135M on 16 stored rollouts of about 150 tokens: forward, backward, clipping,
AdamW, and on a step that logs the taps, the metrics and the file. Steps that log and steps that don't alternate in one
run (``interference_every=2``), so the floor is the same run's other steps. Predicted: each Linear folds both sides (2 d
additions a token and part, against 6 d^2 multiplications) and multiplies (3k, 3k) twice, 2 (3k)^2 against 3 d^2: at
d = 576 about 8 % more multiplications.

Peers: one backward for each prompt gives the prompts' gradients alone (P times the parameters in memory, and no
reliability); ``torch.func.vmap(grad)`` gives each sequence's, on the built-in policy (SmolLM2's 16 whole gradients need
9 GB).
"""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from compare import alternate
from datasets import Dataset
from interference_memory import PROMPTS, SEQUENCES, TOKENS, forward_backward, make_model
from transformers import AutoTokenizer, TrainerCallback

from examples.tasks.smollm2 import smollm2
from grpo_kernels.interference.gradient_sketch import GradientSketch
from trl_ext import CurvatureGRPOConfig, CurvatureGRPOTrainer, read_interference
from trl_ext.tasks.small_policy import build_model, build_tokenizer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS, SHORT_ROUNDS = 5, 3  # with and without --full
LORA = [pytest.param(False, id="full", marks=pytest.mark.full), pytest.param(True, id="lora")]


class StepSeconds(TrainerCallback):
    """Seconds of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.start)


def stored_rollouts(prompts, trainer):
    generator = torch.Generator().manual_seed(trainer.state.global_step)
    ids = torch.randint(1000, 40000, (len(prompts), TOKENS), generator=generator).tolist()
    half = TOKENS // 2
    return {"prompt_ids": [row[:half] for row in ids], "completion_ids": [row[half:] for row in ids], "logprobs": None}


def alternating(completion_ids, **kwargs):
    """Every group has both: with rewards drawn at random, dead groups would make steps of unequal work."""
    return [float(place % 2) for place in range(len(completion_ids))]


@pytest.mark.parametrize("lora", LORA)
def test_a_step_that_logs(benchmark, record, full, lora, tmp_path):
    from peft import LoraConfig

    rounds = ROUNDS if full else SHORT_ROUNDS
    folder = smollm2()
    trainer = CurvatureGRPOTrainer(
        model=str(folder),
        reward_funcs=alternating,
        args=CurvatureGRPOConfig(
            output_dir=str(tmp_path),
            interference_every=2,
            max_steps=2 * rounds + 2,
            learning_rate=1e-6,
            num_generations=SEQUENCES // PROMPTS,
            per_device_train_batch_size=SEQUENCES,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=DEVICE == "cpu",
        ),
        train_dataset=Dataset.from_dict({"prompt": [f"Question {i}" for i in range(64)]}),
        processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"),
        rollout_func=stored_rollouts,
        peft_config=LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False) if lora else None,
    )
    clock = StepSeconds()
    trainer.add_callback(clock)
    benchmark.pedantic(trainer.train, rounds=1)
    assert len(read_interference(tmp_path)) == rounds + 1
    pairs = list(zip(clock.seconds[2::2], clock.seconds[3::2], strict=True))  # the first two are the warm-up
    ratio = statistics.median(logged / plain for logged, plain in pairs)
    medians = [statistics.median(times) for times in zip(*pairs, strict=True)]
    benchmark.extra_info.update({"logged": medians[0], "plain": medians[1], "ratio": ratio})
    record(
        "interference",
        f"a step that logs, SmolLM2 {'LoRA' if lora else 'full'} {SEQUENCES} x {TOKENS}",
        {
            "ours / floor": ratio,
            "ratio of medians": medians[0] / medians[1],
            "every 10th step, % more": 100 * (ratio - 1) / 10,
        },
    )


@pytest.mark.full
@pytest.mark.parametrize("lora", LORA)
def test_against_one_backward_for_each_prompt(benchmark, record, lora):
    model, backbone, head = make_model(lora, DEVICE)
    sketch = GradientSketch(model, 64)
    prompt_B = torch.arange(PROMPTS, device=DEVICE).repeat_interleave(SEQUENCES // PROMPTS)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def plain() -> None:
        model.zero_grad(set_to_none=True)
        forward_backward(backbone, head)

    def sketched() -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        with sketch.step(0) as recorded, sketch.rows(prompt_B):
            forward_backward(backbone, head, sketch)
        return recorded[0].gram()

    def one_backward_a_prompt() -> torch.Tensor:
        gradients = []
        for prompt in range(PROMPTS):
            model.zero_grad(set_to_none=True)
            forward_backward(backbone, head, rows=(prompt_B == prompt).nonzero().squeeze(1))
            gradients.append([parameter.grad for parameter in parameters])
        return torch.stack(
            [torch.stack([sum((a * b).sum() for a, b in zip(p, q, strict=True)) for q in gradients]) for p in gradients]
        )

    calls = {"plain": plain, "sketched": sketched, "one backward a prompt": one_backward_a_prompt}
    medians = alternate(calls, rounds=3)
    benchmark.extra_info.update(medians)
    record(
        "interference",
        f"forward and backward, SmolLM2 {'LoRA' if lora else 'full'}",
        {
            "ours / floor": medians["sketched"] / medians["plain"],
            "one backward a prompt and Gram matrix / floor": medians["one backward a prompt"] / medians["plain"],
        },
    )
    benchmark.pedantic(sketched, rounds=1)
    sketch.close()


@pytest.mark.full
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("lora", LORA)
def test_peak_memory(benchmark, record, lora, checkpointing):
    """In fresh processes: beyond the model, and beyond the gradients that stay."""

    def peaks() -> dict[str, int]:
        script = str(Path(__file__).with_name("interference_memory.py"))
        found = {}
        for kind in ("plain", "sketched"):
            command = [sys.executable, script, kind, str(int(lora)), str(int(checkpointing))]
            # glibc keeps freed memory below the signs that stay for the step: what is freed is to be gone
            environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144"}
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            found[kind] = int(done.stdout.split()[-1])
        return found

    found = benchmark.pedantic(peaks, rounds=1)
    benchmark.extra_info.update(found)
    record(
        "interference",
        f"peak memory, SmolLM2 {'LoRA' if lora else 'full'}, {'' if checkpointing else 'no '}checkpointing",
        {"plain MiB": found["plain"] / 2**20, "sketched MiB": found["sketched"] / 2**20},
    )


def test_against_gradients_of_each_sequence(benchmark, record):
    """The built-in policy: a whole gradient of each sequence by ``vmap(grad)``; sketch and exact mode."""
    tokenizer = build_tokenizer((1, 4))
    torch.manual_seed(0)
    model = build_model(tokenizer).to(DEVICE)
    model.config._attn_implementation = "eager"  # vmap has no rule for the fused attention's choice of kernel
    ids = torch.randint(4, len(tokenizer), (16, 24), device=DEVICE)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    sketch, exact = GradientSketch(model, 64), GradientSketch(model, 0)

    def loss(values: dict[str, torch.Tensor], row_T: torch.Tensor) -> torch.Tensor:
        logits = torch.func.functional_call(model, values, (row_T[None],), {"use_cache": False}).logits[0, :-1]
        return torch.nn.functional.cross_entropy(logits, row_T[1:], reduction="sum")

    def by_vmap() -> torch.Tensor:
        gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, ids)
        flat = torch.cat([gradient.flatten(1) for gradient in gradients.values()], dim=1)
        return flat @ flat.T

    def plain() -> None:
        model.zero_grad(set_to_none=True)
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum").backward()

    def by_taps(taps: GradientSketch) -> torch.Tensor:
        with taps.step(0) as recorded, taps.rows(torch.arange(16, device=DEVICE)):
            plain()
        return recorded[0].gram()

    contenders = {
        "plain": plain,
        "sketch": lambda: by_taps(sketch),
        "exact": lambda: by_taps(exact),
        "vmap(grad)": by_vmap,
    }
    torch.testing.assert_close(by_taps(exact).float(), by_vmap(), rtol=1e-3, atol=1e-3)
    medians = alternate(contenders, rounds=15)
    benchmark.extra_info.update(medians)
    names = {"sketch": "ours", "exact": "ours, exact", "vmap(grad)": "vmap(grad)"}
    record(
        "interference",
        "each sequence's gradient, built-in policy 16 x 24",
        {f"{shown} / floor": medians[name] / medians["plain"] for name, shown in names.items()},
    )
    benchmark.pedantic(contenders["sketch"], rounds=1)


def test_what_if_against_a_backward_for_each(benchmark, record):
    """Eleven normalisations' steps: from one sketch and its inner products, and by a backward of its own for each."""
    from grpo_kernels import normalize_rewards
    from grpo_kernels.interference.noise import gradient_noise
    from grpo_kernels.interference.what_if import StepScores, candidates, what_if

    tokenizer = build_tokenizer((1, 4))
    torch.manual_seed(0)
    model = build_model(tokenizer).to(DEVICE)
    methods = ["mean", "loo", "std", "batch_std", "power", "mean_abs", "rank", "max_rl", "median_mad", "iqr", "global"]
    n_prompts, count = 16, 8
    ids = torch.randint(4, len(tokenizer), (n_prompts * count, 12), device=DEVICE)
    reward_PG = (torch.rand(n_prompts, count, device=DEVICE) > 0.5).float()
    prompt_B = torch.arange(n_prompts, device=DEVICE).repeat_interleave(count)
    own = {"power": {"alpha": 0.5}}
    advantages = {name: normalize_rewards(reward_PG, name, **own.get(name, {})).flatten() for name in methods}
    sketch, chosen = GradientSketch(model, 32), candidates(methods)
    position_B = torch.arange(count, device=DEVICE).repeat(n_prompts)

    def step(advantage_B: torch.Tensor) -> None:
        model.zero_grad(set_to_none=True)
        logp = model(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1)
        (-logp.gather(2, ids[:, 1:, None]).squeeze(2).sum(1) @ advantage_B).backward()

    def by_sketch() -> dict[str, float]:
        with sketch.step(0) as recorded, sketch.rows(prompt_B):
            step(advantages["std"])
        a = advantages["std"]
        scores = StepScores(recorded[0].gram(), -a, a, a, prompt_B, position_B, reward_PG)
        gradient_noise(scores)
        return {name: row.cos for name, row in what_if(scores, chosen).rows.items()}

    def by_backward() -> dict[str, float]:
        flat = {}
        for name, advantage_B in advantages.items():
            step(advantage_B)
            flat[name] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        return {
            name: float(torch.nn.functional.cosine_similarity(one, flat["std"], dim=0)) for name, one in flat.items()
        }

    ours, theirs = by_sketch(), by_backward()
    assert all(abs(ours[name] - theirs[name]) < 0.1 for name in ours)
    medians = alternate({"plain": lambda: step(advantages["std"]), "ours": by_sketch, "peer": by_backward}, rounds=7)
    benchmark.extra_info.update(medians)
    record(
        "interference",
        "eleven normalisations' steps, built-in policy 16 x 8",
        {
            "ours / floor": medians["ours"] / medians["plain"],
            "a backward for each / floor": medians["peer"] / medians["plain"],
        },
    )
    benchmark.pedantic(by_sketch, rounds=1)
    sketch.close()
