"""Runs a user's script with options of its trainer set from outside: ``python -m trl_ext.ablate.run_script SPEC``.

``spec.json`` (``study.Spec``) says what to run. The script isn't changed:

* Options are set where a ``GRPOConfig`` is made, before its checks, whether it is made by a command line, a recipe or
  the script itself.
* ``trl.GRPOTrainer`` and ``trl.GRPOConfig`` are ours in this process, so a script for TRL can use every normalisation.
* At ``train()`` the trainer's options are compared with those that were set. A dry run stops there.

Under a launcher every process runs this, and the first one writes the result.
"""

from __future__ import annotations

import json
import math
import os
import runpy
import sys
import sysconfig
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import Any

from trl_ext.load_function import load_function

from .study import TOOL, Result, Spec, digest_of, write_whole

STARTED = time.monotonic()
MOST_TIMED = 16  # optimizer steps
MOST_ROWS = 2000  # of a dataset, evenly spaced, that its hash reads
# options whose values the tool reads
READ = (
    *("learning_rate", "max_steps", "optim", "beta", "num_iterations", "steps_per_generation", "eval_strategy"),
    *("eval_steps", "eval_on_start", "save_strategy", "save_steps", "save_total_limit", "per_device_train_batch_size"),
    "num_train_epochs",
    *("gradient_accumulation_steps", "num_generations", "max_grad_norm", "interference_every", "normalization"),
)


class StopDryRunError(BaseException):
    """Ends a dry run at ``train()``. Not an ``Exception``, so that no script handles it."""


class Session:
    """What this process learns of the script's trainer."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.result = Result("failed", f"{Path(spec.script).name} ended without calling train() of a GRPOTrainer")
        self.trainer: Any = None

    def begin(self, trainer: Any) -> None:
        """Called at ``train()``: compares options, and stops a dry run."""
        if self.trainer is not None:
            return
        from trl_ext import CurvatureGRPOTrainer

        self.trainer = trainer
        found = self.result
        found.error = "training didn't end"
        found.trainer = type(trainer).__name__
        found.has_curvature = isinstance(trainer, CurvatureGRPOTrainer)
        found.own_optimizer = trainer.optimizer is not None
        found.ignored = ignored_options(trainer.args, self.spec.options)
        found.config = {name: plain(getattr(trainer.args, name, None)) for name in READ}
        found.config["max_steps"] = steps_of(trainer)
        found.data = digest_of([data_digest(trainer.train_dataset), data_digest(trainer.eval_dataset)])
        found.code = code_digest(self.spec.script)
        found.start = time.monotonic() - STARTED
        trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        found.checkpoint_bytes = trainable * 12  # float32 weights and AdamW's two moments
        if self.spec.mode == "dry":
            raise StopDryRunError
        if self.spec.mode == "time":
            evaluates = trainer.eval_dataset is not None and str(plain(trainer.args.eval_strategy)) != "no"
            trainer.add_callback(timed_steps(found, evaluates, steps_to_time(trainer.args)))

    def write(self, error: str) -> None:
        """Writes the result on the first rank. ``error``: "" where the script ended by itself."""
        found = self.result
        if self.trainer is not None:
            found.logs = [entry for entry in self.trainer.state.log_history]
            stopped = self.spec.mode == "dry" and not error
            found.status, found.error = ("stopped" if stopped else "failed" if error else "finished"), error
        elif error:
            found.error = error
        found.seconds = time.monotonic() - STARTED
        if int(os.environ.get("RANK", "0")) == 0:
            write_whole(Path(self.spec.result), json.dumps(asdict(found), default=number_or_text))


def number_or_text(value: Any) -> float | str:
    """Returns what JSON has no type for: a number of numpy or torch as a float, anything else as text."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return repr(value)


def plain(value: Any) -> Any:
    """Returns a number, flag or None as it is, an enum's value, and anything else as text."""
    value = getattr(value, "value", value)
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)


def steps_of(trainer: Any) -> int:
    """Returns the optimizer steps of the whole run."""
    if trainer.args.max_steps > 0:
        return int(trainer.args.max_steps)
    per_epoch = -(-len(trainer.get_train_dataloader()) // trainer.args.gradient_accumulation_steps)
    return math.ceil(max(1, per_epoch) * trainer.args.num_train_epochs)  # as transformers counts them


def ignored_options(args: Any, wanted: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Returns the options whose values aren't those that were set: name -> (wanted, found)."""
    missing = object()
    found = {name: getattr(args, name, missing) for name in wanted}
    same = {
        name: value == wanted[name] or str(plain(value)) == str(plain(wanted[name])) for name, value in found.items()
    }
    return {
        name: (repr(wanted[name]), "no such option" if value is missing else repr(value))
        for name, value in found.items()
        if not same[name]
    }


def data_digest(dataset: Any) -> str:
    """Returns a hash of a dataset's rows; of an iterable one its description, so that no row is consumed."""
    if isinstance(dataset, dict):
        return digest_of({name: data_digest(one) for name, one in dataset.items()})
    if not hasattr(dataset, "__len__"):
        return digest_of(dataset)
    count = len(dataset)
    step = max(1, count // MOST_ROWS)
    return digest_of([count, [dataset[i] for i in range(0, count, step)]])


def code_digest(script: str) -> str:
    """Returns a hash of the script and of the modules that it has imported, but for installed packages and Python's."""
    installed = [Path(path).resolve() for path in set(sysconfig.get_paths().values())]
    found = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    files = {Path(name).resolve() for name in (script, *found) if name and name.endswith(".py")}
    sources = [one for one in files if one.is_file() and not any(folder in one.parents for folder in installed)]
    return digest_of(sorted(digest_of(one.read_text(encoding="utf-8")) for one in sources))


def steps_to_time(args: Any) -> int:
    """Returns how many steps to time: two or more, with one generation or more, and a first one that isn't counted."""
    micro_batches = args.steps_per_generation * args.num_iterations
    return 1 + min(max(2, -(-micro_batches // args.gradient_accumulation_steps)), MOST_TIMED)


def timed_steps(result: Result, evaluates: bool, count: int) -> Any:
    """Returns a callback that stops after ``count`` steps and one evaluation, and notes how long they took.

    The first step isn't counted, as it includes warm-up.
    """
    from transformers import TrainerCallback

    class Timed(TrainerCallback):
        def __init__(self) -> None:
            self.last, self.steps = time.monotonic(), 0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.last = time.monotonic()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.steps += 1
            if self.steps > 1:
                result.step += (time.monotonic() - self.last) / (count - 1)
            control.should_save = False
            control.should_evaluate = evaluates and self.steps == count
            control.should_training_stop = self.steps == count
            self.last = time.monotonic()

        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.steps == count:
                result.evaluation = time.monotonic() - self.last

    return Timed()


def end_with_tool() -> None:
    """Ends this process when the tool that started it has ended, however that happened: repeating the command starts
    the run again, and two would write into one folder."""
    tool = int(os.environ.get(TOOL, "0"))
    if not tool or os.name == "nt":  # started by hand or by a scheduler; Windows can't ask
        return

    def watch() -> None:
        while True:
            try:
                os.kill(tool, 0)
            except ProcessLookupError:
                os._exit(1)
            except PermissionError:
                pass
            time.sleep(1)

    threading.Thread(target=watch, daemon=True).start()


def set_options(options: dict[str, Any]) -> None:
    """Makes every new ``GRPOConfig`` of this process have these options, set before its own checks."""
    from trl import GRPOConfig

    from trl_ext import CurvatureGRPOConfig

    def wrapped(check: Callable[[Any], None]) -> Callable[[Any], None]:
        @wraps(check)
        def post_init(config: Any) -> None:
            if not getattr(config, "_options_are_set", False):
                config._options_are_set = True
                for name, value in options.items():
                    setattr(config, name, value)
            check(config)

        return post_init

    for kind in (CurvatureGRPOConfig, GRPOConfig):
        kind.__post_init__ = wrapped(kind.__post_init__)  # type: ignore[method-assign]


def use_our_trainer() -> None:
    """Makes ``trl.GRPOTrainer`` and ``trl.GRPOConfig`` ours in this process."""
    import trl
    import trl.trainer

    from trl_ext import CurvatureGRPOConfig, CurvatureGRPOTrainer

    for module in (trl, trl.trainer):
        module.GRPOTrainer, module.GRPOConfig = CurvatureGRPOTrainer, CurvatureGRPOConfig  # type: ignore[attr-defined]


def stop_at_train(session: Session) -> None:
    """Makes every trainer of this process call ``session.begin`` when it starts to train."""
    import transformers
    from trl.trainer.grpo_trainer import GRPOTrainer

    train = transformers.Trainer.train

    @wraps(train)
    def begin_and_train(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(trainer, GRPOTrainer):  # a script may train something else before
            session.begin(trainer)
        return train(trainer, *args, **kwargs)

    transformers.Trainer.train = begin_and_train  # type: ignore[method-assign]


def run(spec: Spec) -> None:
    """Runs the script as ``python script arguments`` does, or trains what the function makes."""
    if not Path(spec.script).is_file():
        from trl import TrlParser

        from trl_ext import CurvatureGRPOConfig

        make_trainer = load_function(spec.script, "ablate")
        (config,) = TrlParser((CurvatureGRPOConfig,)).parse_args_and_config(args=spec.arguments)
        make_trainer(config).train()
        return
    sys.argv = [spec.script, *spec.arguments]
    sys.path[0] = str(Path(spec.script).resolve().parent)
    runpy.run_path(spec.script, run_name="__main__")


def main(file: str) -> None:
    end_with_tool()
    spec = Spec.read(file)
    session = Session(spec)
    error: str | None = "it was interrupted"
    try:
        set_options(spec.options)
        use_our_trainer()
        stop_at_train(session)
        run(spec)
        error = ""
    except StopDryRunError:
        error = ""
    except SystemExit as ended:
        error = "" if ended.code in (None, 0) else f"it ended with {ended.code}"
        raise
    except KeyboardInterrupt:
        error = None  # no result: a repeated command trains it again
        raise
    except BaseException as raised:
        error = f"{type(raised).__name__}: {raised}"
        raise
    finally:
        if error is not None:
            session.write(error)


if __name__ == "__main__":
    main(sys.argv[1])
