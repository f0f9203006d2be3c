"""Finds out which parts of this package work with the installed TRL.

With a version in ``TESTED_TRL`` they all do. With any other, ``probe_trl.py`` tries them against stock TRL in a process
of its own, so that nothing of the run changes (random generators, accelerate, trackers). The answer is kept on disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list

from ._version_check import TESTED_TRL
from .cache import cache_folder
from .options import CurvatureOptions

SECONDS = 300  # the longest that the probe may take; imports on a slow disk are most of it
# the variables by which a launcher tells a process its part of a run, and that would make the probe join the run
OF_THE_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")
PREFIXES = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "PARALLELISM_CONFIG_", "SLURM_", "PMI_", "OMPI_")

logger = get_logger(__name__)


# capability -> what the trainer does without it
CAPABILITIES = {
    "advantages": "the trainer does what TRL's does",
    "fuse": "TRL computes the loss (fused_loss=False), so every sequence runs",
    "regroup": "every sequence runs, in TRL's own micro-batches (skip_zero_advantage=False)",
    "share": "each answer runs with its own prompt (share_prompts=False)",
    "defer": "TRL computes old and reference log-probs before the rewards, of every sequence",
    "statistics": "some metrics of the loss aren't logged; with fused_loss=False TRL logs them",
    "interference": "no interference is logged (interference_every=0)",
}


@dataclass(frozen=True)
class Capabilities:
    """The parts of this package that work with the installed TRL.

    Attributes:
        off: for each capability that doesn't work, what the probe found. Empty: all work.
        other_metrics: names of metrics that this TRL doesn't log as this package does (``statistics``).
    """

    off: Mapping[str, str] = field(default_factory=dict)
    other_metrics: tuple[str, ...] = ()

    def has(self, name: str) -> bool:
        """Whether the capability ``name`` (of ``CAPABILITIES``) works."""
        return name not in self.off

    def allowed(self, options: CurvatureOptions) -> CurvatureOptions:
        """Returns the options, without those whose capability is off."""
        return replace(
            options,
            fused_loss=options.fused_loss and self.has("fuse"),
            skip_zero_advantage=options.skip_zero_advantage and self.has("regroup"),
            share_prompts=options.share_prompts and self.has("share"),
            interference_every=options.interference_every if self.has("interference") else 0,
        )

    def to_json(self) -> str:
        """Returns one line, which ``from_json`` reads."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(line: str) -> Capabilities:
        """Raises ``ValueError``, ``KeyError`` or ``TypeError`` for a line that isn't of ``to_json``."""
        stored = json.loads(line)
        return Capabilities(dict(stored["off"]), tuple(stored["other_metrics"]))


def nothing_works(why: str) -> Capabilities:
    """Returns the capabilities with everything off; only the first has the reason, so that it is logged once."""
    return Capabilities({"advantages": why, **dict.fromkeys(list(CAPABILITIES)[1:], "")})


_trials: list[Capabilities] = []  # what the probe tries now, the innermost last


@contextmanager
def tried(capabilities: Capabilities) -> Iterator[None]:
    """Makes trainers in this context use just these capabilities."""
    _trials.append(capabilities)
    try:
        yield
    finally:
        _trials.pop()


def capabilities() -> Capabilities:
    """Returns what works with the installed TRL. Every rank must call it when a trainer is built."""
    return _trials[-1] if _trials else _of_installed()


@cache
def _of_installed() -> Capabilities:
    """Rank 0 probes, if it must, and logs what is off."""
    installed = version("trl")
    if installed in TESTED_TRL:
        return Capabilities()
    state = PartialState()
    found = [kept_or_probed(installed) if state.is_main_process else None]
    if state.num_processes > 1:
        broadcast_object_list(found)
    answer = found[0]
    assert answer is not None
    off = [f"{CAPABILITIES[name]} ({name}: {why})" for name, why in answer.off.items() if why]
    if off:
        logger.warning(f"TRL {installed} differs from the versions that this package knows: {'; '.join(off)}.")
    else:
        logger.info(f"TRL {installed} isn't one of the versions that this package was tested with; its probe passed.")
    return answer


def kept_or_probed(installed: str) -> Capabilities:
    """Returns the answer that an earlier run has kept for exactly these sources and versions, or else probes."""
    path = cache_folder() / f"trl-{installed}-{fingerprint()}.json"
    try:
        return Capabilities.from_json(path.read_text())
    except (OSError, ValueError, TypeError, KeyError):
        pass
    logger.warning(f"TRL {installed} isn't one of the versions that this package was tested with. Trying it, once.")
    found = probe_in_a_process()
    if found.has("advantages"):  # a probe that failed may have failed for lack of memory or time
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}")
            part.write_text(found.to_json())
            part.replace(path)
        except OSError as error:
            logger.warning(f"The answer can't be kept for the next run: {error}")
    return found


def fingerprint() -> str:
    """Returns a hash of TRL's and our sources, and of the versions of what they stand on."""
    digest = hashlib.sha256(sys.version.encode())
    for package in ("trl", "trl_ext", "grpo_kernels"):
        spec = find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            for path in sorted(Path(folder).rglob("*.py")):
                digest.update(path.read_bytes())
    for package in ("torch", "transformers", "accelerate", "peft"):
        digest.update(f"{package}{version(package)}".encode())
    return digest.hexdigest()[:16]


def probe_in_a_process() -> Capabilities:
    """Runs ``python -m trl_ext.probe_trl`` on the CPU, outside the run's process group. Its failure turns all off."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in OF_THE_LAUNCHER and not name.startswith(PREFIXES)
    }
    environment |= {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, "-m", "trl_ext.probe_trl"]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        return nothing_works(f"the probe didn't end: {error}")
    try:
        return Capabilities.from_json(done.stdout.strip().splitlines()[-1])
    except (ValueError, TypeError, KeyError, IndexError):
        return nothing_works(f"the probe failed: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
