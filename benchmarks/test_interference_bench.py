"""Cost of a step that logs interference, in the real trainer; its peak memory; and peers that do the same job.

Counted: a whole optimizer step of SmolLM2-135M on 16 stored rollouts of about 150 tokens: forward, backward, clipping,
AdamW, and on a step that logs the taps, the metrics and the file. Steps that log and steps that don't alternate in one
run (``interference_every=2``), so the floor is the same run's other steps. Predicted: each Linear folds both sides (2 d
additions a token and part, against 6 d^2 multiplications) and multiplies (3k, 3k) twice, 2 (3k)^2 against 3 d^2: at
d = 576 about 8 % more multiplications.

Peers: one backward for each prompt gives the prompts' gradients alone (P times the parameters in memory, and no
signal); ``torch.func.vmap(grad)`` gives each sequence's, on the built-in policy (SmolLM2's 16 whole gradients need
9 GB).
"""

import statistics

import pytest
import torch
from compare import StepSeconds, in_fresh_process
from datasets import Dataset
from interference_memory import PROMPTS, SEQUENCES, TOKENS, forward_backward, make_model, step_peak
from peft import LoraConfig
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import AutoTokenizer

from examples.tasks.smollm2 import smollm2
from grpo_kernels import normalize_rewards
from grpo_kernels.interference.gradient_sketch import GradientSketch
from grpo_kernels.interference.noise import gradient_noise
from grpo_kernels.interference.what_if import StepScores, candidates, what_if
from trl_ext import CurvatureGRPOConfig, CurvatureGRPOTrainer, read_interference
from trl_ext.tasks.small_policy import build_model, build_tokenizer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS, SHORT_ROUNDS = 5, 3  # with and without --full
LORA = [pytest.param(False, id="full", marks=pytest.mark.full), pytest.param(True, id="lora")]


def built_in_model():
    """The built-in policy before its warm-up."""
    tokenizer = build_tokenizer((1, 4))
    torch.manual_seed(0)
    return build_model(tokenizer).to(DEVICE), len(tokenizer)


def stored_rollouts(prompts, trainer):
    generator = torch.Generator().manual_seed(trainer.state.global_step)
    ids = torch.randint(1000, 40000, (len(prompts), TOKENS), generator=generator).tolist()
    half = TOKENS // 2
    return {"prompt_ids": [row[:half] for row in ids], "completion_ids": [row[half:] for row in ids], "logprobs": None}


def alternating(completion_ids, **kwargs):
    """Every group has both: with rewards drawn at random, dead groups would make steps of unequal work."""
    return [float(place % 2) for place in range(len(completion_ids))]


def logging_trainer(lora: bool, rounds: int, output_dir) -> CurvatureGRPOTrainer:
    folder = smollm2()
    return CurvatureGRPOTrainer(
        model=str(folder),
        reward_funcs=alternating,
        args=CurvatureGRPOConfig(
            output_dir=str(output_dir),
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


@pytest.mark.parametrize("lora", LORA)
def test_a_step_that_logs(benchmark, record, full, lora, tmp_path):
    rounds, clock = ROUNDS if full else SHORT_ROUNDS, StepSeconds()
    trainer = logging_trainer(lora, rounds, tmp_path)
    trainer.add_callback(clock)
    benchmark.pedantic(trainer.train, rounds=1)
    assert len(read_interference(tmp_path)) == rounds + 1
    pairs = list(zip(clock.seconds[2::2], clock.seconds[3::2], strict=True))  # the first two are the warm-up
    ratio = statistics.median(logged / plain for logged, plain in pairs)
    logged, plain = (statistics.median(times) for times in zip(*pairs, strict=True))
    values = {"ours / floor": ratio, "ratio of medians": logged / plain, "every 10th step, % more": 10 * (ratio - 1)}
    benchmark.extra_info.update(values)
    record("interference", f"a step that logs, {name_of(lora)} {SEQUENCES} x {TOKENS}", values)


def name_of(lora: bool) -> str:
    return f"SmolLM2 {'LoRA' if lora else 'full'}"


@pytest.mark.full
@pytest.mark.parametrize("lora", LORA)
def test_against_one_backward_for_each_prompt(compare, lora):
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

    contenders = {"floor": plain, "ours": sketched, "peer": one_backward_a_prompt}
    values = {"ours / floor": ("ours", "floor"), "one backward a prompt and Gram matrix / floor": ("peer", "floor")}
    compare("interference", f"forward and backward, {name_of(lora)}", contenders, values, rounds=3)
    sketch.close()


@pytest.mark.full
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("lora", LORA)
def test_peak_memory(benchmark, record, lora, checkpointing):
    """In fresh processes: beyond the model, and beyond the gradients that stay."""

    plain = in_fresh_process(step_peak, False, lora, checkpointing)
    sketched = benchmark.pedantic(in_fresh_process, args=(step_peak, True, lora, checkpointing), rounds=1)
    values = {"plain MiB": plain / 2**20, "sketched MiB": sketched / 2**20}
    record("interference", f"peak memory, {name_of(lora)}, {'' if checkpointing else 'no '}checkpointing", values)


def test_against_gradients_of_each_sequence(compare):
    """The built-in policy: a whole gradient of each sequence by ``vmap(grad)``; sketch and exact mode."""
    model, vocabulary = built_in_model()
    model.config._attn_implementation = "eager"  # vmap has no rule for the fused attention's choice of kernel
    ids = torch.randint(4, vocabulary, (16, 24), device=DEVICE)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    sketch, exact = GradientSketch(model, 64), GradientSketch(model, 0)

    def loss(values: dict[str, torch.Tensor], row_T: torch.Tensor) -> torch.Tensor:
        logits = torch.func.functional_call(model, values, (row_T[None],), {"use_cache": False}).logits[0, :-1]
        return cross_entropy(logits, row_T[1:], reduction="sum")

    def by_vmap() -> torch.Tensor:
        gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, ids)
        flat = torch.cat([gradient.flatten(1) for gradient in gradients.values()], dim=1)
        return flat @ flat.T

    def plain() -> None:
        model.zero_grad(set_to_none=True)
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum").backward()

    def by_taps(taps: GradientSketch) -> torch.Tensor:
        with taps.step(0) as recorded, taps.rows(torch.arange(16, device=DEVICE)):
            plain()
        return recorded[0].gram()

    torch.testing.assert_close(by_taps(exact).float(), by_vmap(), rtol=1e-3, atol=1e-3)
    names = {"ours": lambda: by_taps(sketch), "ours, exact": lambda: by_taps(exact), "vmap(grad)": by_vmap}
    values = {f"{name} / floor": (name, "floor") for name in names}
    case = "each sequence's gradient, built-in policy 16 x 24"
    compare("interference", case, {"floor": plain, **names}, values, rounds=15)


METHODS = ["mean", "loo", "std", "batch_std", "power", "mean_abs", "rank", "max_rl", "median_mad", "iqr", "global"]


def advantages_of(reward_PG: torch.Tensor) -> dict[str, torch.Tensor]:
    """By method, (P * G,)."""
    own = {"power": {"alpha": 0.5}}
    return {name: normalize_rewards(reward_PG, name, **own.get(name, {})).flatten() for name in METHODS}


def test_what_if_against_a_backward_for_each(compare):
    """Eleven normalisations' steps: from one sketch and its inner products, and by a backward of its own for each."""
    model, vocabulary = built_in_model()
    n_prompts, count = 16, 8
    ids = torch.randint(4, vocabulary, (n_prompts * count, 12), device=DEVICE)
    reward_PG = (torch.rand(n_prompts, count, device=DEVICE) > 0.5).float()
    prompt_B = torch.arange(n_prompts, device=DEVICE).repeat_interleave(count)
    position_B = torch.arange(count, device=DEVICE).repeat(n_prompts)
    advantages = advantages_of(reward_PG)
    sketch, chosen = GradientSketch(model, 32), candidates(METHODS)

    def step(advantage_B: torch.Tensor = advantages["std"]) -> None:
        model.zero_grad(set_to_none=True)
        logp = model(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1)
        (-logp.gather(2, ids[:, 1:, None]).squeeze(2).sum(1) @ advantage_B).backward()

    def by_sketch() -> dict[str, float]:
        with sketch.step(0) as recorded, sketch.rows(prompt_B):
            step()
        a = advantages["std"]
        scores = StepScores(recorded[0].gram(), -a, a, a, prompt_B, position_B, reward_PG)
        gradient_noise(scores)
        return {name: row.cos for name, row in what_if(scores, chosen).rows.items()}

    def by_backward() -> dict[str, float]:
        flat = {}
        for name, advantage_B in advantages.items():
            step(advantage_B)
            flat[name] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        return {name: float(cosine_similarity(one, flat["std"], dim=0)) for name, one in flat.items()}

    ours, theirs = by_sketch(), by_backward()
    assert all(abs(ours[name] - theirs[name]) < 0.1 for name in ours)
    values = {"ours / floor": ("ours", "floor"), "a backward for each / floor": ("peer", "floor")}
    contenders = {"floor": step, "ours": by_sketch, "peer": by_backward}
    compare("interference", "eleven normalisations' steps, built-in policy 16 x 8", contenders, values, rounds=7)
    sketch.close()
