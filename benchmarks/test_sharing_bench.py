"""The whole optimizer step with each prompt once: TRL's GRPOTrainer, ours with rows of their own ("before"), and ours.

Counted: as in ``test_step_bench.py``, but 8 answers to a prompt, of a median of 115 tokens (107 on average in the draw
for a CPU), to prompts of 100 and of 400 tokens. The trainers take turns, TRL in the rounds without dead groups (it runs
every sequence, whatever their share).

Predicted: the floating-point operations of the backbone's and the head's matrix products and of attention, from the
lengths alone; nothing of what grows with neither.

Floor: the matrix products of the packed tokens alone.

All of it runs with ``--full`` alone: on a CPU a step of TRL's takes one to two minutes.
"""

import statistics

import pytest
import torch
from step_contenders import DEVICE, MODEL, PROMPTS, Contender, peaks_of

SHARES = (0.0, 0.25, 0.5, 0.75)
ROUNDS = 5 if DEVICE == "cuda" else 3
TOLERANCE = 2e-2 if DEVICE == "cuda" else 1e-4  # bf16 there
KINDS = {"full": False, "lora": True}
CASES = {f"{kind}-{tokens}": (kind, tokens) for kind in ("lora", "full") for tokens in (100, 400)}

pytestmark = pytest.mark.full


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def three(request):
    kind, tokens = request.param
    contenders = {name: Contender(name, KINDS[kind], tokens) for name in ("trl", "before", "ours")}
    for name, contender in contenders.items():  # warm-up; TRL would run everything
        contender.dead_share = 0.75
        if name != "trl" or DEVICE == "cuda":
            contender.step()
    return kind, tokens, contenders


def operations(contender: Contender, *, shared: bool) -> float:
    """Of a step, forward and backward."""
    first, generations = round(contender.dead_share * PROMPTS), contender.rollouts.generations
    prompts = list(map(len, contender.rollouts.prompts[first:]))
    answers = [list(map(len, contender.rollouts.completions[i * generations :][:generations])) for i in range(PROMPTS)]
    answers = answers[first:]
    live = sum(map(sum, answers))
    if shared:
        positions = live + sum(prompts)
        pairs = sum(p * p / 2 + sum(a * p + a * a / 2 for a in own) for p, own in zip(prompts, answers, strict=True))
    else:
        every = PROMPTS * generations * (max(prompts) + max(map(len, contender.rollouts.completions)))  # as TRL pads
        positions = every * (1 - contender.logged("compute/flops_saved_frac"))
        pairs = sum((p + a) ** 2 / 2 for p, own in zip(prompts, answers, strict=True) for a in own)
    model = contender.trainer.accelerator.unwrap_model(contender.trainer.model)
    of_head, of_backbone = 0.0, 0.0
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            passes = 3 if layer.weight.requires_grad else 2
            if layer.out_features == model.config.vocab_size:
                of_head += 2 * layer.weight.numel() * passes
            else:
                of_backbone += 2 * layer.weight.numel() * passes
    attention = 3.5 * 4 * model.config.hidden_size * model.config.num_hidden_layers  # 2 products forward, 5 backward
    return of_backbone * positions + of_head * live + attention * pairs


@pytest.mark.parametrize("share", SHARES)
def test_optimizer_step(benchmark, record, three, share):
    kind, tokens, contenders = three
    seconds = {name: [] for name in (*contenders, "floor")}
    for contender in contenders.values():
        contender.dead_share = share
    run = contenders if share == 0.0 else {name: contenders[name] for name in ("before", "ours")}

    def take_turns() -> None:
        for _ in range(ROUNDS if share == 0.0 or DEVICE == "cuda" else 1):
            for name, contender in run.items():
                seconds[name].append(contender.step())
            seconds["floor"].append(contenders["ours"].floor_seconds())

    benchmark.pedantic(take_turns, rounds=1)
    if share == 0.0:
        contenders["trl"].median = statistics.median(seconds["trl"])
        assert contenders["ours"].gradient_norm == pytest.approx(contenders["trl"].gradient_norm, rel=TOLERANCE)
    assert contenders["ours"].gradient_norm == pytest.approx(contenders["before"].gradient_norm, rel=TOLERANCE)

    def ratio(name: str, to: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[name], seconds[to], strict=True))

    predicted = operations(contenders["before"], shared=False) / operations(contenders["ours"], shared=True)
    benchmark.extra_info.update({name: times for name, times in seconds.items()})
    record(
        "sharing",
        f"{MODEL} {kind:4s} prompts of {tokens}, dead groups {share:4.2f}",
        {
            "TRL / ours": contenders["trl"].median / statistics.median(seconds["ours"]),
            "before / ours": ratio("before", "ours"),
            "predicted": predicted,
            "ours / floor": ratio("ours", "floor"),
        },
    )


@pytest.mark.parametrize("tokens", [100, 400])
def test_old_log_probs_and_shuffled_steps(benchmark, record, tokens):
    """Rollouts used twice: old log-probs alone. And an optimizer step of each micro-batch (4 to a generation), whose
    sequences TRL draws from all groups: fewer share a prompt."""
    twice = {name: Contender(name, True, tokens, num_iterations=2) for name in ("before", "ours")}
    apart = {
        name: Contender(name, True, tokens, gradient_accumulation_steps=1, steps_per_generation=4)
        for name in ("before", "ours")
    }
    scored: dict[str, list[float]] = {name: [] for name in twice}
    stepped: dict[str, list[float]] = {name: [] for name in twice}

    def take_turns() -> None:
        for contender in (*twice.values(), *apart.values()):
            contender.step()
        for _ in range(ROUNDS):
            for name, contender in twice.items():
                contender.step()
                scored[name].append(contender.logged("compute/seconds_log_probs"))
            for name, contender in apart.items():
                stepped[name].append(contender.step())

    benchmark.pedantic(take_turns, rounds=1)
    for what, seconds in (("old log-probs alone", scored), ("4 steps to a generation", stepped)):
        ratio = statistics.median(b / o for b, o in zip(seconds["before"], seconds["ours"], strict=True))
        record("sharing", f"{MODEL} lora prompts of {tokens}, {what}", {"before / ours": ratio})


@pytest.mark.parametrize("tokens", [100, 400])
@pytest.mark.parametrize("kind", KINDS)
def test_peak_memory(benchmark, record, kind, tokens):
    """In fresh processes: beyond the model, in it gradients and AdamW's state, which an earlier step has made."""
    shares = (0.0, 0.5)

    def peaks() -> dict[str, list[int]]:
        of_name = {"trl": shares[:1], "before": shares, "ours": shares}
        return {name: peaks_of(name, KINDS[kind], tokens, chosen) for name, chosen in of_name.items()}

    found = benchmark.pedantic(peaks, rounds=1)
    for share, before, ours in zip(shares, found["before"], found["ours"], strict=True):
        record(
            "sharing",
            f"{MODEL} {kind:4s} prompts of {tokens}, dead groups {share:4.2f}, peak memory",
            {"TRL MiB": found["trl"][0] / 2**20, "before MiB": before / 2**20, "ours MiB": ours / 2**20},
        )
