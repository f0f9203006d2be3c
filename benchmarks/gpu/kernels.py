"""Every normalisation against TRL's lines for its own and a copy; the sketch of gradients against a plain backward;
the product with the log-sum-exp in its epilogue against cuBLAS and a pass over the logits.
"""

from __future__ import annotations

from collections.abc import Callable

import step_contenders as steps
import torch
from compare import alternate
from normalize_contenders import context_of, rewards_of, trl_lines

from grpo_kernels import METHODS, normalize_rewards
from grpo_kernels.interference.gradient_sketch import GradientSketch

from .record import FLOOR, Record
from .setting import Setting

SEQUENCES, TOKENS = 16, 150


def normalisation(rewards_PG: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Ours by method, TRL's lines, and a copy."""

    def call(method: str) -> Callable[[], object]:
        context, options = context_of(method, rewards_PG), {"alpha": 0.5} if method == "power" else {}
        given_PG = rewards_of(method, rewards_PG)
        return lambda: normalize_rewards(given_PG, method, context=context, **options)

    calls: dict[str, Callable[[], object]] = {f"ours, {method}": call(method) for method in METHODS}
    return {**calls, "TRL's std": lambda: trl_lines(rewards_PG), FLOOR: rewards_PG.clone}


def sketch(setting: Setting) -> dict[str, Callable[[], object]]:
    """Forward and backward of the decoder alone, with every weight trained, plain and sketched."""
    model = steps.random_model("tiny" if setting.tiny else "0.5B")[0].model.train()
    tokens = TOKENS // 10 if setting.tiny else TOKENS
    ids = torch.randint(10, 600, (SEQUENCES, tokens), device=setting.device)
    recorder, sequence_B = GradientSketch(model, 8 if setting.tiny else 64), torch.arange(SEQUENCES).to(ids.device)

    def plain() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(setting.device, torch.bfloat16, enabled=setting.device == "cuda"):
            hidden_BTH = model(input_ids=ids, use_cache=False).last_hidden_state
        hidden_BTH.float().square().mean().backward()

    def sketched() -> None:
        with recorder.step(0), recorder.rows(sequence_B):
            plain()

    return {"ours, sketched": sketched, FLOOR: plain}


def statistics(setting: Setting) -> dict[str, Callable[[], object]]:
    """A tile's logits with their row statistics: in the product's epilogue, or by a pass after cuBLAS's product.

    Where Triton's kernels run, that is. Elsewhere there is the product alone.
    """
    tokens, width, words = (16, 32, 600) if setting.tiny else (2048, 4096, 151936)
    hidden_NH, weight_VH = (
        torch.randn(n, width, device=setting.device, dtype=setting.dtype) / width**0.5 for n in (tokens, words)
    )
    targets_N = torch.randint(0, words, (tokens,), device=setting.device)
    out_NV = hidden_NH.new_empty(tokens, words)

    def product() -> torch.Tensor:
        return torch.mm(hidden_NH, weight_VH.T, out=out_NV)

    if setting.device != "cuda":
        return {FLOOR: product}
    from epilogue_product import logits_with_statistics

    from grpo_kernels.head.rows.plain import Transform
    from grpo_kernels.head.rows.triton_rows import softmax_rows_

    return {
        "in the epilogue": lambda: logits_with_statistics(hidden_NH, weight_VH, targets_N, out_NV),
        "cuBLAS and a pass": lambda: softmax_rows_(product(), targets_N, Transform()),
        FLOOR: product,
    }


def measure(record: Record, setting: Setting) -> None:
    sizes = ((4, 4),) if setting.tiny else ((16, 8), (512, 16))
    cases: dict[str, Callable[[], dict[str, Callable[[], object]]]] = {
        f"normalise {p} x {g}": lambda p=p, g=g: normalisation(torch.rand(p, g, device=setting.device))
        for p, g in sizes
    }
    cases["sketch, 16 sequences"] = lambda: sketch(setting)
    cases["logits and their statistics"] = lambda: statistics(setting)
    for case in record.open_cases(cases):
        with record.attempt(case, "all"):
            seconds = alternate(cases[case](), rounds=setting.rounds)
            for name, time in seconds.items():
                record.add(case, name, {"ms": 1e3 * time, "/ floor": time / seconds[FLOOR]})
