"""Links to other devices as one device measured them, as they travel in its record. Pure."""

from collections.abc import Callable
from typing import Any, Final, NamedTuple

from coeld.errors import FrameError
from coeld.ids import NodeId
from coeld.json_values import integer

LINKS_MAX: Final = 64
RTT_US_MAX: Final = 60_000_000
MB_PER_S_MAX: Final = 1_000_000


class MeasuredLink(NamedTuple):
    """From this device to another, as calls to it find it."""

    node: NodeId
    rtt_us: int
    """Median of what small calls take beyond computing and payload: network, wake-ups, packing."""
    rtt_p99_us: int
    mb_per_s: int
    """Of large transfers; 0: none was limited by the link yet."""


def links_from_json(rows: list[Any], node: Callable[[Any], NodeId]) -> tuple[MeasuredLink, ...]:
    """Rows [node, rtt, p99, rate], ascending; `node` checks an id. Raises FrameError."""
    found: list[MeasuredLink] = []
    for row in rows:
        if not isinstance(row, list) or len(row) != 4:
            raise FrameError("a link is not [node, rtt, p99, rate]: message ignored")
        rtt_us = integer(row[1], "rtt", RTT_US_MAX, least=1)
        p99_us = integer(row[2], "p99", RTT_US_MAX, least=rtt_us)
        rate = integer(row[3], "rate", MB_PER_S_MAX, least=1)
        found.append(MeasuredLink(node(row[0]), rtt_us, p99_us, rate))
        if len(found) > 1 and found[-2].node >= found[-1].node:
            raise FrameError("links of a record are not ascending: message ignored")
    return tuple(found)
