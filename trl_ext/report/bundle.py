"""A run as one HTML file below 5 MB to send to others: its page, and the numbers that ``compare`` reads.

What may be private stays out: prompts and answers (but for ``--with-texts``), and every option that
``configuration.shared_options`` leaves out. Names of the run, its tasks and its reward functions are in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from markupsafe import Markup

from .compare_runs import BLOCKS, COMPARED
from .configuration import shared_options
from .groups import group_runs
from .numbers import ReportNumbers, evenly, finite, report_numbers, untried_only
from .page import build_page
from .read_run import Curve, LogLine, Run, is_number, read_run
from .verdicts import diagnose

MOST_BYTES = 5_000_000
MOST_ENTRIES = 2000  # of the log, for ``compare``
# (points of a curve, heatmaps), until the file is small enough; a heatmap of 64 prompts takes 0.3 MB, plotly 2 MB
SIZES = ((2000, 10), (500, 5), (200, 3))
LOGGED = (*COMPARED.values(), "eval_accuracy", "eval_reward", "eval_runtime", "eval_samples_per_second")
SCRIPT = re.compile(r'<script type="application/json" id="run">(.*?)</script>', re.S)
VERSION = 1


@dataclass(frozen=True)
class Found:
    """A verdict as a bundle has it."""

    level: str
    title: str
    onset: int


def without_private(run: Run, with_texts: bool = False) -> Run:
    """The run with the shared options alone, and without its prompts' texts."""
    records = run.records if with_texts else [replace(record, prompt_text_P=None) for record in run.records]
    return replace(run, records=records, config=shared_options(run.config), problems=[], source="")


def thinned(logs: Sequence[LogLine]) -> list[LogLine]:
    """The ``LOGGED`` metrics of at most ``MOST_ENTRIES`` entries of training, and as many of evaluation."""
    rows = [{name: entry[name] for name in ("step", *LOGGED) if is_number(entry.get(name))} for entry in logs]
    evaluated = [row for row in rows if any(name.startswith("eval_") for name in row)]
    trained = [row for row in rows if len(row) > 1 and not any(name.startswith("eval_") for name in row)]
    return sorted(_few(trained) + _few(evaluated), key=lambda row: row["step"])


def _few(rows: list[LogLine]) -> list[LogLine]:
    """Those of steps that a power of 2 divides: two runs that log as often keep common steps. And the last one."""
    kept, every = rows, 1
    while len(kept) > MOST_ENTRIES and every <= rows[-1]["step"]:
        every *= 2
        kept = [row for row in rows[:-1] if row["step"] % every == 0] + rows[-1:]
    if min(BLOCKS, len(rows)) <= len(kept) <= MOST_ENTRIES:
        return kept
    return [rows[i] for i in evenly(len(rows), MOST_ENTRIES)]  # steps that no power of 2 divides


def columns(logs: Sequence[LogLine]) -> dict[str, list[float | None]]:
    """Metric -> a value for each entry, of six digits, None where an entry has none: a third of the entries' size."""
    names = dict.fromkeys(name for entry in logs for name in entry)
    return {name: [float(f"{entry[name]:.6g}") if name in entry else None for entry in logs] for name in names}


def entries(found: Mapping[str, list[float | None]]) -> list[LogLine]:
    """The log's entries from ``columns``."""
    rows = (zip(found, values, strict=True) for values in zip(*found.values(), strict=True))
    return [{name: value for name, value in row if value is not None} for row in rows]


def _lighter(numbers: ReportNumbers, points: int, heatmaps: int) -> ReportNumbers:
    def few(curve: Curve) -> Curve:
        chosen = evenly(len(curve.steps), points)
        return Curve([curve.steps[i] for i in chosen], [curve.values[i] for i in chosen])

    curves = {section: {name: few(curve) for name, curve in of.items()} for section, of in numbers.curves.items()}
    shown = [numbers.heatmaps[i] for i in evenly(len(numbers.heatmaps), heatmaps)]
    scatter = [numbers.sigma_and_curvature[i] for i in evenly(len(numbers.sigma_and_curvature), points)]
    return replace(numbers, curves=curves, heatmaps=shown, sigma_and_curvature=scatter)


def build_bundle(run: Run, with_texts: bool = False) -> bytes:
    """The file. Raises ``ValueError`` if it can't be made small enough (only texts can be that large)."""
    run = without_private(run, with_texts)
    (numbers,) = untried_only([report_numbers(run)])
    if not with_texts:
        numbers = replace(numbers, completions=[])
    verdicts = [Found(one.level, one.title, one.onset) for one in numbers.diagnosis.verdicts]
    data: dict[str, Any] = {"version": VERSION, "name": run.name, "config": run.config}
    data["logs"] = columns(thinned(run.logs))
    data["verdicts"] = [asdict(one) for one in verdicts]
    text = json.dumps(finite(data), allow_nan=False).replace("<", "\\u003c")
    for points, heatmaps in SIZES:
        lighter = _lighter(numbers, points, heatmaps)
        page = build_page([run], group_runs([run]), [lighter], "python -m trl_ext report RUN --bundle", Markup(text))
        whole = page.encode("utf-8", "replace")
        if len(whole) < MOST_BYTES:
            return whole
    size = f"{len(whole) / 1e6:.1f} MB, of at most {MOST_BYTES / 1e6:g}"
    raise ValueError(f"the bundle would have {size}: leave --with-texts out")


def read_bundle(file: Path) -> tuple[Run, list[Found]]:
    """A bundle's run, of whose log what ``compare`` needs is there, and its verdicts.

    Raises ``ValueError`` where the file is no bundle.
    """
    try:
        data = json.loads(SCRIPT.findall(file.read_text(errors="replace"))[-1])
        run = Run(file, data["name"], entries(data["logs"]), [], data["config"])
        return run, [Found(**one) for one in data["verdicts"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{file} is no bundle of python -m trl_ext report --bundle ({error})") from None


def read_either(path: str) -> tuple[Run, list[Found]]:
    """A bundle, or what ``read_run`` reads."""
    if path.endswith(".html"):
        return read_bundle(Path(path))
    run = read_run(path)
    return run, [Found(one.level, one.title, one.onset) for one in diagnose(run).verdicts]
