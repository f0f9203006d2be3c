"""A script with real FSDP2 on CPU processes: ``accelerate launch ... tests/fsdp2_on_cpu.py SCRIPT ARGUMENTS``.

accelerate turns FSDP on where it takes processes for GPUs', and on CPUs runs DDP. The one line below makes it do so.
"""

import runpy
import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import DistributedType

from trl_ext import CurvatureGRPOTrainer


def take_processes_for_gpus() -> None:
    """After the configuration is made, and before the trainer is."""
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


if __name__ == "__main__":
    init = CurvatureGRPOTrainer.__init__

    def init_on_fsdp2(self, *args, **kwargs):
        take_processes_for_gpus()
        init(self, *args, **kwargs)

    CurvatureGRPOTrainer.__init__ = init_on_fsdp2  # type: ignore[method-assign]
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
