"""A run that survives: whole checkpoints found and resumed, saved or not at all, stopped with one."""

from .find import check_output_dir, find_checkpoint
from .saving import CheckpointError
from .stop import StopWithCheckpoint

__all__ = ["CheckpointError", "StopWithCheckpoint", "check_output_dir", "find_checkpoint"]
