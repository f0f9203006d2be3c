"""Logs that other libraries wrote: TensorBoard, Weights & Biases, trackio, JSONL of verl and prime-rl, JSON, CSV.

A reader turns a file into rows (``rows.Log``); ``names`` maps their metrics to ours; ``read_file`` makes of both what
TRL's own log would be. Formats are told apart by a file's content, not by its name.
"""

from .logs import ForeignLog, find_logs, read_file

__all__ = ["ForeignLog", "find_logs", "read_file"]
