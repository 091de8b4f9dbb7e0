"""Values of JSON that came from outside: of the right type, bounded, or a FrameError. Pure."""

import re
from collections.abc import Iterable
from typing import Any, Final

from coeld.errors import FrameError
from coeld.ids import NodeId

HOST_CHARS_MAX: Final = 253

_NODE_ID = re.compile(r"[0-9a-f]{16}\Z")
_HOST = re.compile(r"[A-Za-z0-9._:%\-]*\Z")


def integer(value: Any, what: str, most: int, least: int = 0) -> int:
    """`value`, if it is an integer within these bounds. Raises FrameError."""
    if type(value) is not int or not least <= value <= most:
        raise FrameError(f"{what}={str(value)[:24]!r} is not an integer in {least}..{most}")
    return value


def text(value: dict[str, Any], key: str, chars_max: int) -> str:
    found = value.get(key)
    if not isinstance(found, str) or len(found) > chars_max or not found.isprintable():
        raise FrameError(f"{key} is not printable text of at most {chars_max} characters")
    return found


def matching(value: Any, pattern: re.Pattern[str], what: str) -> str:
    if not isinstance(value, str) or not pattern.match(value):
        raise FrameError(f"{what}={str(value)[:24]!r} is malformed: message ignored")
    return value


def node(value: Any) -> NodeId:
    return NodeId(matching(value, _NODE_ID, "node id"))


def items(value: dict[str, Any], key: str, most: int) -> list[Any]:
    found = value.get(key)
    if not isinstance(found, list) or len(found) > most:
        raise FrameError(f"{key} is not a list of at most {most} items: message ignored")
    return found


def address(value: dict[str, Any], key: str) -> tuple[str, int]:
    pair = items(value, key, 2)
    if len(pair) != 2 or not isinstance(pair[0], str) or len(pair[0]) > HOST_CHARS_MAX:
        raise FrameError(f"{key} is not [host, port]: message ignored")
    return matching(pair[0], _HOST, f"{key} host"), integer(pair[1], f"{key} port", 65535)


def distinct(nodes: Iterable[NodeId], what: str) -> None:
    seen: set[NodeId] = set()
    for each in nodes:
        if each in seen:
            raise FrameError(f"{what} names {each} twice: message ignored")
        seen.add(each)
