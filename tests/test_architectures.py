"""Models that aren't ours: the gradient of our trainer is stock TRL's on tiny models of every architecture."""

import re

import pytest
from architecture_sweep import PAGE, examine
from architectures import NAMES

# a rotation, learned positions, states, experts with their auxiliary loss, a softcap, a norm after the rotation,
# attention that TRL's head doesn't know, and a hybrid
SHORT = ("cohere2", "falcon", "gemma2", "gpt2", "hunyuan_v1_dense", "mamba", "olmoe", "zamba2")


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize(
    "name", [name if name in SHORT else pytest.param(name, marks=pytest.mark.nightly) for name in NAMES]
)
def test_the_gradient_is_trls(name, lora):
    row = examine(name, lora)
    assert row.verdict in verdicts()[name][lora], row


def verdicts():
    """The page's table: {architecture: (full, LoRA)}."""
    rows = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")][1:]
    return {cells[0].removeprefix("| "): (cells[1], cells[2]) for cells in rows}


def test_the_page_has_every_architecture_and_nothing_wrong():
    table = verdicts()
    assert sorted(table) == NAMES and len(NAMES) >= 40
    for name, cells in table.items():
        for cell in cells:
            assert re.match(r"right \d|neither trains it \(|trains; TRL doesn't \(", cell), (name, cell)
