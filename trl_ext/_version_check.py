"""Stops at import on a TRL whose internals are not the ones this package overrides."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

SUPPORTED_TRL = "1.16"


def check_trl_version(installed: str | None = None) -> None:
    """Raises ``ImportError`` unless TRL ``SUPPORTED_TRL``.x is installed (``installed`` overrides what is found)."""
    if installed is None:
        try:
            installed = version("trl")
        except PackageNotFoundError:
            raise ImportError(f"trl_ext needs TRL {SUPPORTED_TRL}.x: pip install 'trl=={SUPPORTED_TRL}.*'") from None
    if installed.split(".")[:2] != SUPPORTED_TRL.split("."):
        raise ImportError(
            f"trl_ext overrides internals of TRL {SUPPORTED_TRL}.x, and TRL {installed} is installed: "
            f"pip install 'trl=={SUPPORTED_TRL}.*', or a release of curvature-grpo made for TRL {installed}"
        )
