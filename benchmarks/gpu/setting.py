"""How ``make gpu`` measures: the device, and the sizes; tiny ones try all of it where there is no GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Setting:
    """Attributes:
    memory_gib: what all contenders of a whole step may use, the model included; a GPU's rest is occupied.
    """

    tiny: bool
    memory_gib: float

    @property
    def device(self) -> str:
        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    @property
    def dtype_name(self) -> str:
        return "bf16" if self.dtype == torch.bfloat16 else "fp32"

    @property
    def rounds(self) -> int:
        return 2 if self.tiny else 9
