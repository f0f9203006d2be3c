"""Fails where git tracks what doesn't belong in a repository: archives, and files above 1 MB."""

import subprocess
import sys
from pathlib import Path

ARCHIVES = {".7z", ".bz2", ".egg", ".gz", ".rar", ".tar", ".tgz", ".whl", ".xz", ".zip", ".zst"}
MOST_BYTES = 1_000_000


def wrong(path: Path) -> str | None:
    """What is wrong with tracking this file, or None."""
    if path.suffix.lower() in ARCHIVES:
        return "an archive"
    if path.is_file() and not path.is_symlink() and path.stat().st_size > MOST_BYTES:
        return f"{path.stat().st_size / 1e6:.1f} MB"
    return None


def main() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], check=True, capture_output=True, text=True).stdout
    found = [f"{name}: {why}" for name in filter(None, listed.split("\0")) if (why := wrong(Path(name)))]
    if found:
        sys.exit("tracked by git, and shouldn't be:\n" + "\n".join(found))


if __name__ == "__main__":
    main()
