"""Checks at import that the installed TRL isn't older than the oldest version with which this package works.

A newer version is never refused: ``capabilities.py`` finds out what works with it.
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

# the versions with which `make test-trl` passed: docs/versions.md
TESTED_TRL = ("1.10.0", "1.15.0", "1.16.0")
OLDEST = (1, 10)
INSTALL = "pip install 'trl>=1.10'"


def check_trl_version(installed: str | None = None) -> None:
    """Raises ``ImportError`` if ``installed`` (default: the installed version) is older than ``OLDEST``, or missing."""
    if installed is None:
        try:
            installed = version("trl")
        except PackageNotFoundError:
            raise ImportError(f"trl_ext needs TRL: {INSTALL}") from None
    numbers = tuple(int(number) for number in re.findall(r"\d+", installed)[:2])
    if numbers < OLDEST:
        raise ImportError(
            f"trl_ext works with TRL {'.'.join(map(str, OLDEST))} and newer, "
            f"and TRL {installed} is installed: {INSTALL}"
        )
