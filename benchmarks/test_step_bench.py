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

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from step_contenders import DEVICE, MODEL, Contender

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
def test_with_old_log_probs(benchmark, record):
    """Rollouts used twice (``num_iterations=2``): old log-probs, and two optimizer steps."""
    both = {name: Contender(name, True, num_iterations=2) for name in ("trl", "ours")}
    for contender in both.values():
        contender.dead_share = 0.5
    both["ours"].step()  # warm-up
    seconds: dict[str, list[float]] = {name: [] for name in both}

    def take_turns() -> None:
        for name, contender in both.items():
            seconds[name].append(contender.step())

    benchmark.pedantic(take_turns, rounds=1)
    ratio = statistics.median(t / o for t, o in zip(seconds["trl"], seconds["ours"], strict=True))
    record("step", f"{MODEL} lora dead groups 0.50, old log-probs and two steps", {"TRL / ours": ratio})


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_peak_memory(benchmark, record, kind):
    """In fresh processes: beyond the model, in it gradients and AdamW's state, which an earlier step has made."""

    def peaks() -> dict[str, list[int]]:
        script = str(Path(__file__).with_name("step_contenders.py"))
        # what is freed goes back at once: resident memory is memory in use
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144"}
        found = {}
        # TRL runs every sequence, whatever the share: it is measured once
        for name, shares in (("trl", SHARES[:1]), ("ours", SHARES)):
            command = [sys.executable, script, name, str(int(KINDS[kind])), "0", *map(str, shares)]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            found[name] = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("peak ")]
        return found

    found = benchmark.pedantic(peaks, rounds=1)
    benchmark.extra_info.update(found)
    for share, ours in zip(SHARES, found["ours"], strict=True):
        record(
            "step",
            f"{MODEL} {kind:4s} dead groups {share:4.2f}, peak memory",
            {"TRL MiB": found["trl"][0] / 2**20, "ours MiB": ours / 2**20},
        )


@pytest.mark.full
def test_where_the_time_goes(benchmark, record, pair):
    """Seconds of each stage of one of our steps with half of the groups dead, in percent of the step."""
    from trl_ext.head import forward
    from trl_ext.plan.micro_batches import MicroBatches

    kind, both = pair
    trainer = both["ours"].trainer
    both["ours"].dead_share = 0.5
    spent: dict[str, float] = {}

    def timed(owner, name: str, stage: str):
        function = getattr(owner, name)

        def call(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[stage] = spent.get(stage, 0.0) + time.perf_counter() - start

        setattr(owner, name, call)
        return lambda: setattr(owner, name, function)

    undo = [
        timed(trainer, "_generate_and_score_completions", "rollouts, rewards, advantages"),
        timed(MicroBatches, "_plan", "planning"),
        timed(trainer, "_compute_loss", "forward"),
        timed(forward, "linear_grpo_loss", "head"),
        timed(trainer.accelerator, "backward", "backbone backward"),
        timed(trainer, "_clip_grad_norm", "clipping"),
        timed(torch.optim.AdamW, "step", "optimizer"),
    ]
    whole = benchmark.pedantic(both["ours"].step, rounds=1)
    for one in undo:
        one()
    spent["backbone forward"] = spent.pop("forward") - spent["head"]
    spent["head, its loss and gradients"] = spent.pop("head")
    spent["rest"] = whole - sum(spent.values())
    shares = {f"{stage} %": 100 * seconds / whole for stage, seconds in spent.items()}
    record("step", f"{MODEL} {kind:4s} dead groups 0.50, where the time goes", shares)
