"""What ``processes.py`` forks from: imports, and nothing that starts a thread or depends on the test."""

import gc

import bitsandbytes  # noqa: F401
import peft  # noqa: F401
import torch
import trl.trainer.grpo_trainer  # noqa: F401

import trl_ext.console
import trl_ext.trainer  # noqa: F401

torch.set_num_threads(1)

# as in conftest.py: accelerate collects garbage in each train
gc.collect()
gc.freeze()
