"""Loading on more than one core: reading, checking and compiling of several layers side by side.

ONNX Runtime compiles a graph on one core, most of it page faults and repacking, and sha256 runs on
one too. Two at a time keep two cores and the disk busy; more would need more memory at once.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

AT_ONCE: Final = 2
"""Pieces of work under way."""


def side_by_side(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """work(item) of every item, in order. What `work` raises is raised in its turn, and no further
    item is begun then."""
    with ThreadPoolExecutor(AT_ONCE, "engine.loading") as pool:
        pending = [pool.submit(work, item) for item in items]
        try:
            for future in pending:
                yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
