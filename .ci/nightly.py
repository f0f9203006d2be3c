"""The long tests, part by part: ``python .ci/nightly.py [PART ...]``, a part being a test file's name.

A part that has passed on the files as they are now is skipped, so that a run that was stopped can be repeated.
"""

import hashlib
import subprocess
import sys
import time
from glob import glob
from pathlib import Path

DONE = Path(".nightly")  # a file for each part that passed: of which state of the repository


def output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def state() -> str:
    """Of every tracked file, as it lies there."""
    files = output("git", "rev-parse", "HEAD^{tree}") + output("git", "diff", "HEAD")
    return hashlib.sha256(files.encode()).hexdigest()


def parts() -> list[str]:
    marked = output("git", "grep", "-lE", r"mark\.nightly", "--", "tests/*/test_*.py", "examples/*/test_*.py")
    return sorted(Path(name).stem for name in marked.split())


def main(wanted: list[str]) -> None:
    if unknown := set(wanted) - set(parts()):
        sys.exit(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(parts())}")
    DONE.mkdir(exist_ok=True)
    now, failed = state(), []
    for part in wanted or parts():
        stamp = DONE / part
        if stamp.is_file() and stamp.read_text() == now:
            print(f"{part}: passed before on these files", flush=True)
            continue
        start = time.monotonic()
        command = [sys.executable, "-m", "pytest", "-q", "-m", "nightly", *glob(f"*/*/{part}.py")]
        code = subprocess.run(command).returncode
        print(f"{part}: {'passed' if code == 0 else 'FAILED'} in {time.monotonic() - start:.0f} s", flush=True)
        stamp.write_text(now) if code == 0 else failed.append(part)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main(sys.argv[1:])
