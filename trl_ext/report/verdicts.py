"""Runs every signature on a run: what is wrong, since when, how sure, and what to do.

Three levels. *critical*: nothing is learned, or what was learned is being lost; the run is better stopped. *warning*:
something is wrong that costs. *advice*: something could be had. A healthy run (fresh prompts, a live share of at least
``signatures.rollouts.HEALTHY_LIVE``) gets nothing above advice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .read_run import Run
from .signatures import SIGNATURES, Finding, Unknown

LEVELS = ("critical", "warning", "advice")


@dataclass(frozen=True, kw_only=True)
class Verdict(Finding):
    """What a signature found, with its ``name`` and a ``title`` for people."""

    name: str
    title: str


@dataclass(frozen=True)
class Diagnosis:
    """``verdicts``, the gravest first; ``unknown``: signature -> what isn't logged; ``clear``: what was looked at and
    not found."""

    verdicts: list[Verdict]
    unknown: dict[str, str]
    clear: list[str]

    @property
    def worst(self) -> str | None:
        """The gravest level, None where nothing was found."""
        return self.verdicts[0].level if self.verdicts else None


def diagnose(run: Run) -> Diagnosis:
    """Runs every signature. One that raises is listed as unknown, with its error."""
    verdicts, unknown, clear = [], {}, []
    for name, signature in SIGNATURES.items():
        try:
            found = signature.find(run)
        except Exception as error:  # the other signatures still run
            found = Unknown(f"it can't be told of these numbers ({type(error).__name__}: {error})")
        if isinstance(found, Unknown):
            unknown[name] = found.reason
        elif found is None:
            clear.append(name)
        else:
            found = replace(found, confidence=round(min(found.confidence, 0.99), 2))
            verdicts.append(Verdict(**vars(found), name=name, title=signature.title))
    superseded = {other for one in verdicts for other in SIGNATURES[one.name].explains}
    verdicts = [one for one in verdicts if one.name not in superseded]
    verdicts.sort(key=lambda one: (LEVELS.index(one.level), one.onset))
    return Diagnosis(verdicts, unknown, clear)
