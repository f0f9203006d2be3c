"""Compiles every kernel for GPUs that aren't here, and reads what the machine code says of its speed.

    python benchmarks/compile_ahead.py [--targets sm_90 gfx942] [--quick] [--json FILE]

A kernel is compiled as its launcher would have it compiled: the launcher runs, on small CPU tensors, up to the launch,
whose arguments, and the fields of those that are tuples, the JIT then specialises (what is None or 1 becomes a
constant, what divides by 16 is known to).

Columns of the table: registers of a thread; bytes of local memory (AMD: registers) that spill; bytes of shared memory;
then, on NVIDIA, of each loop over the vocabulary its global loads and stores, as count x bits, and its instructions per
element.
The last is counted, not measured: all instructions between a loop's label and its backward branch, over the elements
that a thread treats in one round, BLOCK_V / threads. ``_normalize_kernel`` has no loop; its row shows the whole kernel.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from grpo_kernels.head.rows import triton_rows
from grpo_kernels.head.rows.plain import RowStatistics, Transform
from grpo_kernels.head.token_losses import GroupRewards, TokenInputs, TokenLoss
from grpo_kernels.normalize import triton_groups
from grpo_kernels.normalize.methods import METHODS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_103": GPUTarget("cuda", 103, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
VOCABULARIES = (49152, 151936, 50257)  # SmolLM2, Qwen2.5, and GPT-2's, which divides by nothing
ROWS = 16
# (tile, gradient): float32 training, half training on a GPU (the gradient lies in the tile's bytes), a half tile
DTYPES = ((torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16))


@dataclass(frozen=True)
class Case:
    """A kernel at one signature. ``padded``: the tile's rows begin at multiples of 16, as ``HeadProducts`` has them."""

    variant: str
    n_vocabulary: int = 0  # 0: a kernel that has none
    tile: torch.dtype = torch.float32
    gradient: torch.dtype = torch.float32
    padded: bool = True


@dataclass
class Loop:
    """Global accesses of a loop, {bits: count}, its barriers, and its instructions."""

    loads: dict[int, int]
    stores: dict[int, int]
    barriers: int
    instructions: int
    per_element: float | None


@dataclass
class Report:
    target: str
    variant: str
    dtypes: str
    n_vocabulary: int
    registers: int
    spills: int
    shared: int
    loops: list[Loop]

    @property
    def narrowest(self) -> int:
        """Bits of the narrowest global access of the loops."""
        return min(bits for loop in self.loops for bits in (*loop.loads, *loop.stores))


def _grpo(
    case: Case, tile_CV: torch.Tensor, *, rewards: bool = False, full: bool = False, gradient: bool = True, **loss: Any
) -> None:
    zeros_C, zeros, (transform, bias) = torch.zeros(ROWS), torch.zeros(ROWS, dtype=torch.long), _head(case, full)
    group_rewards = GroupRewards(torch.zeros(ROWS, 8), zeros, "std", 1e-4, 1.0)
    signal = (None, group_rewards) if rewards else (zeros_C, None)
    tokens = TokenInputs(zeros, zeros, zeros_C, *signal, *[zeros_C if full else None] * 3)
    options = {"options": TokenLoss(**loss), "entropy_grad": 0.1 if full else 0.0, "gradient": gradient}
    triton_rows.grpo_rows_(tile_CV, zeros, tokens, transform, bias=bias, dtype=case.gradient, **options)


def _softmax(case: Case, tile_CV: torch.Tensor, *, full: bool = False) -> None:
    transform, bias = _head(case, full)
    triton_rows.softmax_rows_(tile_CV, torch.zeros(ROWS, dtype=torch.long), transform, bias=bias, entropy=full)


def _gradient(case: Case, tile_CV: torch.Tensor, *, full: bool = False) -> None:
    zeros_C, targets, (transform, bias) = torch.zeros(ROWS), torch.zeros(ROWS, dtype=torch.long), _head(case, full)
    entropy_C = zeros_C if full else None
    statistics = RowStatistics(zeros_C, zeros_C, zeros_C, entropy_C)
    arguments = (tile_CV, targets, statistics, transform, zeros_C, entropy_C)
    triton_rows.logit_gradient_(*arguments, bias=bias, dtype=case.gradient)


def _head(case: Case, full: bool) -> tuple[Transform, torch.Tensor | None]:
    """Returns what a head may do besides its product: nothing, or everything."""
    if not full:
        return Transform(), None
    return Transform(temperature=0.7, softcap=30.0), torch.zeros(case.n_vocabulary, dtype=case.gradient)


def _normalize(method: str) -> None:
    chosen, numbers = METHODS[method], torch.zeros(ROWS, 1)
    centre, scale = (numbers if name == "given" else None for name in (chosen.centre, chosen.scale))
    lengths = torch.zeros(ROWS, 8) if chosen.centre == "lengths" else None
    triton_groups.normalize_groups(torch.zeros(ROWS, 8), chosen, 1e-4, 1.0, centre, scale, lengths)


# name: (kernel, its launch on a tile)
VARIANTS: dict[str, tuple[str, Callable[[Case, torch.Tensor], None]]] = {
    "grpo": ("_grpo_rows_kernel", _grpo),
    "grpo, all options": ("_grpo_rows_kernel", partial(_grpo, full=True, delta=2.0, beta=0.04)),
    "grpo, rewards": ("_grpo_rows_kernel", partial(_grpo, rewards=True)),
    "grpo, cispo": ("_grpo_rows_kernel", partial(_grpo, surrogate="cispo", epsilon_high=2.0)),
    "grpo, sapo": ("_grpo_rows_kernel", partial(_grpo, surrogate="sapo")),
    "grpo, no gradient": ("_grpo_rows_kernel", partial(_grpo, gradient=False)),
    "softmax": ("_softmax_rows_kernel", _softmax),
    "softmax, all options": ("_softmax_rows_kernel", partial(_softmax, full=True)),
    "gradient": ("_logit_gradient_kernel", _gradient),
    "gradient, all options": ("_logit_gradient_kernel", partial(_gradient, full=True)),
}
QUICK = ("grpo", "grpo, all options")


class _Launch:
    """Takes the place of a kernel in its launcher: keeps the launch's arguments, and launches nothing."""

    positional: tuple[Any, ...]
    named: Mapping[str, Any]

    def __getitem__(self, grid: tuple[int, ...]) -> _Launch:
        return self

    def __call__(self, *positional: Any, **named: Any) -> None:
        self.positional, self.named = positional, named


def _launch(case: Case, target: GPUTarget) -> tuple[JITFunction, _Launch]:
    """Returns the kernel of a case, and the arguments that its launcher gives it on such a GPU."""
    module: ModuleType = triton_rows
    if case.variant in VARIANTS:
        name, call = VARIANTS[case.variant]
        width = -(-case.n_vocabulary // 16) * 16 if case.padded else case.n_vocabulary
        tile_CV = torch.empty((ROWS, width), dtype=case.tile)[:, : case.n_vocabulary]
        launcher: Callable[[], None] = partial(call, case, tile_CV)
    else:
        module, name = triton_groups, "_normalize_kernel"
        launcher = partial(_normalize, case.variant.removeprefix("normalize, "))
    kernel = getattr(module, name)
    if not isinstance(kernel, JITFunction):
        raise ValueError("TRITON_INTERPRET=1 runs kernels in Python and compiles none: set TRITON_INTERPRET=0")
    num_warps = triton_rows.THREADS // target.warp_size
    with patch.object(triton_rows, "NUM_WARPS", num_warps), patch.object(module, name, _Launch()) as launch:
        launcher()
    return kernel, launch


def _compile(case: Case, target: GPUTarget) -> tuple[Any, int | None]:
    """Compiles by the JIT's own steps, as on a GPU of that kind. Returns the compiled kernel and BLOCK_V."""
    kernel, launch = _launch(case, target)
    return compile_launch(kernel, launch.positional, launch.named, target), launch.named.get("BLOCK_V")


def compile_launch(
    kernel: JITFunction, positional: tuple[Any, ...], named: Mapping[str, Any], target: GPUTarget
) -> Any:
    """Compiles a kernel for these arguments of a launch, by the JIT's own steps."""
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*positional, **named)
    options, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, options)
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options.__dict__)


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """Returns resource usage and SASS, by the cuobjdump that Triton carries."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        usage, sass = (
            subprocess.run([tool, flag, str(path)], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    return usage, sass


# an instruction as (its place, its name, the place that a branch goes to)
Instruction = tuple[int, str, int | None]


def _sass_instructions(sass: str) -> list[Instruction]:
    found = []
    for address, name, operands in re.findall(r"/\*([0-9a-f]{4,})\*/ +(?:@!?U?P\w+ +)?([A-Z][\w.]*)([^;]*);", sass):
        goal = re.search(r"0x([0-9a-f]+)\s*$", operands) if name.startswith("BRA") else None
        if name != "NOP":
            found.append((int(address, 16), name, int(goal[1], 16) if goal else None))
    return found


def _access(name: str) -> tuple[str, int] | None:
    """("load" or "store", bits) of an instruction that accesses global memory."""
    if match := re.match(r"(LDG|STG|LDGSTS)\.(.*)", name + "."):
        parts = match[2].split(".")
        widths = [int(part) for part in parts if part in ("64", "128", "256")]
        narrow = [int(part[1:]) for part in parts if part in ("U8", "S8", "U16", "S16")]
        return "store" if match[1] == "STG" else "load", (widths + narrow or [32])[0]
    return None


def _loops(instructions: list[Instruction], elements: int | None) -> list[Loop]:
    """Finds the loops that access global memory, by backward branches. A kernel without any counts as one loop."""
    ranges: list[tuple[int, int]] = []
    for first, last in sorted((goal, place) for place, _, goal in instructions if goal is not None and goal < place):
        if ranges and first <= ranges[-1][1]:
            first, last = ranges[-1][0], max(last, ranges.pop()[1])
        ranges.append((first, last))
    if elements is None:
        ranges = [(instructions[0][0], instructions[-1][0])]
    loops = []
    for first, last in ranges:
        names = [name for place, name, _ in instructions if first <= place <= last]
        accesses = Counter(access for name in names if (access := _access(name)))
        if accesses:
            loads, stores = (
                {bits: count for (kind, bits), count in sorted(accesses.items()) if kind == wanted}
                for wanted in ("load", "store")
            )
            barriers = sum(name.startswith("BAR") for name in names)
            loops.append(Loop(loads, stores, barriers, len(names), len(names) / elements if elements else None))
    return loops


def resources(compiled: Any, target: GPUTarget) -> tuple[int, int, str]:
    """Returns registers, spills, and the machine code (NVIDIA's; else empty)."""
    if target.backend == "cuda":
        usage, sass = _disassemble(compiled.asm["cubin"])
        numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        return numbers["REG"], numbers["STACK"] + numbers["LOCAL"], sass
    numbers = {name: int(n) for name, n in re.findall(r"\.(\w+_count): +(\d+)", compiled.asm["amdgcn"])}
    return numbers["vgpr_count"], numbers["vgpr_spill_count"] + numbers["sgpr_spill_count"], ""


def report(case: Case, target_name: str) -> Report:
    """Compiles one kernel for one target; nothing is run, and no GPU is needed."""
    target = TARGETS[target_name]
    compiled, block = _compile(case, target)
    threads = compiled.metadata.num_warps * target.warp_size
    elements = None if block is None else block // threads
    registers, spills, sass = resources(compiled, target)
    loops = _loops(_sass_instructions(sass), elements) if sass else []
    dtypes = " -> ".join(str(dtype).removeprefix("torch.") for dtype in (case.tile, case.gradient))
    shared = compiled.metadata.shared
    return Report(target_name, case.variant, dtypes, case.n_vocabulary, registers, spills, shared, loops)


def cases(quick: bool = False) -> list[Case]:
    """Every variant at every vocabulary and pair of dtypes; ``quick``: two variants of the fused kernel."""
    head = [
        Case(variant, n_vocabulary, tile, gradient)
        for variant in (QUICK if quick else VARIANTS)
        for tile, gradient in DTYPES
        for n_vocabulary in VOCABULARIES
    ]
    # methods that differ in what they are given run the same kernel: one of each
    distinct = {(method.centre, method.scale): name for name, method in reversed(METHODS.items())}
    return head if quick else head + [Case(f"normalize, {name}") for name in reversed(distinct.values())]


def _widths(accesses: dict[int, int]) -> str:
    return " ".join(f"{count}x{bits}" for bits, count in accesses.items()) or "-"


HEADER = (
    f"{'target':7} {'kernel':22} {'tile -> gradient':21} {'V':>6} {'regs':>4} {'spill':>5} {'shared':>6}"
    "  of each loop: loads / stores (count x bits), barriers, instructions per element"
)


def line(row: Report) -> str:
    """A line of the table."""
    loops = "; ".join(
        f"{_widths(loop.loads)} / {_widths(loop.stores)}, {loop.barriers}, "
        + (f"{loop.per_element:.1f}" if loop.per_element is not None else f"({loop.instructions} in all)")
        for loop in row.loops
    )
    return (
        f"{row.target:7} {row.variant:22} {row.dtypes:21} {row.n_vocabulary or '-':>6} {row.registers:>4} "
        f"{row.spills:>5} {row.shared:>6}  {loops}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="TARGET")
    parser.add_argument("--quick", action="store_true", help="two variants of the fused kernel only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    arguments = parser.parse_args()
    print(HEADER)
    rows = []
    for target in arguments.targets:
        for case in cases(arguments.quick):
            try:
                rows.append(report(case, target))
            except ValueError as error:
                raise SystemExit(str(error)) from None
            print(line(rows[-1]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
