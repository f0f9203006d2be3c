"""Counts the words of README and docs, and lists sentences above 35 words: ``make words``.

All text of a page counts, code and tables too, but for the pages of architectures and versions and the glossary's
rows.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
GENERATED = {"architectures.md", "versions.md"}  # by tests/architecture_sweep.py, .ci/versions.py
MOST_IN_ALL, MOST_ON_A_PAGE, MOST_IN_A_SENTENCE = 16_000, 1_200, 35


def words(page: Path) -> int:
    """Words of a page, of the glossary without its rows."""
    text = page.read_text()
    if page.name == "glossary.md":
        text = re.sub(r"^\|.*\n", "", text, flags=re.M)
    return len(text.split())


def counts() -> dict[str, int]:
    """Page of the docs -> its words, for those that count."""
    return {page.name: words(page) for page in sorted(DOCS.glob("*.md")) if page.name not in GENERATED}


def sentences(page: Path) -> list[str]:
    """A page's sentences, without code, tables and headings; an item of a list ends one."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    text = re.sub(r"<!--.*?-->|^(\||#|:::|!\[|    ).*$", "", text, flags=re.M)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    paragraphs = re.split(r"\n\s*\n|\n(?=\s*(?:[*-]|\d+\.) )", text)
    joined = (" ".join(part.split()) for part in paragraphs)
    return [one for part in joined for one in re.split(r"(?<=[.!?])\)?\s+(?=[A-Z`*(\[\"])", part) if one]


def too_long(page: Path) -> list[str]:
    """A page's sentences above the limit."""
    return [one for one in sentences(page) if len(re.findall(r"[^\s]*\w[^\s]*", one)) > MOST_IN_A_SENTENCE]


def main() -> None:
    counted = counts()
    for name, number in sorted(counted.items(), key=lambda item: -item[1]):
        print(f"{number:6,}  docs/{name}")
    total, readme = sum(counted.values()), ROOT / "README.md"
    print(f"{total:6,}  in all (at most {MOST_IN_ALL:,}); README.md {words(readme):,}")
    for page in [readme, *(DOCS / name for name in counted)]:
        for one in too_long(page):
            print(f"\n{page.relative_to(ROOT)}: {len(one.split())} words\n  {one}")
    pages = [name for name, number in counted.items() if number > MOST_ON_A_PAGE]
    if pages or total > MOST_IN_ALL:
        sys.exit(f"\ntoo long: {', '.join(pages) or 'the docs together'}")


if __name__ == "__main__":
    main()
