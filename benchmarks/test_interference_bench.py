"""Cost of a step that logs interference: SmolLM2-135M, forward and backward with and without taps, and peers.

Counted: forward and backward of 16 sequences of about 150 tokens, fused loss included, no optimizer. The floor is the
same step without taps. Peers give what the sketch gives: a gradient for each prompt, by one backward for each prompt,
or by ``torch.func.vmap(grad)`` (on the built-in policy only: SmolLM2's 16 whole gradients need 9 GB beside theirs).
"""

import pytest
import torch
from compare import alternate
from conftest import ROWS
from transformers import AutoModelForCausalLM

from grpo_kernels import linear_grpo_loss
from grpo_kernels.gradient_sketch import GradientSketch
from trl_ext.tasks.smollm2 import smollm2

PROMPTS, GENERATIONS, TOKENS, COMPLETION = 4, 4, 150, 75
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_step_that_logs(benchmark, lora):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).to(DEVICE)
    head = model.get_output_embeddings()
    backbone = model.model
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
        model.train()
    count = PROMPTS * GENERATIONS
    ids = torch.randint(0, 49152, (count, TOKENS), device=DEVICE)
    prompt_B = torch.arange(PROMPTS, device=DEVICE).repeat_interleave(GENERATIONS)
    advantages_B = torch.randn(count, device=DEVICE)
    sketch = GradientSketch(model, 64)

    def forward_backward(rows: torch.Tensor, taps: bool) -> None:
        model.zero_grad(set_to_none=True)
        hidden = backbone(input_ids=ids[rows]).last_hidden_state[:, -COMPLETION - 1 : -1]
        sequence_N = torch.arange(len(rows), device=DEVICE).repeat_interleave(COMPLETION)
        hidden_NH = hidden.flatten(0, 1)
        out = linear_grpo_loss(
            hidden_NH, head.weight, ids[rows, -COMPLETION:].flatten(), sequence_N, advantages_B[rows],
            torch.full((len(rows),), 1 / (count * COMPLETION), device=DEVICE),
            head_sketch=sketch.head_sketch(head, hidden_NH, sequence_N) if taps else None,
        )  # fmt: skip
        out.loss.backward()

    everything = torch.arange(count, device=DEVICE)

    def logged() -> None:
        with sketch.step(0) as recorded:
            with sketch.rows(prompt_B):
                forward_backward(everything, True)
        recorded[0].gram()

    def one_backward_a_prompt() -> None:
        for prompt in range(PROMPTS):
            forward_backward((prompt_B == prompt).nonzero().squeeze(1), False)

    medians = alternate(
        {
            "logged": logged,
            "plain": lambda: forward_backward(everything, False),
            "backward a prompt": one_backward_a_prompt,
        },
        rounds=5,
    )
    benchmark.extra_info.update(medians)
    ratio, peer = (medians[name] / medians["plain"] for name in ("logged", "backward a prompt"))
    ROWS.append(
        f"interference SmolLM2 {'LoRA' if lora else 'full'} {count} x {TOKENS}: logged / plain {ratio:5.3f}   "
        f"at every tenth step {1 + (ratio - 1) / 10:6.4f}   one backward a prompt / plain {peer:5.2f}"
    )
    benchmark.pedantic(logged, rounds=1)
    sketch.close()


def test_against_vmap_of_grad(benchmark):
    """The built-in policy: a whole gradient of each sequence by ``vmap(grad)``, against the sketch of each."""
    from trl_ext.tasks.small_policy import build_model, build_tokenizer

    tokenizer = build_tokenizer((1, 4))
    torch.manual_seed(0)
    model = build_model(tokenizer).to(DEVICE)
    model.config._attn_implementation = "eager"  # vmap has no rule for the fused attention's choice of kernel
    ids = torch.randint(4, len(tokenizer), (16, 24), device=DEVICE)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    sketch = GradientSketch(model, 64)

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

    def by_sketch(dim_sketch: GradientSketch = sketch) -> torch.Tensor:
        with dim_sketch.step(0) as recorded, dim_sketch.rows(torch.arange(16, device=DEVICE)):
            plain()
        return recorded[0].gram()

    exact = GradientSketch(model, 0)
    torch.testing.assert_close(by_sketch(exact).float(), by_vmap(), rtol=1e-3, atol=1e-3)
    contenders = {"sketch": by_sketch, "exact": lambda: by_sketch(exact), "vmap": by_vmap, "plain": plain}
    medians = alternate(contenders, rounds=7)
    benchmark.extra_info.update(medians)
    ROWS.append(
        "interference built-in policy, 16 x 24 tokens: sketch / plain "
        f"{medians['sketch'] / medians['plain']:5.2f}   exact / plain {medians['exact'] / medians['plain']:5.2f}   "
        f"vmap(grad) / plain {medians['vmap'] / medians['plain']:5.2f}"
    )
    benchmark.pedantic(by_sketch, rounds=1)
