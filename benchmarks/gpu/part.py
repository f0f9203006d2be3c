"""Runs one part in this process: ``python -m gpu.part NAME FILE KEY MINUTES MEMORY [--tiny]``.

With ``facts`` for NAME it prints, as JSON, the device and the versions that the measurements depend on.
"""

from __future__ import annotations

import argparse
import json
import platform
import site
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .record import PartFile, Record, read, reason

PACKAGES = ("torch", "triton", "trl", "transformers", "peft", "accelerate")
PEERS = ("liger-kernel", "quack-kernels", "cut-cross-entropy", "nvidia-cutlass-dsl")


@dataclass(frozen=True)
class Part:
    """``after``: the part whose file it reads. Modules are imported in the part's own process alone."""

    name: str
    module: str
    function: str
    arguments: tuple[Any, ...] = ()
    after: str = ""

    def call(self, record: Record, setting: Any) -> None:
        function: Callable[..., None] = getattr(import_module(f".{self.module}", __package__), self.function)
        if self.after:
            function = partial(function, chosen=read(record.file.path.with_name(f"{self.after}.json")))
        function(record, setting, *self.arguments)


def step_parts(model: str, lora: bool) -> list[Part]:
    name = f"{model}_{'lora' if lora else 'full'}"
    choose = Part(f"choose_{name}", "steps", "choose", (model, lora))
    return [choose, Part(f"step_{name}", "steps", "measure", (model, lora), after=choose.name)]


def head_part(name: str, shape: str, tokens: int) -> Part:
    return Part(f"head_{name}", "heads", "measure", (shape, tokens))


PARTS = {
    part.name: part
    for part in (
        head_part("7244", "8B", 8192),  # the shape of TRL's issue
        Part("tests", "gpu_tests", "measure"),
        *step_parts("1.5B", True),
        Part("launches_1.5B_lora", "counts", "measure", ("1.5B", True)),
        head_part("0.5B", "Qwen2.5", 4096),
        head_part("1.5B", "Qwen2.5-1.5B", 4096),
        head_part("SmolLM2", "SmolLM2", 2048),
        *step_parts("1.5B", False),
        *step_parts("0.5B", True),
        *step_parts("0.5B", False),
        Part("kernels", "kernels", "measure"),
    )
}


def add_wheels(folder: Path) -> None:
    """Puts the folder before what is installed, its ``.pth`` files included."""
    if folder.is_dir():
        before = list(sys.path)
        site.addsitedir(str(folder))
        sys.path[:] = [path for path in sys.path if path not in before] + before


def facts() -> dict[str, str | int]:
    """Raises ``ImportError`` where the interpreter lacks what every part needs."""
    import torch
    import trl  # noqa: F401

    there: dict[str, str | int] = {"python": platform.python_version()}
    for name in (*PACKAGES, *PEERS):
        try:
            there[name] = version(name)
        except PackageNotFoundError:
            there[name] = "not there"
    there["torch"] = torch.__version__  # with its build
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return {**there, "device": properties.name, "MiB": properties.total_memory // 2**20}
    return {**there, "device": f"CPU, {platform.machine()}"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=["facts", *PARTS])
    parser.add_argument("--file", type=Path)
    parser.add_argument("--key", default="")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--memory", type=float, default=40.0)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--peers", type=Path)
    return parser.parse_args()


def main() -> None:
    chosen = arguments()
    if chosen.peers:
        add_wheels(chosen.peers)
    if chosen.name == "facts":
        print(json.dumps(facts()))
        return
    from .setting import Setting

    file = PartFile.load(chosen.file, chosen.name, chosen.key)
    file.state, file.error, record = "running", "", Record(file, chosen.minutes)
    try:
        PARTS[chosen.name].call(record, Setting(chosen.tiny, chosen.memory))
        file.state = "done"
    except Exception as error:
        traceback.print_exc()
        file.state, file.error = "failed", reason(error)
    file.running = None
    record.save()


if __name__ == "__main__":
    main()
