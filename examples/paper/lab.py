"""Where does dividing by the std help? On a log-linear policy: ``python examples/paper/lab.py``.

Trains log-linear policies (``log_linear.py``) by plain gradient steps in every setting of a map of overlap, spread of
difficulty, pass rate, group size and reward noise, with every method at its own best constant learning rate: chosen on
the tuning seeds, measured on others. Writes ``cells.csv`` (all seeds), ``lab.csv`` (a row a setting), ``lab.md``,
``map.png`` and ``predictor.png``. Half an hour on two CPU cores; repeat an interrupted command to go on;
``--coarse`` takes four minutes.
"""

import argparse
import csv
import dataclasses
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":  # as in ablate.py
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    os.environ["PYTHONSAFEPATH"] = "1"


TUNING_SEEDS = list(range(100, 108))
SEEDS = list(range(20))
STEPS = 150
RATES = 2.0 ** np.arange(-4, 13.5, 0.5)
METHODS = {  # of each part
    "map": ["mean", "std"],
    "methods": ["mean", "std", "power", "max_rl", "median_mad", "loo", "rank", "adaptive", "true_sigma"],
    "structures": ["mean", "std"],
}


# Which settings


def map_settings(coarse: bool) -> Iterator[dict[str, float]]:
    """The map: every combination, for ``mean`` and ``std``."""
    overlaps = (0.0, 0.5, 0.9) if coarse else (0.0, 0.25, 0.5, 0.75, 0.9)
    spreads = (0.0, 2.0) if coarse else (0.0, 1.0, 2.0)
    pass_rates = (0.5, 0.1) if coarse else (0.5, 0.1, 0.03)
    groups = (0, 8) if coarse else (0, 4, 8, 32, 128)
    noises = (0.0, 0.1) if coarse else (0.0, 0.1, 0.2)
    for overlap, spread, pass_rate, group, noise in product(overlaps, spreads, pass_rates, groups, noises):
        yield {"overlap": overlap, "spread": spread, "pass_rate": pass_rate, "group": group, "noise": noise}


def method_settings(coarse: bool) -> Iterator[dict[str, float]]:
    """A slice of the map, for every method."""
    prompts = ((0.0, 0.5), (0.0, 0.1), (2.0, 0.1))
    for group, overlap, (spread, pass_rate), noise in product((8, 32), (0.0, 0.5), prompts, (0.0, 0.1)):
        if not coarse or noise:
            yield {"overlap": overlap, "spread": spread, "pass_rate": pass_rate, "group": group, "noise": noise}


def structure_settings(coarse: bool) -> Iterator[dict[str, float]]:
    """Other policies: a table of logits, fewer features, more answers, fewer prompts, fewer common directions."""
    structures = ({"features": 0}, {"features": 2}, {"answers": 32}, {"prompts": 16}, {"shared_features": 8})
    for structure, overlap, (spread, pass_rate), group in product(
        structures, (0.0, 0.5), ((0.0, 0.5), (0.0, 0.1), (2.0, 0.1)), (0, 8)
    ):
        if not coarse or group:
            yield {
                "overlap": overlap,
                "spread": spread,
                "pass_rate": pass_rate,
                "group": group,
                "noise": 0.1,
                **structure,
            }


def cells(coarse: bool) -> list[tuple[str, dict[str, float]]]:
    """Lists (part, setting) of everything that is measured."""
    parts = {"map": map_settings, "methods": method_settings, "structures": structure_settings}
    return [(part, setting) for part, settings in parts.items() for setting in settings(coarse)]


# One cell -> rows


def measure(cell: tuple[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Measures a setting: a row for each method. Values of several seeds are text, as ``"1.5 2.0"``."""
    from examples.paper.log_linear import Policies, Setting

    part, described = cell
    setting = Setting(**described)
    tuning, reported = Policies(setting, TUNING_SEEDS), Policies(setting, SEEDS)
    return [
        {"part": part, **dataclasses.asdict(setting), "method": name, **measure_method(name, tuning, reported)}
        for name in METHODS[part]
    ]


def measure_method(method: str, tuning: Any, reported: Any) -> dict[str, Any]:
    """Finds a method's best rates on the tuning seeds, and measures it with them on the reported seeds."""
    from examples.paper.log_linear import steps_to, train

    chosen = train(tuning, method, np.broadcast_to(RATES, (len(tuning.seeds), len(RATES))), STEPS)
    start = chosen.accuracy[0].mean()
    target = start + (1 - start) / 2  # half of the failures gone
    steps = np.where(np.isfinite(found := steps_to(chosen.accuracy, target)), found, 2 * STEPS).mean(0)
    area = chosen.accuracy.mean(0).mean(0)
    fastest, best = int(steps.argmin()), int(area.argmax())
    reaching = np.flatnonzero(np.isfinite(found).all(0))
    second = min(1, len(reaching) - 1)  # not the very slowest, so that the reported seeds get there too
    slowest = int(reaching[second]) if len(reaching) else fastest

    kept: dict[int, np.ndarray] = {}

    def at_step(step: int, pi_SRPK: np.ndarray) -> None:
        kept[step] = pi_SRPK[:, 2].copy()

    rates = np.broadcast_to(RATES[[fastest, best, slowest]], (len(reported.seeds), 3))
    runs = train(reported, method, rates, STEPS, at_step)
    taken = steps_to(runs.accuracy, target)
    row: dict[str, Any] = {
        "target": target,
        "rate_steps": RATES[fastest] if np.isfinite(found).any() else np.nan,
        "rate_area": RATES[best],
        "rate_slowest": RATES[slowest],
        "edge_steps": fastest == len(RATES) - 1,
        "edge_area": best == len(RATES) - 1 or best == 0,
        "steps": taken[:, 0],
        "area": runs.accuracy.mean(0)[:, 1],
        "final": runs.accuracy[-1, :, 1],
        "flow_time": taken[:, 2] * RATES[slowest],
    }
    if method == "mean":
        row |= averages_of_mean(runs, taken, reported, kept)
    return {
        name: " ".join(f"{v:.5g}" for v in value) if isinstance(value, (list, np.ndarray)) else value
        for name, value in row.items()
    }


def averages_of_mean(runs: Any, taken: np.ndarray, reported: Any, kept: Mapping[int, np.ndarray]) -> dict[str, Any]:
    """What ``mean``'s runs (at the fastest, the best and a slow rate) say of C, of sigma, and of the assumptions.

    Args:
        taken: steps to the target, (seeds, rates).
        kept: the policies of the slow run before each step.
    """
    from examples.paper.log_linear import assumptions

    row: dict[str, Any] = {}
    last = np.where(np.isfinite(taken), np.ceil(taken), STEPS).astype(int)  # (S, R)
    for column, name in ((0, "steps"), (1, "area"), (2, "slowest")):
        until = [slice(None, max(int(end), 1)) for end in last[:, column]]
        for key, values in (("c", runs.sigma), ("c_logged", runs.group_sigma)):
            averages = [values[rows, seed, column].mean() for seed, rows in enumerate(until)]
            row[f"{key}_{name}"] = 8 / 3 * np.array(averages)
    until = [slice(None, max(int(end), 2)) for end in last[:, 2]]
    row["variation_prompts"] = [runs.variation[rows, seed, 2].mean() for seed, rows in enumerate(until)]
    row["variation_time"] = [
        runs.sigma[rows, seed, 2].std() / runs.sigma[rows, seed, 2].mean() for seed, rows in enumerate(until)
    ]
    row["dead"] = [runs.dead[rows, seed, 0].mean() for seed, rows in enumerate(until)]
    for when, share in (("start", 0.0), ("half", 0.5)):
        states = np.stack([kept[int(share * end)][seed] for seed, end in enumerate(last[:, 2])])
        row |= {f"{when}_{name}": values for name, values in assumptions(reported, states).items()}
    return row


# All cells -> files


def write_cells(path: Path, todo: list[tuple[str, dict[str, float]]], jobs: int) -> None:
    """Measures the settings that ``path`` lacks, and writes each as soon as it is known."""
    from examples.paper.log_linear import Setting

    done = keep_whole(path, ["part", *(field.name for field in dataclasses.fields(Setting))])
    left = [
        (part, setting)
        for part, setting in todo
        if tuple(str(value) for value in (part, *dataclasses.asdict(Setting(**setting)).values())) not in done
    ]
    print(f"{len(todo)} settings, {len(todo) - len(left)} measured before", flush=True)
    began = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        for number, rows in enumerate(pool.imap_unordered(measure, left), 1):
            new = not path.is_file()
            with open(path, "a", newline="") as stream:
                writer = csv.DictWriter(stream, columns(), lineterminator="\n")
                if new:
                    writer.writeheader()
                writer.writerows(rows)
            if number % 20 == 0 or number == len(left):
                minutes = (time.monotonic() - began) / 60
                print(
                    f"{number} of {len(left)}, {minutes:.1f} min, {minutes / number * len(left):.1f} in all", flush=True
                )


def keep_whole(path: Path, keys: list[str]) -> set[tuple[str, ...]]:
    """Removes from ``path`` the settings that a kill cut off, and returns those that have all their methods."""
    if not path.is_file():
        return set()
    with open(path, newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if None not in row.values()]
    methods: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        methods.setdefault(tuple(row[key] for key in keys), []).append(row["method"])
    whole = {key for key, names in methods.items() if names == METHODS[key[0]]}
    unfinished = path.with_suffix(".part")
    with open(unfinished, "w", newline="") as stream:
        writer = csv.DictWriter(stream, columns(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for row in rows if tuple(row[key] for key in keys) in whole)
    unfinished.replace(path)
    return whole


@cache
def columns() -> list[str]:
    """Returns the columns of ``cells.csv``: those of ``mean``, which has all."""
    rows = measure(("map", {"prompts": 4, "group": 2}))
    return list(rows[0])


def main(arguments: list[str]) -> None:
    from examples.ablation.ablate import check_options
    from trl_ext.checkpoints import check_output_dir

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--coarse", action="store_true", help="three overlaps, two of the rest: a first look")
    parser.add_argument("--jobs", type=int, default=2, help="settings at the same time, one thread each")
    parser.add_argument("--output_dir", default="runs/lab")
    options = parser.parse_args(arguments)
    if find_spec("matplotlib") is None:
        sys.exit("error: the figures need matplotlib: pip install matplotlib")
    try:
        check_options(options, lists=[], positive=["jobs"])
        check_output_dir(options.output_dir)
    except ValueError as error:
        sys.exit(f"error: {error}")
    folder = Path(options.output_dir)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes to come
    write_cells(folder / "cells.csv", cells(options.coarse), options.jobs)

    from examples.ablation.tables import write_csv
    from examples.paper.lab_cells import read_cells, summary_rows
    from examples.paper.lab_plot import draw_map, draw_predictor
    from examples.paper.lab_results import tables

    measured = read_cells(folder / "cells.csv")
    write_csv(folder / "lab.csv", summary_rows(measured))
    (folder / "lab.md").write_text(tables(measured))
    on_map = [cell for cell in measured if cell.part == "map"]
    draw_map(on_map, folder / "map.png")
    draw_predictor(on_map, folder / "predictor.png")
    print(f"{tables(measured)}\nWritten to {folder}: cells.csv, lab.csv, lab.md, map.png, predictor.png")


if __name__ == "__main__":
    main(sys.argv[1:])
