"""Versions of a model, as records tell of them. Pure.

A version is an integer in the manifest, hashed with it, one above what it replaced when it was
imported; versions of the same number (two devices imported by themselves) are ordered by hash. So
every device finds the same one newest, and none can be made newer afterwards. Which model a
version belongs to is told by its name: hashes do not say.
"""

from collections.abc import Callable
from enum import IntEnum
from typing import Any, Final, NamedTuple

from coeld.errors import FrameError
from coeld.ids import ModelHash
from coeld.json_values import integer

VERSION_MAX: Final = 2**31 - 1


class Release(NamedTuple):
    """One version of a model; compares by version, then by hash."""

    version: int
    model: ModelHash


class Progress(IntEnum):
    """How far a device is on its way to the next version."""

    FETCHING = 0
    READY = 1
    """On its disk is all that it needs to open it and to hold what it holds now."""
    FAILED = 2
    """It cannot have it, for example for lack of disk; it goes on trying."""


class Phase(IntEnum):
    """What becomes of requests of the version that is open."""

    SERVING = 0
    DRAINING = 1
    """No more are admitted; some are under way."""
    DRAINED = 2
    """None of this device's is under way."""


class Versions(NamedTuple):
    """What a device says of versions: empty name, nothing was ever open."""

    name: str = ""
    version: int = 0
    """Of the model that is open, or was until it switches."""
    phase: Phase = Phase.SERVING
    next: Release | None = None
    """The newest that it knows of, where it has an older one open."""
    progress: Progress = Progress.FETCHING
    """Towards `next`."""

    def to_json(self) -> list[Any]:
        """[name, version, phase], and for a next version [version, hash, progress]."""
        value: list[Any] = [self.name, self.version, int(self.phase)]
        return [*value, [*self.next, int(self.progress)]] if self.next else value


NO_VERSIONS: Final = Versions()


def versions_from_json(
    row: Any, name: Callable[[Any], str], hashed: Callable[[Any], str]
) -> Versions:
    """The inverse of `to_json`; `name` and `hashed` check these texts. Raises FrameError."""
    if not isinstance(row, list) or not 3 <= len(row) <= 4:
        raise FrameError("versions are not [name, version, phase, next]: message ignored")
    found = Versions(
        name(row[0]),
        integer(row[1], "version", VERSION_MAX),
        Phase(integer(row[2], "phase", max(Phase))),
    )
    if len(row) == 3:
        return found
    if not isinstance(row[3], list) or len(row[3]) != 3:
        raise FrameError("a next version is not [version, hash, progress]: message ignored")
    version, model, progress = row[3]
    return found._replace(
        next=Release(integer(version, "version", VERSION_MAX), ModelHash(hashed(model))),
        progress=Progress(integer(progress, "progress", max(Progress))),
    )
