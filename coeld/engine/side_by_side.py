"""Loading on more than one core: reading and checking in order, compiling side by side behind it.

One thread reads and hashes everything in order, so the disk is read in one go and never waits for
a compiler. ONNX Runtime compiles a graph on one core, most of it page faults and repacking; two at
a time keep two cores busy, and more would need more memory at once.

While answers stream, these threads give way: they are nicer than the decoder, and only one
compiles. Nobody but root may become less nice again, so a thread is nice to its end.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

AT_ONCE: Final = 2
"""Items that are worked on."""
NICENESS: Final = 10
"""Above the engine's own, of threads that give way: a tenth of a core that others want too."""
AHEAD: Final = 3
"""Items that are checked and not done: what was read should still be in the page cache."""


def never() -> bool:
    """Nobody is in the way of."""
    return False


def side_by_side(
    check: Callable[[Item], None],
    work: Callable[[Item], Result],
    items: Iterable[Item],
    gently: Callable[[], bool] = never,
) -> Iterator[Result]:
    """check(item) of every item, one after the other, and work(item) of those checked; the results
    in order. What either raises is raised in its turn, and no further item is begun then.

    `gently` is asked before each item: whether to give way to others from now on.
    """
    room, stopped = threading.Semaphore(AHEAD), threading.Event()

    def checked(item: Item) -> None:
        room.acquire()
        if gently():
            _give_way()
        if not stopped.is_set():
            check(item)

    def done(item: Item, ready: Future[None]) -> Result:
        ready.result()
        if gently():
            _give_way()
        try:
            return work(item)
        finally:
            room.release()

    with (
        ThreadPoolExecutor(1, "engine.reading") as reader,
        ThreadPoolExecutor(1 if gently() else AT_ONCE, "engine.loading") as pool,
    ):
        pending = [pool.submit(done, item, reader.submit(checked, item)) for item in items]
        try:
            for future in pending:
                yield future.result()
        finally:
            stopped.set()
            room.release(len(pending) + 1)
            reader.shutdown(wait=True, cancel_futures=True)
            pool.shutdown(wait=True, cancel_futures=True)


def _give_way() -> None:
    """Make this thread nicer than the process."""
    nice = os.getpriority(os.PRIO_PROCESS, os.getpid()) + NICENESS
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(nice, 19))
