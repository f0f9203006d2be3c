"""The documentation's pages, for tests that read them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def blocks(page: Path, language: str) -> list[str]:
    """Its fenced blocks of code in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)
