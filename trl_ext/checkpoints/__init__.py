"""Checkpoints: the newest complete one is found and resumed, and a run that stops leaves one."""

from .callbacks import StopWithCheckpoint
from .find import check_output_dir, find_checkpoint
from .save import CheckpointError

__all__ = ["CheckpointError", "StopWithCheckpoint", "check_output_dir", "find_checkpoint"]
