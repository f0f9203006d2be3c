"""Are there three phases? Tables and figures of a study: ``python examples/paper/phases.py runs/phases``.

``runs/phases`` is what ``python -m trl_ext ablate examples/ablation/train.py`` made, by the commands on this folder's
page; its runs measure interference exactly, without a sketch. Writes ``phases.md``, ``phases.png`` and ``phases.csv``.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])


def main(folder: Path) -> None:
    from examples.ablation.curves import read_runs
    from examples.paper.phases_results import draw_phases, measured_rows, phases_text
    from trl_ext.ablate.page import write_csv

    sweep, finals = read_runs(folder)
    write_csv(folder / "phases.csv", measured_rows(finals))
    text = phases_text(finals, sweep)
    (folder / "phases.md").write_text(text)
    draw_phases(finals, folder / "phases.png")
    print(f"{text}\nWritten to {folder}: phases.md, phases.png, phases.csv")


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "results.csv").is_file():
        sys.exit(f"usage: phases.py FOLDER, the --output_dir of a finished study\n\n{__doc__}")
    main(Path(sys.argv[1]))
