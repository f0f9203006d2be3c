"""Where does dividing by the std help? On a log-linear policy: ``python examples/paper/lab.py``.

Trains log-linear policies (``log_linear.py``) by plain gradient steps in every setting of a map of overlap, spread of
difficulty, pass rate, group size and reward noise, with every method at its own best constant learning rate: chosen on
the tuning seeds, measured on others. Writes ``cells.csv`` (all seeds), ``lab.csv`` (a row a setting),
``lab_methods.csv`` (a row a setting and method), ``lab.md``, ``map.png`` and ``predictor.png``. Half an hour on two CPU
cores; repeat an interrupted command to go on; ``--coarse`` takes four minutes.
"""

import argparse
import csv
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, astuple, fields
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    # worker processes must not look for modules in the working directory: in examples/ a math.py lies
    os.environ["PYTHONSAFEPATH"] = "1"

from examples.paper import log_linear
from examples.paper.log_linear import Policies, Runs, Setting, steps_to

TUNING_SEEDS = list(range(100, 108))
SEEDS = list(range(20))
STEPS = 150
RATES = 2.0 ** np.arange(-4, 13.5, 0.5)
METHODS = {  # of each part
    "map": ["mean", "std"],
    "methods": ["mean", "std", "power", "max_rl", "median_mad", "loo", "rank", "true_sigma"],
    "structures": ["mean", "std"],
}
PROMPTS = ((0.0, 0.5), (0.0, 0.1), (2.0, 0.1))  # spread and pass rate, in the parts other than the map
Row = dict[str, str | float | np.ndarray]


# Which settings


def map_settings(coarse: bool) -> Iterator[Setting]:
    """The map: every combination, for ``mean`` and ``std``."""
    overlaps = (0.0, 0.5, 0.9) if coarse else (0.0, 0.25, 0.5, 0.75, 0.9)
    spreads = (0.0, 2.0) if coarse else (0.0, 1.0, 2.0)
    pass_rates = (0.5, 0.1) if coarse else (0.5, 0.1, 0.03)
    groups = (0, 8) if coarse else (0, 4, 8, 32, 128)
    noises = (0.0, 0.1) if coarse else (0.0, 0.1, 0.2)
    for values in product(overlaps, spreads, pass_rates, groups, noises):
        yield Setting(*values)


def method_settings(coarse: bool) -> Iterator[Setting]:
    """A slice of the map, for every method."""
    for group, overlap, prompts, noise in product((8, 32), (0.0, 0.5), PROMPTS, (0.1,) if coarse else (0.0, 0.1)):
        yield Setting(overlap, *prompts, group, noise)


def structure_settings(coarse: bool) -> Iterator[Setting]:
    """Other policies: a table of logits, fewer features, more answers, fewer prompts, fewer common directions."""
    structures = ({"features": 0}, {"features": 2}, {"answers": 32}, {"prompts": 16}, {"shared_features": 8})
    for structure, overlap, prompts, group in product(structures, (0.0, 0.5), PROMPTS, (8,) if coarse else (0, 8)):
        yield Setting(overlap, *prompts, group, 0.1, **structure)


def cells(coarse: bool) -> list[tuple[str, Setting]]:
    """Lists (part, setting) of everything that is measured."""
    parts = {"map": map_settings, "methods": method_settings, "structures": structure_settings}
    return [(part, setting) for part, settings in parts.items() for setting in settings(coarse)]


# One cell -> rows


def measure(cell: tuple[str, Setting]) -> list[Row]:
    """Measures a setting: a row for each method. Values of several seeds are text, as ``"1.5 2.0"``."""
    part, setting = cell
    tuning, reported = Policies(setting, TUNING_SEEDS), Policies(setting, SEEDS)
    rows = [
        {"part": part, **asdict(setting), "method": name, **measure_method(name, tuning, reported)}
        for name in METHODS[part]
    ]
    return [
        {k: " ".join(f"{v:.5g}" for v in value) if isinstance(value, np.ndarray) else value for k, value in row.items()}
        for row in rows
    ]


def measure_method(method: str, tuning: Policies, reported: Policies) -> Row:
    """Finds a method's best rates on the tuning seeds, and measures it with them on the reported seeds."""
    chosen = log_linear.train(tuning, method, np.broadcast_to(RATES, (len(tuning.seeds), len(RATES))), STEPS)
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
    runs = log_linear.train(reported, method, rates, STEPS, at_step)
    taken = steps_to(runs.accuracy, target)
    row: Row = {
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
    return row | (averages_of_mean(runs, taken, reported, kept) if method == "mean" else {})


def averages_of_mean(runs: Runs, taken: np.ndarray, reported: Policies, kept: Mapping[int, np.ndarray]) -> Row:
    """What ``mean``'s runs (at the fastest, the best and a slow rate) say of C, of sigma, and of the assumptions.

    Args:
        taken: steps to the target, (seeds, rates).
        kept: the policies of the slow run before each step.
    """
    row: Row = {}
    last = np.where(np.isfinite(taken), np.ceil(taken), STEPS).astype(int)  # (S, R)

    def until_last(values: np.ndarray, column: int, least: int = 1) -> list[np.ndarray]:
        """Returns each seed's values up to its last step, and at least the first ``least`` of them."""
        return [values[: max(int(end), least), seed, column] for seed, end in enumerate(last[:, column])]

    for column, name in enumerate(("steps", "area", "slowest")):
        for key, values in (("c", runs.sigma), ("own_std_8_3", runs.group_sigma)):
            row[f"{key}_{name}"] = 8 / 3 * np.array([of_seed.mean() for of_seed in until_last(values, column)])
    row["variation_prompts"] = np.array([of_seed.mean() for of_seed in until_last(runs.variation, 2, 2)])
    row["variation_time"] = np.array([of_seed.std() / of_seed.mean() for of_seed in until_last(runs.sigma, 2, 2)])
    dead = [runs.dead[: max(int(end), 2), seed, 0].mean() for seed, end in enumerate(last[:, 2])]  # at the fastest rate
    row["dead"] = np.array(dead)
    for when, share in (("start", 0.0), ("half", 0.5)):
        states = np.stack([kept[int(share * end)][seed] for seed, end in enumerate(last[:, 2])])
        row |= {f"{when}_{name}": values for name, values in log_linear.assumptions(reported, states).items()}
    return row


# All cells -> files


def measured_before(path: Path) -> set[tuple[str, ...]]:
    """Returns the settings, as text, that ``path`` has every method of. Skips a last row that a kill cut off."""
    if not path.is_file():
        return set()
    with open(path, newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if None not in row.values()]
    counts = Counter((row["part"], *(row[field.name] for field in fields(Setting))) for row in rows)
    return {key for key, count in counts.items() if count >= len(METHODS[key[0]])}


def write_cells(path: Path, todo: list[tuple[str, Setting]], jobs: int) -> None:
    """Measures the settings that ``path`` lacks, and appends each as soon as it is known."""
    done = measured_before(path)
    left = [cell for cell in todo if (cell[0], *map(str, astuple(cell[1]))) not in done]
    print(f"{len(todo)} settings, {len(todo) - len(left)} measured before", flush=True)
    began = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(jobs) as pool, open(path, "a", newline="") as stream:
        stream.write("\n" * (stream.tell() > 0))  # a row that was cut off ends here; readers leave blank lines out
        for number, rows in enumerate(pool.imap_unordered(measure, left), 1):
            writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")  # mean's row, which has all columns
            if stream.tell() == 0:
                writer.writeheader()
            writer.writerows(rows)
            stream.flush()
            if number % 20 == 0 or number == len(left):
                minutes = (time.monotonic() - began) / 60
                in_all = minutes / number * len(left)
                print(f"{number} of {len(left)}, {minutes:.1f} min, {in_all:.1f} in all", flush=True)


def main(arguments: list[str]) -> None:
    from examples.paper.lab_cells import method_rows, read_cells, summary_rows
    from examples.paper.lab_plot import draw_map, draw_predictor
    from examples.paper.lab_results import tables
    from examples.tasks.command_line import check_options, exit_on
    from trl_ext.ablate.page import write_csv
    from trl_ext.checkpoints import check_output_dir

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--coarse", action="store_true", help="three overlaps, two of the rest: a first look")
    parser.add_argument("--jobs", type=int, default=2, help="settings at the same time, one thread each")
    parser.add_argument("--output_dir", default="runs/lab")
    options = parser.parse_args(arguments)
    if find_spec("matplotlib") is None:
        sys.exit("error: the figures need matplotlib: pip install matplotlib")
    with exit_on(ValueError):
        check_options(options, positive=["jobs"])
        check_output_dir(options.output_dir)
    folder = Path(options.output_dir)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes to come
    write_cells(folder / "cells.csv", cells(options.coarse), options.jobs)

    measured = read_cells(folder / "cells.csv")
    text = tables(measured)
    write_csv(folder / "lab.csv", summary_rows(measured))
    write_csv(folder / "lab_methods.csv", method_rows(measured))
    (folder / "lab.md").write_text(text)
    on_map = [cell for cell in measured if cell.part == "map"]
    draw_map(on_map, folder / "map.png")
    draw_predictor(on_map, folder / "predictor.png")
    print(f"{text}\nWritten to {folder}: cells.csv, lab.csv, lab_methods.csv, lab.md, map.png, predictor.png")


if __name__ == "__main__":
    main(sys.argv[1:])
