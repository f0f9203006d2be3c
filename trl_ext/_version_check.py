"""Checks at import that the installed TRL is a version whose internals this package overrides."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

SUPPORTED_TRL = ("1.15", "1.16")
INSTALL = "pip install 'trl>=1.15,<1.17'"


def check_trl_version(installed: str | None = None) -> None:
    """Raises ``ImportError`` unless ``installed`` (default: the installed version) is one of ``SUPPORTED_TRL``."""
    supported = " or ".join(f"{release}.x" for release in SUPPORTED_TRL)
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
