"""The disk that holds the models: what is free, and how fast it reads.

Reading is measured once per disk and remembered: up to 64 MB, or a quarter of a second, of the
largest file that is there, past the page cache (O_DIRECT; where a file system refuses that, after
telling the kernel to forget the file). Without a file worth measuring nothing is known.
"""

import errno
import mmap
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from coeld.host.remembered import recall, remember
from coeld.model.store import free_bytes

MEASURE_BYTES_MAX: Final = 64_000_000
MEASURE_S: Final = 0.25
FILE_BYTES_MIN: Final = 1 << 20
CHUNK_BYTES: Final = 4 << 20
"""Read at once, as the engine's loader does in effect; a multiple of any disk's block."""
FILES_MAX: Final = 100_000
SPEED_MAX: Final = 10**6


class Disk:
    """One store's disk. `measure` blocks for a moment; the rest is quick."""

    def __init__(self, store_dir: Path, cache: Path) -> None:
        self._store_dir, self._cache = store_dir, cache
        self.read_mb_per_s = 0
        """0: not known."""

    @property
    def free_bytes(self) -> int:
        return free_bytes(self._store_dir)

    def measure(self) -> None:
        """Take what was measured before on this disk, or measure it."""
        try:
            depends_on = {"disk": _identity(self._store_dir)}
            known = recall(self._cache, depends_on)
            if type(known) is int and 0 < known <= SPEED_MAX:
                self.read_mb_per_s = known
            elif file := _largest(self._store_dir):
                self.read_mb_per_s = measured_mb_per_s(file)
                remember(self._cache, depends_on, self.read_mb_per_s)
        except OSError:
            return  # no store yet, or a disk that fails: whoever needs it will say so


def measured_mb_per_s(file: Path) -> int:
    """Megabytes (10^6 bytes) per second, at least 1. Raises OSError."""
    total, began = 0, time.perf_counter()
    for count in _chunks(file):
        total += count
        if total >= MEASURE_BYTES_MAX or time.perf_counter() - began >= MEASURE_S:
            break
    return max(1, int(total / (time.perf_counter() - began) / 1e6))


def _chunks(file: Path) -> Iterator[int]:
    """Reads the file past the page cache, yielding how much at a time."""
    try:
        fd = os.open(file, os.O_RDONLY | os.O_DIRECT)
    except OSError as exc:
        if exc.errno != errno.EINVAL:
            raise
        fd = os.open(file, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    buffer = mmap.mmap(-1, CHUNK_BYTES)  # O_DIRECT wants aligned memory
    try:
        while count := os.readv(fd, [buffer]):
            yield count
            if count % mmap.PAGESIZE:
                return  # the end of the file, which is no multiple of a block
    finally:
        buffer.close()
        os.close(fd)


def _largest(store_dir: Path) -> Path | None:
    """The largest blob that is worth measuring."""
    sizes = []
    with os.scandir(store_dir / "blobs") as entries:
        for number, entry in enumerate(entries):
            if entry.is_file(follow_symlinks=False) and number < FILES_MAX:
                sizes.append((entry.stat().st_size, entry.path))
    size, path = max(sizes, default=(0, ""))
    return Path(path) if size >= FILE_BYTES_MIN else None


def _identity(store_dir: Path) -> str:
    """Something that changes when the store moves to another disk."""
    stat = os.statvfs(store_dir)
    return f"{store_dir.stat().st_dev}/{stat.f_fsid}/{stat.f_blocks}"
