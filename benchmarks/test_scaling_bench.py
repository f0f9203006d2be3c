"""A logged step of 128 prompts x 16 answers on 1, 2 and 4 real processes: bytes sent, memory held, seconds.

Peer: every process gathers every sketch and makes the whole matrix of inner products, as it was. Floor: what was
recorded, moved once to where it is needed."""

import socket
from pathlib import Path

import logged_step_scale
import pytest
import torch
import torch.multiprocessing

PROMPTS, ROUNDS = 128, 3


@pytest.mark.full
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_a_logged_step(processes, benchmark, record, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        Path(tmp_path, "port").write_text(str(free.getsockname()[1]))

    def run() -> None:
        arguments = (processes, PROMPTS, ROUNDS, str(tmp_path))
        torch.multiprocessing.start_processes(logged_step_scale.work, arguments, nprocs=processes, start_method="spawn")

    benchmark.pedantic(run, rounds=1)
    found = torch.load(tmp_path / "found.pt")
    assert found["apart"] < 1e-3  # the same figures
    ours, peer, floor = (found[name] for name in ("ours", "peer", "floor"))
    benchmark.extra_info.update(found)
    moved = processes > 1
    record(
        "scaling",
        f"a logged step, {PROMPTS} x {logged_step_scale.G} sequences, k = 64, {processes} processes",
        {
            "before / ours": peer["seconds"] / ours["seconds"],
            "ours / floor": ours["seconds"] / floor["seconds"] if processes > 1 else None,
            "bytes before / ours": peer["MB sent"] / ours["MB sent"] if moved else None,
            "bytes ours / floor": ours["MB sent"] / floor["MB sent"] if moved else None,
            "MB held": ours["MB held"],
            "MB held before": peer["MB held"],
            "ms": 1e3 * ours["seconds"],
        },
    )
