"""Checks that a checkpoint is complete: no file is missing, and each one opens.

It reads headers and tables of contents, not tensors, so a checkpoint of gigabytes takes milliseconds.
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
OUR_STATE = "CurvatureGRPOTrainer"  # key in trainer_state.json's stateful_callbacks


def what_is_broken(checkpoint: Path) -> str | None:
    """Returns the first defect of a checkpoint, with the file's name; None if it is complete."""
    # the trainer's state is written last: if it is missing, the run was killed while saving
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
    """Returns the first missing file of random states; None if all exist.

    Each rank saves its own, and the rank that writes the trainer's state doesn't wait for the others.
    """
    if not (checkpoint / "scheduler.pt").is_file():
        return None  # save_only_model=True
    try:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        processes = state["stateful_callbacks"][OUR_STATE]["processes"]
    except (OSError, ValueError, LookupError, TypeError):
        return None  # saved by TRL's trainer or an earlier version, or unreadable, which _cannot_open reports
    names = [f"rng_state_{rank}.pth" for rank in range(processes)] if processes > 1 else ["rng_state.pth"]
    return next((name for name in names if not (checkpoint / name).is_file()), None)


def _cannot_open(file: Path) -> str | None:
    """Returns why a file can't be opened; None if it can."""
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
            return "has no .metadata in its folder"  # written last
        elif file.name == "latest" and not (file.parent / file.read_text().strip()).is_dir():
            return "names a folder that is missing"  # written by DeepSpeed
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        return f"can't be read: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return None


def _torch_file(file: Path) -> str | None:
    """Checks a torch file: a zip archive with its table of contents at the end; the older format has none."""
    with open(file, "rb") as stream:
        start = stream.read(2)
    if not start:
        return "is empty"
    if start == b"PK" and not zipfile.is_zipfile(file):
        return "ends too early"
    return None
