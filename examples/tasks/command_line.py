"""A script's command line: a help of one screen, a parser, a message for an unknown name. It imports TRL late."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

DEMO_RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "demo.yaml"


@dataclass(frozen=True)
class Shown:
    """An option as the help shows it."""

    name: str
    default: str
    help: str


def shown(of: Any, names: Iterable[str]) -> list[Shown]:
    """Returns fields of a dataclass with their defaults, and the help that their ``metadata`` holds."""
    by_name = {one.name: one for one in fields(of)}
    found = []
    for one in (by_name[name] for name in names):
        default = one.default_factory() if one.default_factory is not MISSING else one.default
        text = " ".join(map(str, default)) if isinstance(default, list) else str(default)
        # what None and "" stand for, the help says itself
        found.append(Shown(one.name, "" if default in (None, "") else text, one.metadata["help"]))
    return found


def short_help(usage: str, description: str, groups: Mapping[str, Sequence[Shown]], epilog: str) -> str:
    """Formats a help text of these options alone, in groups, as wide as the terminal."""
    width = shutil.get_terminal_size((110, 24)).columns

    class Formatter(argparse.RawDescriptionHelpFormatter):
        def __init__(self, prog: str) -> None:
            super().__init__(prog, max_help_position=29, width=width)

    parser = argparse.ArgumentParser(
        usage=usage, description=description, epilog=epilog, add_help=False, formatter_class=Formatter
    )
    for heading, options in groups.items():
        group = parser.add_argument_group(heading)
        for one in options:
            text = one.help.replace("%", "%%")
            group.add_argument(f"--{one.name}", metavar="", help=f"{text} [{one.default}]" if one.default else text)
    return parser.format_help()


def did_you_mean(name: str, known: Iterable[str], closeness: float = 0.6) -> str:
    """Returns ``", did you mean x?"``, or nothing where no known name is close (difflib's ratio)."""
    close = get_close_matches(name, list(known), n=1, cutoff=closeness)
    return f", did you mean {close[0]}?" if close else ""


def unknown_option(left_over: Sequence[str], dataclasses: Iterable[Any]) -> str:
    """Returns the error message for arguments that belong to no option."""
    known = [f"--{one.name}" for of in dataclasses for one in fields(of)] + ["--config", "--help", "--help_all"]
    names = [item.split("=", 1)[0] for item in left_over if item.startswith("-")]
    if not names:
        return f"{' '.join(left_over)}: belongs to no option"
    return f"{names[0]}: no such option{did_you_mean(names[0], known)}"


def say(text: str) -> None:
    """Prints on the main process."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(text, flush=True)


@contextmanager
def exit_on(*errors: type[Exception]) -> Iterator[None]:
    """Ends the program with the message of such an error."""
    try:
        yield
    except errors as error:
        sys.exit(f"error: {error}")


def check_options(options: argparse.Namespace, *, lists: Sequence[str] = (), positive: Sequence[str]) -> None:
    """Raises ``ValueError`` for a list with repetitions, or a number below 1."""
    for name in lists:
        values = getattr(options, name)
        if repeated := sorted({str(value) for value in values if values.count(value) > 1}):
            raise ValueError(f"--{name} has {', '.join(repeated)} more than once")
    for name in positive:
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)} must be at least 1")


def demo_training() -> dict[str, object]:
    """Reads the trainer's options of the demo's recipe."""
    import yaml

    recipe = yaml.safe_load(DEMO_RECIPE.read_text())
    return {k: v for k, v in recipe.items() if k not in ("model_name_or_path", "dataset", "eval_size", "output_dir")}


def parse(kinds: Sequence[Any], arguments: Sequence[str], prog: str, **defaults: Any) -> list[Any]:
    """Parses a command line, and the YAML file of its ``--config``, into dataclasses by TRL's parser.

    Args:
        kinds: the dataclasses.
        prog: the script's name, for its help.
        defaults: of options, in place of the dataclasses'.

    Raises:
        ValueError: what is wrong, in one line: an unknown option, a missing file, a value of another type.
    """
    from trl import TrlParser

    class Parser(TrlParser):
        def error(self, message):
            raise ValueError(message)  # without a thousand lines of usage before it

    if "--config" in arguments:
        recipe = arguments[arguments.index("--config") + 1 :][:1]
        if not recipe or not os.path.isfile(recipe[0]):
            raise ValueError(f"--config {' '.join(recipe)}: no such file")
    parser = Parser(kinds, prog=prog)
    parser.set_defaults(**defaults)
    *parsed, left_over = parser.parse_args_and_config(args=list(arguments), return_remaining_strings=True)
    if left_over:
        raise ValueError(unknown_option(left_over, kinds))
    return parsed
