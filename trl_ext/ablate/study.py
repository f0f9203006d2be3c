"""What a study trains: its variants, and each run with its options, its folder and its result.

A run is a folder: ``spec.json`` says what to train, ``result.json`` what came of it, ``output.txt`` what it printed.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Mode = Literal["dry", "time", "train"]
TOOL = "ABLATE_TOOL"  # environment variable: the process whose end ends a run
Options = Mapping[str, Any]


@dataclass(frozen=True)
class Variant:
    """One of the compared settings: its name, and the options of the trainer that it sets."""

    name: str
    options: Options


@dataclass(frozen=True)
class Spec:
    """What a process trains.

    Attributes:
        script: a Python file, or ``module:function`` that makes a trainer from its config.
        arguments: the script's own.
        options: of the trainer, set from outside.
        mode: "dry" stops at ``train()``; "time" trains a few steps and evaluates once; "train" trains.
        result: where the result goes.
    """

    script: str
    arguments: list[str]
    options: dict[str, Any]
    mode: Mode
    result: str

    @staticmethod
    def read(file: Path | str) -> Spec:
        return Spec(**json.loads(Path(file).read_text(encoding="utf-8")))

    def write(self, file: Path) -> None:
        write_whole(file, json.dumps(asdict(self), indent=1))


@dataclass
class Result:
    """What came of a run.

    Attributes:
        status: "stopped" at train() (a dry run), "finished" or "failed"; ``error`` says why.
        ignored: option -> (wanted, found), where the script's trainer has another value.
        own_optimizer: whether the script gives the trainer an optimizer, so that ``learning_rate`` has no effect.
        trainer: the name of its class; ``has_curvature``: whether it is ours.
        config: options of the trainer that the tool reads.
        data: a hash of the training and evaluation data; code: of the script and of the user's modules that it imports.
        logs: the trainer's log history.
        seconds: of the whole process; ``start``: until ``train()``; ``step`` and ``evaluation``: of each, when timed.
        checkpoint_bytes: of one checkpoint, estimated.
    """

    status: str
    error: str = ""
    ignored: dict[str, tuple[str, str]] = field(default_factory=dict)
    own_optimizer: bool = False
    trainer: str = ""
    has_curvature: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    data: str = ""
    code: str = ""
    logs: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    start: float = 0.0
    step: float = 0.0
    evaluation: float = 0.0
    checkpoint_bytes: int = 0

    @staticmethod
    def read(file: Path) -> Result | None:
        """Returns None where there is no result, or one that was cut off."""
        try:
            return Result(**json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None


@dataclass(frozen=True)
class Run:
    """One training run of a variant. ``options`` include its learning rate, seed and folder."""

    variant: Variant
    learning_rate: float
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.variant.name} at {self.learning_rate:g}, seed {self.seed}"

    @property
    def options(self) -> dict[str, Any]:
        own = {"learning_rate": self.learning_rate, "seed": self.seed, "output_dir": str(self.folder / "trainer")}
        return {**self.variant.options, **own}

    def result(self) -> Result | None:
        return Result.read(self.folder / "result.json")


def make_run(study: Path, variant: Variant, learning_rate: float, seed: int) -> Run:
    """Returns the run; equal options have the same folder, so that no run is trained twice."""
    digest = digest_of([dict(variant.options), learning_rate, seed])[:8]
    label = re.sub(r"[^\w.=-]+", "_", variant.name)[:40]
    return Run(variant, learning_rate, seed, study / "runs" / f"{label}_lr{learning_rate:g}_seed{seed}_{digest}")


def digest_of(value: Any) -> str:
    """Returns a hash of what JSON makes of a value; of other objects their ``repr`` counts, without its address."""

    def without_address(one: Any) -> str:
        return re.sub(r" at 0x[0-9a-f]+", "", repr(one))

    return hashlib.sha256(json.dumps(value, sort_keys=True, default=without_address).encode()).hexdigest()


def write_whole(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.new")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


@dataclass(frozen=True)
class Curve:
    """A metric of one run by step; ``tokens`` and ``seconds`` of training at each point, NaN where not logged."""

    steps: list[int]
    values: list[float]
    tokens: list[float]
    seconds: list[float]

    @property
    def mean_over_training(self) -> float:
        """Area under straight lines between the points, divided by the steps; a single point's value."""
        if len(self.steps) < 2:
            return self.values[0] if self.values else math.nan
        pairs = zip(self.steps, self.steps[1:], self.values, self.values[1:], strict=False)
        return sum((b - a) * (y + z) / 2 for a, b, y, z in pairs) / (self.steps[-1] - self.steps[0])

    @property
    def last(self) -> float:
        return self.values[-1] if self.values else math.nan

    def first_at(self, target: float) -> int | None:
        """Returns the number of the first point that reaches the target."""
        return next((i for i, value in enumerate(self.values) if value >= target), None)


def read_curve(logs: Sequence[Mapping[str, Any]], metric: str) -> Curve:
    """Reads a metric from a log history, with the tokens and seconds that training had taken by then."""
    curve = Curve([], [], [], [])
    tokens, seconds, last = math.nan, 0.0, -1
    for entry in logs:
        step = int(entry.get("step", 0))
        tokens = float(entry.get("num_tokens", tokens))
        if "step_time" in entry:
            seconds += float(entry["step_time"]) * max(1, step - max(last, 0))
            last = step
        if metric not in entry:
            continue
        if curve.steps and step == curve.steps[-1]:  # the last of several evaluations of one step counts
            curve.values[-1] = float(entry[metric])
            continue
        curve.steps.append(step)
        curve.values.append(float(entry[metric]))
        curve.tokens.append(0.0 if step == 0 else tokens)
        curve.seconds.append(seconds)
    return curve
