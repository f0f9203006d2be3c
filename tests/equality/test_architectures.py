"""Models that aren't ours: the gradient of our trainer is stock TRL's on tiny models of every architecture."""

import re

import pytest
from adapters import KINDS, NOT_HERE
from architecture_sweep import PAGE, STEPS, examine, lora, no_adapter, train
from architectures import NAMES, build
from harness import PINNED
from peft import PeftType

from trl_ext import CurvatureGRPOTrainer

# a rotation, learned positions, states, experts with their auxiliary loss, a softcap, a norm after the rotation,
# attention that TRL's head doesn't know, and a hybrid
SHORT = ("cohere2", "falcon", "gemma2", "gpt2", "hunyuan_v1_dense", "mamba", "olmoe", "zamba2")
SHORT_KINDS = (
    "DoRA",
    "IA3",
    "LoRA and a saved head",
    "LoRA on embeddings",
    "LoHa",
    "VeRA",
    "p-tuning",
    "prefix tuning",
    "prompt tuning",
)


@pytest.mark.parametrize("adapter", [no_adapter, lora], ids=["full", "LoRA"])
@pytest.mark.parametrize(
    "name", [name if name in SHORT else pytest.param(name, marks=pytest.mark.nightly) for name in NAMES]
)
def test_the_gradient_is_trls(name, adapter):
    row = examine(name, adapter)
    assert row.verdict in verdicts()[name][adapter is lora], row
    assert not row.wrong and not abs(row.check - 1) > 1e-3, row


@pytest.mark.parametrize(
    "kind", [kind if kind in SHORT_KINDS else pytest.param(kind, marks=pytest.mark.nightly) for kind in KINDS]
)
def test_the_gradient_with_an_adapter_is_trls(kind):
    row = examine("llama", KINDS[kind])
    assert row.verdict in verdicts()[kind][0], row
    assert not row.wrong and not abs(row.check - 1) > 1e-3, row


def verdicts():
    """The page's tables: {architecture: (full, LoRA)} and {adapter: (gradient, ...)}."""
    rows = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    return {cells[0].removeprefix("| "): (cells[1], cells[2]) for cells in rows}


@pytest.mark.skipif(not PINNED, reason="the page is of the versions in constraints.txt")
def test_the_page_has_every_architecture_and_nothing_wrong():
    table = verdicts()
    del table["architecture"], table["adapter"]
    assert set(table) == {*NAMES, *KINDS} and len(NAMES) >= 40
    assert {kind().peft_type.value for kind in KINDS.values()} | set(NOT_HERE) == {kind.value for kind in PeftType}
    for name, cells in table.items():
        for cell in cells[: 1 if name in KINDS else 2]:
            assert re.match(r"right \d|neither trains it \(|trains; TRL doesn't \(", cell), (name, cell)


@pytest.mark.parametrize(
    ("name", "own"), [("mixtral", {"router_jitter_noise": 0.1}), ("falcon", {}), ("gemma3n_text", {})]
)
def test_logging_interference_ends_no_run(name, own):
    """They change a layer's output in place; with noise on the router's input."""
    run = train(CurvatureGRPOTrainer, build(name, **own), None, interference_every=1)
    assert len(run.steps) == STEPS
    assert len(run.checks) >= STEPS - 1
    assert run.checks == pytest.approx([1.0] * len(run.checks), abs=0.2)
