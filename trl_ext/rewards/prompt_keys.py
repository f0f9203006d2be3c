"""What tells a prompt from others, and what a reader sees of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any


def prompt_key(prompt: Any) -> int:
    """63 bits of a hash of the prompt: the same whenever it comes back, in every process."""
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def prompt_text(prompt: Any) -> str:
    """What the user said: the last message of a conversation."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def prompt_texts(logged: Iterable[Any], keys_B: Any) -> dict[int, str]:
    """Texts by key, of the prompts that were logged last, one for each of ``keys_B``."""
    keys = keys_B.tolist()
    latest = list(logged)[-len(keys) :]
    return {key: prompt_text(prompt) for key, prompt in zip(keys, latest, strict=False)}
