"""The whole optimizer step, from old log-probs to the optimizer: TRL's GRPOTrainer against ours, on the same rollouts.

Counted: SmolLM2-135M (on a GPU 1.5B), LoRA and full, stored answers of uneven lengths to a few prompts in 4
micro-batches (``step_contenders.py`` says how many, and in which precision); reward, forward, backward, clipping,
AdamW; generation costs nothing. The shares of dead groups are 0, 1/4, 1/2 and 3/4. The trainers take turns; what is
printed is the median of the ratios of neighbours.

Predicted at share d: the backbone runs (1 - d) of the sequences, each prompt once, no padding; the head (1 - d) of the
completions, at 6 (frozen 4) products in place of 8 (6). So ours / TRL's is about the share of positions that run, 1 -
``compute/flops_saved_frac`` of the log.

Floor: the matrix products of these tokens alone.

Without ``--full``: LoRA, with none and half of the groups dead.
"""

import statistics

import pytest
from step_contenders import DEVICE, MODEL, Contender, peaks_of

SHARES = (0.0, 0.25, 0.5, 0.75)
SHORT = (0.0, 0.5)  # without --full
ROUNDS = 5 if DEVICE == "cuda" else 2
TOLERANCE = 2e-2 if DEVICE == "cuda" else 1e-4  # bf16 there
KINDS = {"full": False, "lora": True}


@pytest.fixture(scope="module", params=[pytest.param("full", marks=pytest.mark.full), "lora"])
def pair(request):
    lora = KINDS[request.param]
    both = {name: Contender(name, lora) for name in ("trl", "ours")}
    for contender in both.values():  # warm-up
        contender.dead_share = 0.75
        contender.step()
    return request.param, both


@pytest.mark.parametrize(
    "share", [share if share in SHORT else pytest.param(share, marks=pytest.mark.full) for share in SHARES]
)
def test_optimizer_step(benchmark, record, pair, share):
    kind, both = pair
    seconds = {name: [] for name in (*both, "floor")}
    for contender in both.values():
        contender.dead_share = share

    def take_turns() -> None:
        for _ in range(ROUNDS):
            for name, contender in both.items():
                seconds[name].append(contender.step())
            seconds["floor"].append(both["ours"].floor_seconds())

    benchmark.pedantic(take_turns, rounds=1)
    assert both["ours"].gradient_norm == pytest.approx(both["trl"].gradient_norm, rel=TOLERANCE)
    ratio = statistics.median(t / o for t, o in zip(seconds["trl"], seconds["ours"], strict=True))
    to_floor = statistics.median(o / f for o, f in zip(seconds["ours"], seconds["floor"], strict=True))
    saved = both["ours"].logged("compute/flops_saved_frac")
    benchmark.extra_info.update({name: statistics.median(times) for name, times in seconds.items()})
    record(
        "step",
        f"{MODEL} {kind:4s} dead groups {share:4.2f}",
        {"TRL / ours": ratio, "predicted, backbone alone": 1 / (1 - saved), "ours / floor": to_floor},
    )


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_peak_memory(benchmark, record, kind):
    """In fresh processes: beyond the model, in it gradients and AdamW's state, which an earlier step has made."""

    def peaks() -> dict[str, list[int]]:
        # TRL runs every sequence, whatever the share: it is measured once
        return {
            name: peaks_of(name, KINDS[kind], 0, shares) for name, shares in (("trl", SHARES[:1]), ("ours", SHARES))
        }

    found = benchmark.pedantic(peaks, rounds=1)
    benchmark.extra_info.update(found)
    for share, ours in zip(SHARES, found["ours"], strict=True):
        record(
            "step",
            f"{MODEL} {kind:4s} dead groups {share:4.2f}, peak memory",
            {"TRL MiB": found["trl"][0] / 2**20, "ours MiB": ours / 2**20},
        )
