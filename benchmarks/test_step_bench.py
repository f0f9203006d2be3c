"""The whole optimizer step, from old log-probs to the optimizer: TRL's GRPOTrainer against ours, on the same rollouts.

Counted: SmolLM2-135M (on a GPU 1.5B), LoRA and full, stored answers of uneven lengths to a few prompts in 4
micro-batches (``step_contenders.py`` says how many, and in which precision); reward, forward, backward, clipping,
AdamW; generation costs nothing. The shares of dead groups are 0, 1/4, 1/2 and 3/4. The trainers take turns; what is
printed is the median of the ratios of neighbours.

With prompts of 100 and of 400 tokens and 8 answers to each, ours also runs with every sequence in a row of its own
("before"): what a prompt that runs once saves.

Predicted: TRL / ours is about TRL's positions over those that ours runs, 1 / (1 - ``compute/flops_saved_frac``).

Floor: the matrix products of the tokens that have a gradient alone, each prompt once.

Without ``--full``: LoRA, with none and half of the groups dead.
"""

import statistics

import pytest
from step_contenders import DEVICE, MODEL, Contender, peaks_of

SHARES = (0.0, 0.25, 0.5, 0.75)
SHORT = (0.0, 0.5)  # without --full
ROUNDS = 5 if DEVICE == "cuda" else 2
TOLERANCE = 2e-2 if DEVICE == "cuda" else 1e-4  # bf16 there
CASES = [(kind, tokens) for tokens in (0, 100, 400) for kind in ("full", "lora")]  # 0: short prompts of uneven lengths
LONGER = [pytest.param(case, marks=pytest.mark.full) for case in CASES if case != ("lora", 0)]


def names_of(tokens: int) -> tuple[str, ...]:
    return ("trl", "before", "ours") if tokens else ("trl", "ours")


def title(kind: str, tokens: int, share: float) -> str:
    prompts = f"prompts of {tokens}, " if tokens else ""
    return f"{MODEL} {kind:4s} {prompts}dead groups {share:4.2f}"


@pytest.fixture(scope="module", params=[("lora", 0), *LONGER], ids=str)
def contenders(request):
    kind, tokens = request.param
    found = {name: Contender(name, kind == "lora", tokens) for name in names_of(tokens)}
    for contender in found.values():  # warm-up
        contender.dead_share = 0.75
        contender.step()
    return kind, tokens, found


@pytest.mark.parametrize(
    "share", [share if share in SHORT else pytest.param(share, marks=pytest.mark.full) for share in SHARES]
)
def test_optimizer_step(benchmark, record, contenders, share):
    kind, tokens, found = contenders
    # TRL runs every sequence at any share of dead groups: one measurement is enough
    runs = {name: one for name, one in found.items() if name != "trl" or not (share and tokens) or DEVICE == "cuda"}
    seconds = {name: [] for name in (*runs, "floor")}
    for contender in runs.values():
        contender.dead_share = share

    def take_turns() -> None:
        for _ in range(ROUNDS):
            for name, contender in runs.items():
                seconds[name].append(contender.step())
            seconds["floor"].append(found["ours"].floor_seconds())

    def ratio(name: str, to: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[name], seconds[to], strict=True))

    benchmark.pedantic(take_turns, rounds=1)
    for contender in runs.values():
        assert found["ours"].gradient_norm == pytest.approx(contender.gradient_norm, rel=TOLERANCE)
    benchmark.extra_info.update({name: statistics.median(times) for name, times in seconds.items()})
    values = {
        "TRL / ours": ratio("trl", "ours") if "trl" in runs else None,
        "predicted": 1 / (1 - found["ours"].logged("compute/flops_saved_frac")),
        "before / ours": ratio("before", "ours") if tokens else None,
        "ours / floor": ratio("ours", "floor"),
    }
    record("step", title(kind, tokens, share), values)


@pytest.mark.full
def test_old_log_probs_and_shuffled_steps(benchmark, record):
    """Rollouts used twice: old log-probs alone. And an optimizer step of each micro-batch (4 to a generation), whose
    sequences TRL draws from all groups: fewer share a prompt."""
    shuffled = {"gradient_accumulation_steps": 1, "steps_per_generation": 4}
    twice = {name: Contender(name, True, 100, num_iterations=2) for name in ("before", "ours")}
    apart = {name: Contender(name, True, 100, **shuffled) for name in ("before", "ours")}
    scored, stepped = ({name: [] for name in twice} for _ in range(2))

    def take_turns() -> None:
        for contender in (*twice.values(), *apart.values()):  # warm-up
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
        record("step", f"{MODEL} lora prompts of 100, {what}", {"before / ours": ratio})


@pytest.mark.full
@pytest.mark.parametrize(("kind", "tokens"), CASES)
def test_peak_memory(benchmark, record, kind, tokens):
    """In fresh processes: beyond the model, in it gradients and AdamW's state, which an earlier step has made."""

    def peaks() -> dict[str, list[int]]:
        # TRL runs every sequence, whatever the share: it is measured once
        return {
            name: peaks_of(name, kind == "lora", tokens, SHARES[:1] if name == "trl" else SHARES)
            for name in names_of(tokens)
        }

    found = benchmark.pedantic(peaks, rounds=1)
    benchmark.extra_info.update(found)
    for i, share in enumerate(SHARES):
        megabytes = {f"{name} MiB": found[name][0 if name == "trl" else i] / 2**20 for name in found}
        record("step", f"{title(kind, tokens, share)}, peak memory", megabytes)
