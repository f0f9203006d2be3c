"""Tries the user's script before anything is trained: does it take the options, and how long are its steps?"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .launch import Launcher
from .study import Result, Run, Variant, digest_of, make_run, write_whole

OFF_RATE = 0.9  # of the script's own learning rate: another one, so that a script that sets it itself is found out


class _AtOwnRate(Run):
    """A run at the script's own learning rate."""

    @property
    def options(self) -> dict[str, Any]:
        return {name: value for name, value in super().options.items() if name != "learning_rate"}


def check_script(
    launcher: Launcher, variants: Sequence[Variant], seeds: Sequence[int], folder: Path
) -> tuple[float, Result]:
    """Runs the script with the last variant up to ``train()``, then times steps of the first variant.

    A repeated command does the first again, to see whether code or data have changed, and keeps the times, so that the
    plan stays the same.

    Returns the script's own learning rate, and the timed result.

    Raises:
        ValueError: the script fails, sets an option itself, or passes an optimizer of its own; or its code or data
            aren't those of the folder's runs.
    """
    named = make_run(folder / "tried", variants[-1], 0.0, seeds[-1])
    tried = _AtOwnRate(named.variant, 0.0, named.seed, named.folder)
    dry = launcher.start(tried, "dry")
    check_result(dry, tried, "stopped")
    check_manifest(launcher, folder, {f"the data of seed {tried.seed}": dry.data, "what the script imports": dry.code})
    rate = float(dry.config["learning_rate"])
    timed = make_run(folder / "tried", variants[0], OFF_RATE * rate, seeds[0])
    before = timed.result()
    result = before if before is not None and before.status == "finished" else launcher.start(timed, "time")
    check_result(result, timed, "finished")
    return rate, result


def check_result(result: Result, run: Run, status: str) -> None:
    """Raises ``ValueError`` if the run didn't end with this status, or its trainer isn't as it was set."""
    if result.status != status:
        raise ValueError(f"{run.variant.name}: {result.error}\nIts output: {run.folder / 'output.txt'}")
    if result.ignored:
        lines = [f"{name} is {found} and not {wanted}" for name, (wanted, found) in result.ignored.items()]
        raise ValueError(f"the script sets options itself, so they can't be varied: {'; '.join(lines)}")
    if result.own_optimizer:
        raise ValueError("the script gives the trainer an optimizer of its own, so learning_rate has no effect there")
    if not result.has_curvature and "normalization" in run.variant.options:
        raise ValueError(f"the script's {result.trainer} is neither CurvatureGRPOTrainer nor trl.GRPOTrainer")


def check_manifest(launcher: Launcher, folder: Path, found: Mapping[str, str] | None = None) -> None:
    """Raises ``ValueError`` where the folder holds runs of another script, arguments, data or version of ours.

    Args:
        found: what the script's process found: hashes of data and code, by what an error calls them.
    """
    import trl_ext

    script = Path(launcher.script)
    packages = [Path(trl_ext.__file__).parent, Path(trl_ext.__file__).parents[1] / "grpo_kernels"]
    sources = [file.read_text(encoding="utf-8") for package in packages for file in sorted(package.rglob("*.py"))]
    now = {
        "the script": digest_of(script.read_text(encoding="utf-8") if script.is_file() else launcher.script),
        "the script's arguments": launcher.arguments,
        "the launcher": launcher.launcher,
        **(found or {}),
        "trl_ext or grpo_kernels": digest_of(sources),
    }
    file = folder / "study.json"
    if file.exists():
        before = json.loads(file.read_text())
        if changed := [name for name, value in now.items() if before.get(name, value) != value]:
            raise ValueError(
                f"{folder} holds runs from before {' and '.join(changed)} changed: use another --output_dir"
            )
        now = {**before, **now}
    write_whole(file, json.dumps(now, indent=1))
