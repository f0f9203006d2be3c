"""Are there three phases? On small policies: ``python examples/paper/phases.py --optim sgd --max_grad_norm 0``.

Trains the built-in policy with ``mean`` and ``std``, each at its best learning rate (swept on other seeds), as
``examples/ablation/ablate.py`` does and with its options; the runs at the best rates measure interference exactly,
without a sketch. Writes ``phases.md``, ``phases.png`` and ``phases.csv``. Repeat an interrupted command to go on.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":  # as in ablate.py
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    os.environ["PYTHONSAFEPATH"] = "1"


def main(arguments: list[str]) -> None:
    from examples.ablation.ablate import compare, make_parser, write_results

    parser = make_parser(__doc__ or "", "phases.py")
    parser.set_defaults(
        methods=["mean", "std"],
        sweep_seeds=[100, 101, 102],
        seeds=list(range(10)),
        max_steps=100,
        eval_size=256,
        interference_every=0,
        output_dir="runs/phases",
    )
    parser.add_argument(
        "--measure_every",
        type=int,
        default=10,
        help="steps between exact measurements of interference in the runs at the best rates; 0: none",
    )
    options = parser.parse_args(arguments)
    if options.measure_every < 0:
        sys.exit(f"error: --measure_every {options.measure_every} must not be negative")
    exact = {"interference_dim": 0, "interference_every": options.measure_every, "what_if": []}
    sweep, finals, workers = compare(options, exact)
    if finals:
        from examples.ablation.tables import write_csv
        from examples.paper.phases_results import draw_phases, measured_rows, phases_text

        write_results(options, sweep, finals)
        folder = Path(options.output_dir)
        write_csv(folder / "phases.csv", measured_rows(finals))
        text = phases_text(finals, sweep)
        (folder / "phases.md").write_text(text)
        draw_phases(finals, folder / "phases.png")
        print(f"\n{text}\nWritten to {folder}: phases.md, phases.png, phases.csv")
    workers.end_if_failed()


if __name__ == "__main__":
    main(sys.argv[1:])
