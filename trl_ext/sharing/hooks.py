"""Adds hooks to a backbone so that it can run packed rows, with each prompt once and no padding (``packed_rows.py``).

The result is exact. Only attention (``attention.py``) treats packed rows differently: a prompt attends to itself, and
an answer to the keys of its prompt and to its own. Positions, and a sliding window's distances, are those within the
sequence: an answer's positions continue those of its prompt. A prompt's gradient is the sum over its answers, as with
one row per sequence.

transformers looks attention up by the name in the model's configuration. During each call of a layer with a
``PackedRows``, also when gradient checkpointing recomputes it, the hooks set that name to our attention's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import AttentionInterface

from .attention import attention
from .packed_rows import KEYWORD

NAME = "curvature_grpo_shared_prompts"
ATTRIBUTE = "_attn_implementation"  # attribute of a configuration: the name of the attention function

AttentionInterface.register(NAME, attention)


class _Sharing:
    """The hooks of a backbone's modules.

    They are methods of a class, not closures, so that a model with hooks can be copied and pickled. Hooks of another
    trainer on the same modules do no harm, in any order.
    """

    def __init__(self) -> None:
        self._before: list[str | None] = []  # by nested call: the name to restore, None if it was ours already

    def enter(self, module: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Sets the name of our attention before a call with packed rows."""
        if kwargs.get(KEYWORD) is None:
            return
        found = module.config._attn_implementation
        self._before.append(None if found == NAME else found)
        module.config._attn_implementation = NAME

    def leave(self, module: Any, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        """Restores the name after the call."""
        if kwargs.get(KEYWORD) is None:
            return
        before = self._before.pop()
        if before is not None:
            module.config._attn_implementation = before


def add_sharing_hooks(backbone: Any) -> Callable[[], None]:
    """Adds the hooks, so that the backbone accepts ``PackedRows.inputs``. Returns a function that removes them.

    Other calls of the backbone don't change.
    """
    configured = [module for module in backbone.modules() if hasattr(getattr(module, "config", None), ATTRIBUTE)]
    sharing, handles = _Sharing(), []
    # attention modules need hooks of their own: gradient checkpointing recomputes a layer without the layer's hooks
    for module in configured:
        handles.append(module.register_forward_pre_hook(sharing.enter, with_kwargs=True))
        handles.append(module.register_forward_hook(sharing.leave, with_kwargs=True, always_call=True))

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo
