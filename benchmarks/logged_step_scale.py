"""What the processes of a run move, hold and compute for one logged step: counted, timed, and computed for many.

``python benchmarks/logged_step_scale.py`` prints the table of ``docs/engines.md``: what each of 8, 64 and 1024
processes would send for a step of 512 prompts x 16 answers, from the exchanges that one of them makes. Nothing of that
table is measured but the exchanges' sizes. ``test_scaling_bench.py`` runs 1, 2 and 4 real ones.

Shapes: R processes, P prompts, G answers, B sequences of one process, k the sketch's width, H hidden.
"""

import os
import statistics
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from grpo_kernels.interference.inner_products import MatrixProducts, squared_norms
from grpo_kernels.interference.metrics import interference_metrics
from grpo_kernels.interference.sketch_error import predicted_rmse
from grpo_kernels.interference.step_gradients import StepGradients
from trl_ext.advantages.normalizer import UsedNormalization
from trl_ext.recorder import measure
from trl_ext.recorder.collectives import Collectives
from trl_ext.recorder.sequence_table import SequenceTable
from trl_ext.recorder.task_interference import Tasks
from trl_ext.recorder.what_if import WhatIfLog

G, K, H = 16, 64, 4096


class Sent:
    """Bytes that a process sends in each exchange, by the usual algorithms: a ring for sums and gathers."""

    def __init__(self, processes: int) -> None:
        self.processes, self.calls, self.bytes = processes, 0, 0.0

    def _add(self, size: float) -> None:
        self.calls += 1
        self.bytes += size * (self.processes - 1)

    def all_reduce(self, values) -> None:
        self._add(2 * values.nbytes / self.processes)

    def all_gather_into_tensor(self, gathered, values) -> None:
        self._add(values.nbytes)

    def all_to_all_single(self, arrived, sent) -> None:
        self._add(sent.nbytes / self.processes)


EXCHANGES = ("all_reduce", "all_gather_into_tensor", "all_to_all_single")


@contextmanager
def counted(processes: int, alone: int = 0):
    """Every exchange within is counted, and done; or with ``alone``, this process's sequences, stood in for: the others
    have what this one has, of other prompts."""
    sent, real = Sent(processes), {name: getattr(dist, name) for name in EXCHANGES}

    def stand_in(name):
        def exchange(*tensors):
            getattr(sent, name)(*tensors)
            if not alone:
                real[name](*tensors)
            elif name == "all_to_all_single":
                tensors[0].copy_(tensors[1])
            elif name == "all_gather_into_tensor":
                gathered, values = tensors
                parts = gathered.view(processes, *values.shape)
                parts[:] = values
                if values.dtype == torch.int64:  # their prompts are others
                    ids = parts[:, :, 0] if values.ndim == 2 else parts
                    ids[:] = (torch.arange(processes)[:, None] * alone + torch.arange(ids.shape[1])) // G
                    if values.ndim == 1:  # a row a prompt
                        ids[:] = torch.arange(processes)[:, None] * alone // G + torch.arange(ids.shape[1])

        return exchange

    for name in EXCHANGES:
        setattr(dist, name, stand_in(name))
    try:
        yield sent
    finally:
        for name, function in real.items():
            setattr(dist, name, function)


class Process:
    """One of ``processes``, with what it recorded of its share of ``prompts``: whole groups, or a part of one."""

    def __init__(self, rank: int, processes: int, prompts: int) -> None:
        self.rank, self.processes, self.prompts = rank, processes, prompts
        accelerator = SimpleNamespace(num_processes=processes, process_index=rank, device=torch.device("cpu"))
        self.collectives = Collectives(accelerator)
        options = SimpleNamespace(interference_parts=False, what_if=None, normalization_kwargs=None)
        self.run = SimpleNamespace(
            options=options,
            num_generations=G,
            prompts_per_generation=prompts,
            aggregation="sum_then_normalize",
            log_once=lambda *said: None,
        )
        self.n = prompts * G // processes
        generator = torch.Generator().manual_seed(rank)
        sequence_B = rank * self.n + torch.arange(self.n)
        prompt_B, position_B = sequence_B // G, sequence_B % G
        rewards_PG = (torch.rand(prompts, G, generator=torch.Generator().manual_seed(1)) < 0.5).float()
        rewards_BG = rewards_PG[prompt_B]
        reward_B = rewards_BG.gather(1, position_B[:, None])[:, 0]
        advantage_B = (reward_B - rewards_BG.mean(1)) / (rewards_BG.std(1) + 1e-4)
        self.sketch = torch.randn(self.n, 2, K * K // 2, generator=generator) * advantage_B[:, None, None]
        self.features_BH = torch.randn(self.n, H, generator=generator)
        self.table = SequenceTable(
            prompt_id=prompt_B,
            prompt_key=prompt_B,
            position=position_B,
            length=position_B,
            advantage=advantage_B,
            made_at=advantage_B,
            weight=torch.ones(self.n),
            group_rewards=rewards_BG,
            function_rewards=reward_B[:, None],
            square=squared_norms(self.sketch.flatten(1)),
            coefficient=-advantage_B / processes,
        )

    def ours(self) -> dict[str, float]:
        totals_PH = torch.zeros(self.prompts, H + 1)
        totals_PH.index_add_(0, self.table.prompt_id, torch.nn.functional.pad(self.features_BH, (0, 1), value=1.0))
        recorded = measure.RecordedStep(self.sketch, {"model": slice(0, K * K // 2)}, self.table, totals_PH)
        what = WhatIfLog(self.run, lambda: UsedNormalization("std", G, [1.0]), self.collectives.attempt)
        found = self.collectives.attempt(
            lambda: measure.measure(recorded, self.collectives, self.run, G, what.observe, tasks={})
        )
        return found.metrics

    def peer(self) -> dict[str, float]:
        """Every process gathers every sketch and makes the whole matrix, as it was before."""
        sketch = self.collectives.gather(self.sketch)
        table = self.table.unpack(self.collectives.gather(self.table.pack()))
        features_BH = self.collectives.gather(self.features_BH)
        flat = sketch.flatten(1).double()
        gram_BB = flat @ flat.T
        step = StepGradients(gram_BB, table.prompt_id, table.reward, table.coefficient, G)
        features_PH = features_BH.new_zeros(self.prompts, H).index_add_(0, table.prompt_id, features_BH) / G
        error = predicted_rmse(sketch, table.prompt_id)
        features_PP = features_PH.double() @ features_PH.double().T
        metrics = interference_metrics(step, sketch_rmse=error, features_PP=features_PP)
        what = WhatIfLog(self.run, lambda: UsedNormalization("std", G, [1.0]), lambda work: work())
        none = Tasks.named([""] * self.prompts)
        return metrics | what.observe(MatrixProducts(gram_BB), table, none)

    def floor(self) -> None:
        """What it recorded, once to where it is needed: sketches as columns, features summed by prompt."""
        self.collectives.columns(self.sketch.flatten(1))
        self.collectives.sum(self.features_BH.new_zeros(self.prompts, H))


def peak_of(work) -> float:
    """MB by which the process grew at its peak while this ran, as the kernel counts."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    work()
    return (_status("VmHWM") - before) / 1e6


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def work(rank: int, processes: int, prompts: int, rounds: int, folder: str) -> None:
    """What one real process does: contenders in turns, all processes at the same time."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    if processes > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=Path(folder, "port").read_text())
        dist.init_process_group("gloo", rank=rank, world_size=processes)
    process = Process(rank, processes, prompts)
    contenders = {"ours": process.ours, "peer": process.peer, "floor": process.floor}
    found: dict[str, dict] = {}
    for name, contender in contenders.items():
        with counted(processes) as sent:
            peak = peak_of(contender)
        found[name] = {"MB sent": sent.bytes / 1e6, "calls": sent.calls, "MB held": peak, "seconds": []}
    for _ in range(rounds):
        for name, contender in contenders.items():
            process.collectives.agree()
            begun = time.perf_counter()
            contender()
            found[name]["seconds"].append(time.perf_counter() - begun)
    ours, theirs = process.ours(), process.peer()
    found["apart"] = max(abs(ours[key] - theirs[key]) / (1e-3 + abs(theirs[key])) for key in theirs)
    for name in contenders:
        found[name]["seconds"] = statistics.median(found[name]["seconds"])
    if rank == 0:
        torch.save(found, Path(folder, "found.pt"))
    if processes > 1:
        dist.barrier()
        dist.destroy_process_group()


def computed(processes: int, prompts: int = 512) -> dict[str, Sent]:
    """What each of so many would send, by the exchanges of the first."""
    process = Process(0, processes, prompts)
    found = {}
    for name in ("ours", "floor"):
        with counted(processes, alone=process.n) as sent:
            getattr(process, name)()
        found[name] = sent
    sent = found["peer"] = Sent(processes)
    for values in (process.sketch, process.table.pack(), process.features_BH):
        sent.all_gather_into_tensor(None, values)
    return found


def main() -> None:
    print(f"Computed from counted exchanges, not measured: 512 prompts x {G} answers, k = {K}, H = {H}\n")
    print("| processes | ours, MB | exchanges | before, MB | exchanges | moving it once, MB |")
    print("|---:|---:|---:|---:|---:|---:|")
    for processes in (8, 64, 1024):
        found = computed(processes)
        ours, peer, floor = found["ours"], found["peer"], found["floor"]
        print(
            f"| {processes} | {ours.bytes / 1e6:.0f} | {ours.calls} | {peer.bytes / 1e6:.0f} | {peer.calls} | "
            f"{floor.bytes / 1e6:.0f} |"
        )


if __name__ == "__main__":
    sys.exit(main())
