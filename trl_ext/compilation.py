"""Reads how a run wants its decoder layers compiled: by transformers' options, ours, or accelerate's variables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from accelerate.utils import DynamoBackend, TorchDynamoPlugin

from .options import read_options


@dataclass(frozen=True)
class Compilation:
    """How decoder layers are compiled: arguments of ``torch.compile``, by transformers' ``torch_compile_*`` options."""

    backend: str
    mode: str | None

    def arguments(self) -> dict[str, Any]:
        """Returns the arguments of ``torch.compile``."""
        return {"backend": self.backend, "mode": self.mode}


def read_compilation(args: Any) -> Compilation | None:
    """Reads how the decoder layers are to be compiled; None: not at all.

    ``torch_compile`` and ``compile_layers`` want it, and so does ``accelerate launch --dynamo_backend``, by variables.
    """
    launched = TorchDynamoPlugin()
    by_variables = launched.backend != DynamoBackend.NO
    if not (getattr(args, "torch_compile", False) or read_options(args).compile_layers or by_variables):
        return None
    backend = launched.backend.value.lower() if by_variables else "inductor"
    mode = launched.mode if by_variables and launched.mode != "default" else None
    return Compilation(args.torch_compile_backend or backend, args.torch_compile_mode or mode)


def why_compiled(args: Any) -> str | None:
    """Returns why layers are compiled though no option says so; None: an option does, or they aren't."""
    if args.torch_compile or read_options(args).compile_layers or read_compilation(args) is None:
        return None
    return "ACCELERATE_DYNAMO_BACKEND is set, by accelerate launch or by an earlier torch_compile=True in this process"
