"""The step of SmolLM2 whose gradients are sketched, and its peak memory with and without taps."""

import torch
from head_memory import peak_beyond_now
from transformers import AutoModelForCausalLM

from examples.tasks.smollm2 import smollm2
from grpo_kernels import linear_grpo_loss
from grpo_kernels.interference.gradient_sketch import GradientSketch

PROMPTS, SEQUENCES, TOKENS, COMPLETION = 4, 16, 150, 75


def make_model(lora: bool, device: str):
    """The model that is trained, its backbone and its head."""
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).to(device)
    backbone, head = model.model, model.get_output_embeddings()
    if lora:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False))
    return model.train(), backbone, head


def forward_backward(backbone, head, sketch: GradientSketch | None = None, rows: torch.Tensor | None = None) -> None:
    """The loss of the chosen rows of a made-up batch, all of them by default."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 49152, (SEQUENCES, TOKENS), generator=generator).to(head.weight.device)
    advantages_B = torch.randn(SEQUENCES, generator=generator).to(ids.device)
    if rows is not None:
        ids, advantages_B = ids[rows], advantages_B[rows]
    hidden_NH = backbone(input_ids=ids).last_hidden_state[:, -COMPLETION - 1 : -1].flatten(0, 1)
    sequence_N = torch.arange(len(ids), device=ids.device).repeat_interleave(COMPLETION)
    linear_grpo_loss(
        hidden_NH,
        head.weight,
        ids[:, -COMPLETION:].flatten(),
        sequence_N,
        advantages_B,
        torch.full((len(ids),), 1 / (SEQUENCES * COMPLETION), device=ids.device),
        head_sketch=None if sketch is None else sketch.head_sketch(head, hidden_NH, sequence_N),
    ).loss.backward()


def step_peak(sketched: bool, lora: bool, checkpointing: bool) -> int:
    """Peak bytes beyond the model and its gradients, to be measured in a fresh process."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, backbone, head = make_model(lora, device)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if lora:
            model.enable_input_require_grads()
    sketch = GradientSketch(model, 64) if sketched else None
    prompt_B = torch.arange(PROMPTS, device=device).repeat_interleave(SEQUENCES // PROMPTS)

    def call() -> None:
        if sketch is None:
            forward_backward(backbone, head)
            return
        with sketch.step(0), sketch.rows(prompt_B):
            forward_backward(backbone, head, sketch)

    forward_backward(backbone, head, rows=torch.arange(1, device=device))  # libraries; and the gradients are there
    return peak_beyond_now(call)
