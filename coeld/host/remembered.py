"""Measurements that are remembered on disk under everything they depend on.

A file that is damaged, or was made under other conditions, is as good as none. Writing is whole or
not at all; a disk that is full costs a measurement at the next start and nothing else.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any, Final

FILE_BYTES_MAX: Final = 64 * 1024


def recall(path: Path, depends_on: dict[str, Any]) -> Any:
    """What was remembered under the same conditions, unchecked; None: nothing."""
    try:
        with path.open("rb") as file:
            value = json.loads(file.read(FILE_BYTES_MAX))
        return value["value"] if value["depends_on"] == depends_on else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remember(path: Path, depends_on: dict[str, Any], value: Any) -> None:
    """Replace what was remembered there."""
    text = json.dumps({"depends_on": depends_on, "value": value})
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}")
    except OSError:
        return
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        Path(name).replace(path)
    except OSError:
        Path(name).unlink(missing_ok=True)
