"""Runs the parts one by one and writes ``report.md``: ``python -m gpu [PART ...]``, as ``make gpu`` does.

Each part runs in a process of its own, for at most ``--minutes``, and writes ``OUT/PART.json``. A part that is done
with the same code, versions and device is skipped; one that was stopped goes on with the case it was in. A process that
crashes is started again without the contender that it crashed in.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from packaging.tags import sys_tags
from packaging.utils import parse_wheel_filename

from . import page
from .part import PARTS
from .record import POISONED, PartFile, read

BENCHMARKS = Path(__file__).resolve().parents[1]
ROOT = BENCHMARKS.parent
CODE = ("grpo_kernels", "trl_ext", "benchmarks", "tests/unit/test_gpu.py")
RESTARTS = 20


@dataclass(frozen=True)
class Run:
    """What all parts have in common."""

    out: Path
    minutes: float
    memory: float
    tiny: bool
    device: str

    @property
    def peers(self) -> Path:
        """Where wheels are unpacked. QuACK takes code as installed by the folder's name alone."""
        return self.out / "peers" / "site-packages"

    @property
    def variables(self) -> dict[str, str]:
        on_gpu = self.device == "cuda"
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0") if on_gpu else ""
        paths = [str(ROOT), str(BENCHMARKS), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "CUDA_VISIBLE_DEVICES": visible,
            "TRITON_INTERPRET": "0" if on_gpu else "1",
            "HF_HUB_OFFLINE": "1",
            "TRL_EXPERIMENTAL_SILENCE": "1",
            "PYTHONWARNINGS": "ignore",
        }

    def command(self, name: str, *options: str) -> list[str]:
        tiny = ["--tiny"] if self.tiny else []
        return [sys.executable, "-m", "gpu.part", name, "--peers", str(self.peers), *tiny, *options]


def unpack(wheels: Path, into: Path) -> None:
    """Unpacks each wheel of this Python; several may have files in one package, which pip's --target doesn't allow."""
    supported = set(sys_tags())
    for wheel in sorted(wheels.glob("*.whl")):
        if not parse_wheel_filename(wheel.name)[3] & supported:
            print(f"{wheel.name}: not of this Python or machine", flush=True)
            continue
        done = into / f".{wheel.name}"
        if not done.exists():
            zipfile.ZipFile(wheel).extractall(into)
            done.touch()


def code_hash() -> str:
    found = hashlib.sha256()
    for place in CODE:
        path = ROOT / place
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            found.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    return found.hexdigest()


def facts_of(run: Run) -> dict[str, str | int]:
    done = subprocess.run(run.command("facts"), env=run.variables, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{sys.executable} can't run the benchmarks (PYTHON= names another):\n{done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_process(run: Run, name: str, key: str) -> int | None:
    """The part's exit code; None: its time was up."""
    path = run.out / f"{name}.json"
    numbers = ["--minutes", str(run.minutes), "--memory", str(run.memory)]
    command = run.command(name, "--file", str(path), "--key", key, *numbers)
    with (run.out / f"{name}.log").open("a") as log:
        process = subprocess.Popen(command, env=run.variables, stdout=log, stderr=log, start_new_session=True)
        try:
            return process.wait(60 * run.minutes)
        except subprocess.TimeoutExpired:
            return None
        finally:
            stop_group(process)


def stop_group(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and those that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def run_part(run: Run, name: str, key: str) -> str:
    """Runs the part until it is done, its time is up or it has crashed too often; returns its state."""
    path = run.out / f"{name}.json"
    for _ in range(RESTARTS):
        code = run_process(run, name, key)
        file = PartFile.load(path, name, key)
        if code == 0:
            return file.state
        if code is None:
            return time_is_up(file)
        known = len(file.crashed)
        if code != POISONED:
            file.mark_crashed(f"the process ended with {code}")
        if not file.crashed or (code != POISONED and len(file.crashed) == known):
            file.state, file.error = "failed", f"the process ended with {code}: {name}.log"
            file.save()
            return file.state
    return "failed"


def time_is_up(file: PartFile) -> str:
    """A peer that was running isn't tried again; ours goes on with the next run."""
    file.state = "time is up"
    if file.running is not None and not file.running[1].startswith(("ours", "unshared", "timing", "all", "floor")):
        file.mark_crashed("it was running when the part's time was up")
    file.save()
    return file.state


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"default: all of {', '.join(PARTS)}")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="folder of JSON files and report.md")
    parser.add_argument("--wheels", type=Path, help="folder of the peers' wheels")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try all of it")
    parser.add_argument("--minutes", type=float, default=8.0, help="of a part")
    parser.add_argument("--memory", type=float, default=40.0, metavar="GIB", help="limit of a whole step's contenders")
    chosen = parser.parse_args()
    if unknown := set(chosen.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    return chosen


def main() -> None:
    chosen = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that the part's process ends too
    run = Run(chosen.out.resolve(), chosen.minutes, chosen.memory, chosen.tiny, chosen.device)
    run.out.mkdir(parents=True, exist_ok=True)
    if chosen.wheels:
        unpack(chosen.wheels, run.peers)
    facts = facts_of(run)
    if run.device == "cuda" and "MiB" not in facts:
        sys.exit("torch finds no GPU; DEVICE=cpu TINY=1 tries all of it at tiny sizes")
    key = hashlib.sha256(f"{code_hash()} {sorted(facts.items())} {run.tiny} {run.memory}".encode()).hexdigest()[:16]
    for name in chosen.parts or PARTS:
        old, start = read(run.out / f"{name}.json"), time.monotonic()
        if old is not None and old.key == key and old.state == "done":
            print(f"{name}: done before", flush=True)
            continue
        print(f"{name}: ...", flush=True)
        state = run_part(run, name, key)
        print(f"{name}: {state} in {time.monotonic() - start:.0f} s", flush=True)
        page.write(run.out, facts, key)
    print(f"saved: {page.write(run.out, facts, key)}")


if __name__ == "__main__":
    main()
