"""Reading the one-line files in which a Linux kernel says what a machine is and does.

All sensors take a root directory, so that tests can hand them recorded trees; a file that is not
there, or holds something else than expected, reads as nothing.
"""

from pathlib import Path
from typing import Final

ROOT: Final = Path("/")
FILE_BYTES_MAX: Final = 64 * 1024


def text(path: Path) -> str:
    """A small file's text without the end of its line; "" if it is not there."""
    try:
        with path.open("rb") as file:
            return file.read(FILE_BYTES_MAX).decode(errors="replace").strip("\0\n ")
    except OSError:
        return ""


def number(path: Path, unknown: int = 0) -> int:
    """A file that holds one whole number; `unknown` if it is not there or holds something else."""
    try:
        return int(text(path))
    except ValueError:
        return unknown
