"""Lines of other libraries at a start that read like a failure and that nobody can act on: dropped, by their text."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable

# logger -> beginning of its line
LINES = {
    # an optional faster kernel on CPUs with AVX512-BF16; without it 4-bit layers work as they do elsewhere
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
}

# of names that TRL sets or reads itself, whatever a user does
RENAMED = r"`(is_)?gradient_checkpointing` is deprecated"


def _without(beginning: str) -> Callable[[logging.LogRecord], bool]:
    return lambda record: not str(record.msg).startswith(beginning)


def drop_lines_nobody_can_act_on() -> None:
    """Filters these lines and no others: every other message of the same loggers stays."""
    for name, beginning in LINES.items():
        logging.getLogger(name).addFilter(_without(beginning))
    warnings.filterwarnings("ignore", message=RENAMED, category=FutureWarning, module="transformers")
