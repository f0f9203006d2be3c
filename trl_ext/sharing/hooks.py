"""Answers to one prompt in one row, the prompt once and no padding (``packed_rows.py``), exactly.

Every layer but attention sees packed tokens only. Attention is made in two parts (``shared_attention.py``): a
prompt attends to itself; an answer to its prompt's keys and values and to its own. Positions are those of the
sequence, an answer's from the end of its prompt on, and so are a sliding window's. The gradient flows back into the
prompt once, summed over its answers, as the sum over B rows gives it.

transformers calls attention by the name in the model's configuration. Where a layer is called with a ``PackedRows``,
also when a checkpointed one is computed again, the name is ours for as long as that call takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import AttentionInterface

from .attention import attention
from .packed_rows import KEYWORD

NAME = "curvature_grpo_shared_prompts"
ATTRIBUTE = "_attn_implementation"  # of a configuration

AttentionInterface.register(NAME, attention)


class _Sharing:
    """The hooks of a backbone's modules. A class of the module, so that a model that is copied or saved while training
    can be; and another trainer's hooks on the same modules change nothing, whichever are called first."""

    def __init__(self) -> None:
        self._before: list[str | None] = []  # what a call found, None where it found ours

    def enter(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get(KEYWORD) is None:
            return
        found = module.config._attn_implementation
        self._before.append(None if found == NAME else found)
        module.config._attn_implementation = NAME

    def leave(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if kwargs.get(KEYWORD) is None:
            return
        before = self._before.pop()
        if before is not None:
            module.config._attn_implementation = before


def let_share(backbone: Any) -> Callable[[], None]:
    """Until the returned function is called, the backbone may be called with ``PackedRows.inputs``; other calls are as
    they were."""
    configured = [module for module in backbone.modules() if hasattr(getattr(module, "config", None), ATTRIBUTE)]
    sharing, handles = _Sharing(), []
    for module in configured:  # attention among them; checkpointing calls a layer's forward without the layer's hooks
        handles.append(module.register_forward_pre_hook(sharing.enter, with_kwargs=True))
        handles.append(module.register_forward_hook(sharing.leave, with_kwargs=True, always_call=True))

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo


class SharedPrompts:
    """Whether the rows of a call are to be packed, where TRL's own lines make the call."""

    def __init__(self) -> None:
        self.width: int | None = None

    @contextmanager
    def given(self, width: int | None) -> Iterator[None]:
        """Within, rows have this many prompt columns and are packed; None: not."""
        before, self.width = self.width, width
        try:
            yield
        finally:
            self.width = before
