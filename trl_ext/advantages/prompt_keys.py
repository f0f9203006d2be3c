"""What tells a prompt from others, and what a reader sees of it."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterable, Mapping
from typing import Any

import torch

NO_TASK = -1  # in place of a task's key


def prompt_key(prompt: Any) -> int:
    """63 bits of a hash of the prompt: the same whenever it comes back, in every process; pictures by their pixels."""
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, default=_fingerprint)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def _fingerprint(value: Any) -> str:
    """Of what JSON has no word for: its content, not the object's address; what can't be pickled, by its repr."""
    if isinstance(value, torch.Tensor):  # pickled it has an address in it
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
    """What the user said: the last message of a conversation, its pictures as [image]."""
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
    """63 bits of a hash of a task's name, the same in every process."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1


def prompt_tasks(rows: Iterable[Mapping[str, Any]]) -> dict[int, str]:
    """By key, what a dataset's column ``task`` says of these prompts; none without one."""
    return {
        prompt_key(row["prompt"]): str(row["task"]) for row in rows if row.get("task") is not None and "prompt" in row
    }


def prompt_texts(logged: Iterable[Any], keys_B: Any) -> dict[int, str]:
    """Texts by key, of the prompts that were logged last, one for each of ``keys_B``."""
    keys = keys_B.tolist()
    latest = list(logged)[-len(keys) :]
    return {key: prompt_text(prompt) for key, prompt in zip(keys, latest, strict=False)}
