"""Checks that a checkpoint is complete: no file is missing, and each one opens.

Reads headers and tables of contents, not tensors: a checkpoint of gigabytes takes milliseconds.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME

TORCH_FILES = (".pt", ".pth", ".bin")
WEIGHTS = ("*.safetensors", "*model*.bin", "pytorch_model_fsdp*", "global_step*")
OPTIMIZERS = ("optimizer*", "global_step*")
OUR_STATE = "CurvatureGRPOTrainer"  # among the states of callbacks


def what_is_broken(checkpoint: Path) -> str | None:
    """The first thing that is wrong with a checkpoint, naming the file; None if it is complete."""
    # the trainer's state is written last: where it is missing, the run was killed while it saved
    if not (checkpoint / TRAINER_STATE_NAME).is_file():
        return f"{TRAINER_STATE_NAME} is missing"
    if (name := _missing_random_states(checkpoint)) is not None:
        return f"{name} is missing"
    for file in sorted(checkpoint.rglob("*")):
        if file.is_file() and (reason := _cannot_open(file)) is not None:
            return f"{file.relative_to(checkpoint)} {reason}"
    if not _has_any(checkpoint, WEIGHTS):
        return "the weights are missing"
    if (checkpoint / "scheduler.pt").is_file() and not _has_any(checkpoint, OPTIMIZERS):
        return "the optimizer's state is missing"
    return None


def _has_any(checkpoint: Path, patterns: tuple[str, ...]) -> bool:
    return any(any(checkpoint.glob(pattern)) for pattern in patterns)


def _missing_random_states(checkpoint: Path) -> str | None:
    """The first file that is missing. Each process saves its own, and the one that writes the trainer's state doesn't
    wait for the others."""
    if not (checkpoint / "scheduler.pt").is_file():
        return None  # save_only_model: weights alone
    try:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        processes = state["stateful_callbacks"][OUR_STATE]["processes"]
    except (OSError, ValueError, LookupError, TypeError):
        return None  # TRL's trainer's or an earlier version's; or one that can't be read, which ``_cannot_open`` finds
    names = [f"rng_state_{rank}.pth" for rank in range(processes)] if processes > 1 else ["rng_state.pth"]
    return next((name for name in names if not (checkpoint / name).is_file()), None)


def _cannot_open(file: Path) -> str | None:
    try:
        if file.suffix == ".json":
            content = json.loads(file.read_text(encoding="utf-8"))
            if file.name.endswith(".index.json"):
                absent = {name for name in content["weight_map"].values() if not (file.parent / name).is_file()}
                return f"names {min(absent)}, which is missing" if absent else None
        elif file.suffix == ".safetensors":
            with safe_open(file, "pt"):
                pass
        elif file.suffix in TORCH_FILES:
            return _torch_file(file)
        elif file.suffix == ".distcp" and not (file.parent / ".metadata").is_file():
            return "has no .metadata beside it"  # written last
        elif file.name == "latest" and not (file.parent / file.read_text().strip()).is_dir():
            return "names a folder that is missing"  # DeepSpeed's
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        return f"can't be read: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return None


def _torch_file(file: Path) -> str | None:
    """A zip archive, whose table of contents is at its end; torch's older format has none to look at."""
    with open(file, "rb") as opened:
        start = opened.read(2)
    if not start:
        return "is empty"
    if start == b"PK" and not zipfile.is_zipfile(file):
        return "ends too early"
    return None
