"""Topics of the control plane, and the calling card that is every device's last will. Pure.

    coeld/1/<swarm>/all/<sender>             to everybody who listens
    coeld/1/<swarm>/to/<receiver>/<sender>   to one device
    coeld/1/<swarm>/will/<node>              that device's connection to this broker broke

A broker shows the last will of a device to others only when it has gone; the embedded broker also
reads it when the device comes, and so learns where to listen to it: that is how a device which
nobody has heard of makes itself known to its first neighbour.
"""

import json
import re
from dataclasses import dataclass
from typing import Final

from coeld.errors import FrameError
from coeld.ids import NodeId

CARD_BYTES_MAX: Final = 512
NODE_ID: Final = re.compile(r"[0-9a-f]{16}\Z")
HOST: Final = re.compile(r"[A-Za-z0-9._:%-]{0,253}\Z")


@dataclass(frozen=True, slots=True)
class Topics:
    """The topics of one swarm."""

    swarm: str

    @property
    def base(self) -> str:
        return f"coeld/1/{self.swarm}/"

    def everybody(self, sender: str) -> str:
        return f"{self.base}all/{sender}"

    def one(self, receiver: str, sender: str) -> str:
        return f"{self.base}to/{receiver}/{sender}"

    def will(self, node: str) -> str:
        return f"{self.base}will/{node}"

    def subscriptions(self, me: str) -> tuple[str, ...]:
        return f"{self.base}all/+", self.one(me, "+"), f"{self.base}will/+"

    def is_ours(self, topic: str) -> bool:
        """Whether a topic or filter stays within this swarm."""
        return topic.startswith(self.base)

    def parse(self, topic: str, me: str) -> tuple[str, NodeId]:
        """A received topic to ("message" | "will", sender). Raises FrameError."""
        kind, _, rest = topic.removeprefix(self.base).partition("/")
        if kind == "to" and rest.startswith(f"{me}/"):
            rest = rest.removeprefix(f"{me}/")
        elif kind not in ("all", "will"):
            raise FrameError(f"a topic that is not for this device: {topic[:80]!r}")
        if not self.is_ours(topic) or not NODE_ID.match(rest):
            raise FrameError(f"a topic that names no sender: {topic[:80]!r}")
        return ("will" if kind == "will" else "message"), NodeId(rest)


def client_id(node: NodeId, link: int) -> str:
    """Unlike for each link, so that two links to one broker do not take each other's place."""
    return f"{node}-{link}"


def node_of_client(client: str) -> NodeId | None:
    """The inverse of `client_id`; None for somebody else's client."""
    node, dash, _ = client.partition("-")
    return NodeId(node) if dash and NODE_ID.match(node) else None


@dataclass(frozen=True, slots=True)
class Card:
    """Who a device is, and where its broker listens (port 0: it has none)."""

    node: NodeId
    incarnation: int
    mqtt_host: str = ""
    mqtt_port: int = 0

    def encode(self) -> bytes:
        value = {
            "node": self.node,
            "incarnation": self.incarnation,
            "mqtt": [self.mqtt_host, self.mqtt_port],
        }
        return json.dumps(value).encode()

    @staticmethod
    def decode(data: bytes) -> "Card":
        """Raises FrameError."""
        if len(data) > CARD_BYTES_MAX:
            raise FrameError(f"a calling card of {len(data)} bytes")
        try:
            value = json.loads(data)
            node, incarnation = value["node"], value["incarnation"]
            host, port = value["mqtt"]
            if not NODE_ID.match(node) or not HOST.match(host):
                raise ValueError("malformed node or host")
            if type(incarnation) is not int or type(port) is not int:
                raise ValueError("malformed number")
            if incarnation < 0 or not 0 <= port <= 65535:
                raise ValueError("number out of range")
        except (ValueError, KeyError, TypeError, RecursionError) as exc:
            raise FrameError(f"a malformed calling card: {exc!r}") from exc
        return Card(NodeId(node), incarnation, host, port)
