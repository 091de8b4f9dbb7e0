"""Work done one step ahead: the next layer is read and checked while this one is compiled."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def ahead(work: Callable[[Item], None], items: Iterable[Item]) -> Iterator[None]:
    """Yields once per item, when `work` has finished it; the one after it is then under way.

    What `work` raises is raised here, in its turn.
    """
    todo = list(items)
    if not todo:
        return
    with ThreadPoolExecutor(1, "engine.ahead") as pool:
        pending = pool.submit(work, todo[0])
        for following in (*todo[1:], None):
            pending.result()
            if following is not None:
                pending = pool.submit(work, following)
            yield
