"""Several training runs one after the other in the same processes, for test_engines.py.

By ``accelerate launch --config_file examples/accelerate/ENGINE.yaml tests/engine_worker.py CASES.json``: what each run
is, ``two_process_worker.py`` says.
"""

import gc
import json
import os
import sys
import traceback
from pathlib import Path

import torch
import two_process_worker


def main(cases: str) -> None:
    torch.set_num_threads(1)
    trainer = None
    for spec in json.loads(Path(cases).read_text()):
        trainer = None  # DeepSpeed's engine goes before the next comes
        gc.collect()
        try:
            trainer = two_process_worker.train(spec)
        except Exception:  # on every process, or the launcher ends all; the test finds no result and shows this
            traceback.print_exc()
            print(f"FAILED {spec['name']}", file=sys.stderr, flush=True)
            os._exit(1)
    if trainer is not None:
        trainer.end()


if __name__ == "__main__":
    main(sys.argv[1])
