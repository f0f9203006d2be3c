"""Stops at import on a TRL whose internals are not the ones this package overrides."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

SUPPORTED_TRL = ("1.15", "1.16")
INSTALL = "pip install 'trl>=1.15,<1.17'"


def check_trl_version(installed: str | None = None) -> None:
    """Raises ``ImportError`` unless one of ``SUPPORTED_TRL`` is installed (``installed`` overrides what is found)."""
    supported = " or ".join(f"{one}.x" for one in SUPPORTED_TRL)
    if installed is None:
        try:
            installed = version("trl")
        except PackageNotFoundError:
            raise ImportError(f"trl_ext needs TRL {supported}: {INSTALL}") from None
    if ".".join(installed.split(".")[:2]) not in SUPPORTED_TRL:
        raise ImportError(
            f"trl_ext overrides internals of TRL {supported}, and TRL {installed} is installed: "
            f"{INSTALL}, or a release of curvature-grpo made for TRL {installed}"
        )
