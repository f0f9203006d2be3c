"""Finds the model that ``--model_name_or_path`` names: a hub id, a folder, or one that is made here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .command_line import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILT_IN = "small"
MADE_HERE = (BUILT_IN, "smollm2")


def known_models() -> str:
    """What ``--model_name_or_path`` may be, with the folders of the current folder that hold a model."""
    here = sorted({str(path.parent) for depth in ("*", "*/*") for path in Path().glob(f"{depth}/config.json")})
    folders = f"folders with a model ({', '.join(here[:5])})" if here else "a folder with a model (none lies here)"
    return f"there are {', '.join(MADE_HERE)}, {folders}, and the hub's, such as Qwen/Qwen2.5-0.5B-Instruct"


def check_model(name: str) -> None:
    """Raises ``ValueError`` for a local folder that holds no model, or a name the hub can't have or hardly has."""
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"--model_name_or_path {name}: the folder holds no config.json")
    hint = did_you_mean(name, MADE_HERE, closeness=0.8)  # small-model may be somebody's on the hub
    if not folder.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1 or hint):
        raise ValueError(f"--model_name_or_path {name}: no such folder{hint or ';'} {known_models()}")


def find_model(name: str, seed: int, levels: tuple[int, ...], mixture: bool) -> str:
    """Returns the folder or hub id of a model. ``small`` and ``smollm2`` are made, or found in the cache.

    Args:
        name: hub id, folder, ``small`` or ``smollm2``.
        seed, levels: of the built-in policy of arithmetic.
        mixture: the built-in policy is the mixture's, not arithmetic's.
    """
    if name not in MADE_HERE:
        return name
    from accelerate import PartialState

    from trl_ext.tasks.small_policy import small_policy

    from .mixed_policy import mixed_policy
    from .smollm2 import smollm2

    with PartialState().local_main_process_first():
        if name == "smollm2":
            return str(smollm2())
        return str(mixed_policy(seed) if mixture else small_policy(seed, levels))


def load_tokenizer(path: str, name: str, revision: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Raises ``ValueError`` where neither a folder nor the hub has a model of this name."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            path, padding_side="left", revision=revision, trust_remote_code=trust_remote_code
        )
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--model_name_or_path {name}: {known_models()}. The hub's answer: {reason}") from None
