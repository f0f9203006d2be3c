"""Makes keys (hashes) of prompts and tasks, and the text of a prompt that logs and reports show."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterable, Mapping
from typing import Any

import torch

NO_TASK = -1  # the task key of a prompt without a task


def prompt_key(prompt: Any) -> int:
    """Returns a 63-bit hash of the prompt, the same in every batch and on every rank; images are hashed by pixels."""
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, default=_fingerprint)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def _fingerprint(value: Any) -> str:
    """Returns a hash of the content of an object that JSON can't represent; of its repr if it can't be pickled."""
    if isinstance(value, torch.Tensor):  # its pickle contains a memory address
        content = repr(value.tolist()).encode()
    elif hasattr(value, "tobytes"):
        content = value.tobytes()
    else:
        try:
            content = pickle.dumps(value)
        except (pickle.PicklingError, TypeError, AttributeError):  # a function, an open file
            content = repr(value).encode()
    details = (getattr(value, name, "") for name in ("mode", "size", "shape", "dtype"))
    about = [type(value).__name__, *(str(detail) for detail in details if not callable(detail))]
    return " ".join([*about, hashlib.blake2b(content, digest_size=8).hexdigest()])


def prompt_text(prompt: Any) -> str:
    """Returns the text of a prompt: of a conversation the last message, with [image] in place of images."""
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list) or not prompt:
        return ""
    content = prompt[-1].get("content") if isinstance(prompt[-1], dict) else prompt[-1]
    if not isinstance(content, list):
        return "" if content is None else str(content)
    parts = [part if isinstance(part, dict) else {"text": part} for part in content]
    return " ".join(str(part["text"]) if "text" in part else f"[{part.get('type', '?')}]" for part in parts)


def task_key(name: str) -> int:
    """Returns a 63-bit hash of a task's name, the same on every rank."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1


def prompt_tasks(rows: Iterable[Mapping[str, Any]]) -> dict[int, str]:
    """Returns the task names of these rows (their column ``task``) by prompt key."""
    return {
        prompt_key(row["prompt"]): str(row["task"]) for row in rows if row.get("task") is not None and "prompt" in row
    }


def prompt_texts(logged: Iterable[Any], keys_B: Any) -> dict[int, str]:
    """Returns the texts of the last ``len(keys_B)`` logged prompts, by key."""
    keys = keys_B.tolist()
    latest = list(logged)[-len(keys) :]
    return {key: prompt_text(prompt) for key, prompt in zip(keys, latest, strict=False)}
