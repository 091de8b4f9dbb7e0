"""The control bus: node messages over MQTT, on either of two topologies.

One rule covers both, alone or together: publish on your home brokers, subscribe on the brokers you
listen to. Embedded: home is the broker inside this process, and one listens at the brokers of one's
neighbours. External: home and listened-to are the configured brokers, all of them at once, instead
of one after the other: then devices that reach different ones still meet, and nobody waits for a
broker that has died. A message may then arrive several times: see coeld.net.repeats.

A broken connection to a neighbour's broker, a neighbour leaving ours, and a last will all become
NeighbourLost: a reason to suspect, which the node weighs.
"""

import asyncio
import itertools
import logging
import ssl
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, Final

from coeld.config import Broker
from coeld.errors import FrameError, StartError
from coeld.events import BrokersReached, Event, MessageReceived, NeighbourLost
from coeld.ids import NodeId
from coeld.messages import Message, decode, encode
from coeld.net.mqtt_broker import EmbeddedBroker
from coeld.net.mqtt_link import Link
from coeld.net.mqtt_topics import Card, Topics, node_of_client
from coeld.net.repeats import LOOP_COPIES, Repeats

LINKS_MAX: Final = 64
GIVE_UP_S: Final = 30.0
"""That a neighbour which is no seed may be unreachable before its link is forgotten."""
LONELY_S: Final = 5.0
"""Between two looks whether anybody is heard at all."""
COMPLAIN_S: Final = 60.0
"""Between two log lines about malformed messages."""
PEERS_COUNTED_MAX: Final = 32

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BusOptions:
    """Where to listen, and whom to ask first."""

    swarm: str
    me: NodeId
    incarnation: int
    host: str
    port: int
    seeds: tuple[tuple[str, int], ...]
    brokers: tuple[Broker, ...] = ()
    brokers_ca: str = ""
    """A file of certificates; empty: the system's."""
    embedded: bool = True
    """Run a broker in this process."""


class ControlBus:
    """`start`, then `run` in a task; `publish`, `send` and `connect` while it runs."""

    def __init__(self, options: BusOptions, deliver: Callable[[Event], None], rng: Random) -> None:
        self._options, self._deliver, self._rng = options, deliver, rng
        self._topics = Topics(options.swarm)
        self._broker: EmbeddedBroker | None = None
        self._group: asyncio.TaskGroup | None = None
        self._links: dict[tuple[str, int], Link] = {}
        self._tasks: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._numbers = itertools.count()
        self._complained_at = self._looped_at = -COMPLAIN_S
        self._repeats = Repeats()
        self._tls: ssl.SSLContext | None = None
        self._reached = True
        self._clock = asyncio.get_running_loop().time
        self.malformed: Counter[str] = Counter()
        """Messages that were no messages, by who sent them."""

    @property
    def port(self) -> int:
        """Of the embedded broker; 0 without one."""
        return self._broker.port if self._broker else 0

    async def start(self) -> None:
        """Open the embedded broker. Raises StartError."""
        if any(broker.tls for broker in self._options.brokers):
            self._tls = _trusting(self._options.brokers_ca)
        if self._options.embedded:
            broker = EmbeddedBroker(
                self._options.host, self._options.port, self._topics, self._met, self._left
            )
            await broker.start()
            self._broker = broker

    async def run(self) -> None:
        """Keep all links up until cancelled; then close everything."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                for broker in self._options.brokers:
                    self._listen_at(broker[:2], give_up_s=None, external=broker)
                while True:  # seeds are an introduction: come back to them when nobody is heard
                    if self._broker and not any(
                        link.up and link.external is None for link in self._links.values()
                    ):
                        for address in self._options.seeds:
                            self._listen_at(address, give_up_s=None)
                    await asyncio.sleep(LONELY_S)
        finally:
            self._group = None
            if self._broker:
                await self._broker.stop()

    async def publish(self, message: Message) -> None:
        await self._post(self._topics.everybody(self._options.me), encode(message))

    async def send(self, to: NodeId, message: Message) -> None:
        await self._post(self._topics.one(to, self._options.me), encode(message))

    def connect(self, node: NodeId, host: str, port: int) -> None:
        """Listen to this neighbour's broker too; no effect if one does, or has none oneself."""
        if not self._broker or node == self._options.me or not (host and port):
            return
        if any(link.node == node and link.up for link in self._links.values()):
            return
        self._listen_at((host, port), give_up_s=GIVE_UP_S)

    def disconnect(self, node: NodeId) -> None:
        """Listen to this neighbour's broker no more."""
        for address, link in self._links.items():
            if link.node == node:
                self._tasks[address].cancel()

    def status(self) -> dict[str, Any]:
        """For `coeld status`."""
        return {
            "topology": " and ".join(
                ["embedded"] * self._options.embedded + ["external"] * bool(self._options.brokers)
            ),
            "broker_port": self.port,
            "broker_clients": self._broker.clients if self._broker else 0,
            "broker_refused": self._broker.refused if self._broker else 0,
            "malformed": dict(self.malformed),
            "repeated": self._repeats.dropped,
            "links": [
                {
                    "host": link.address[0],
                    "port": link.address[1],
                    "node": link.node,
                    "up": link.up,
                    "messages": link.messages,
                    "dropped": link.dropped,
                    "external": link.external is not None,
                }
                for link in self._links.values()
            ],
        }

    # Inside

    def _listen_at(
        self, address: tuple[str, int], give_up_s: float | None, external: Broker | None = None
    ) -> None:
        if address in self._links or self._group is None:
            return
        if len(self._links) >= LINKS_MAX:
            log.debug("not listening at %s:%s: %d links are enough", *address, LINKS_MAX)
            return
        own = (self._options.host, self.port) if self._broker else ("", 0)
        if address == own:
            return
        card = Card(self._options.me, self._options.incarnation, *own)
        number = next(self._numbers)
        calls = self._receive, self._changed
        link = Link(number, address, self._topics, card, *calls, self._rng, external, self._tls)
        self._links[address] = link
        self._tasks[address] = self._group.create_task(
            self._keep(link, give_up_s), name=f"mqtt-link-{number}"
        )

    async def _keep(self, link: Link, give_up_s: float | None) -> None:
        try:
            await link.run(give_up_s)
        finally:
            del self._links[link.address], self._tasks[link.address]

    async def _post(self, topic: str, payload: bytes) -> None:
        if self._broker:
            await self._broker.publish(topic, payload)
        for broker in self._options.brokers:
            if link := self._links.get(broker[:2]):
                await link.publish(topic, payload)

    def _receive(self, link: Link, topic: str, payload: bytes) -> None:
        sender = "unknown"
        if self._options.brokers and (copies := self._repeats.seen(topic, payload, self._clock())):
            self._suspect_loop(copies)
            return
        try:
            kind, sender = self._topics.parse(topic, self._options.me)
            if sender == self._options.me:
                return
            if kind == "will":
                if Card.decode(payload).node != sender:
                    raise FrameError("the last will of somebody else")
                self._deliver(NeighbourLost(NodeId(sender)))
                return
            message = decode(payload)
            if message.sender != sender or message.swarm != self._options.swarm:
                raise FrameError("sender or swarm contradict the topic")
        except FrameError as exc:
            self._count_malformed(sender, exc)
            return
        if link.external is None and link.node != sender:
            self._learn(link, NodeId(sender))
        self._deliver(MessageReceived(NodeId(sender), message))

    def _learn(self, link: Link, node: NodeId) -> None:
        """Now we know whose broker that is; of two links to one device the newer one ends."""
        link.node = node
        twins = [one for one in self._links.values() if one.node == node and one.up]
        for twin in sorted(twins, key=lambda one: one.number)[1:]:
            twin.node = None
            if twin.address not in self._options.seeds:
                self._tasks[twin.address].cancel()

    def _count_malformed(self, sender: str, exc: FrameError) -> None:
        known = sender in self.malformed or len(self.malformed) < PEERS_COUNTED_MAX
        self.malformed[sender if known else "others"] += 1
        now = self._clock()
        if now - self._complained_at >= COMPLAIN_S:
            self._complained_at = now
            log.warning("ignored a malformed message from %s: %s", sender, exc)

    def _suspect_loop(self, copies: int) -> None:
        if copies >= LOOP_COPIES and self._clock() - self._looped_at >= COMPLAIN_S:
            self._looped_at = self._clock()
            log.warning(
                "a message came back %d times within a moment: do bridges between your brokers form"
                " a loop? Of two brokers only one may bridge to the other, of several no circle",
                copies,
            )

    def _changed(self, link: Link) -> None:
        """A link came up or went down."""
        if link.external:
            reached = any(one.up and one.external for one in self._links.values())
            if not self._broker and reached != self._reached:
                self._reached = reached
                self._deliver(BrokersReached(reached))
        elif link.node and not link.up:
            self._deliver(NeighbourLost(NodeId(link.node)))
            link.node = None

    def _met(self, card: Card) -> None:
        """A device connected to our broker: listen to its broker in turn."""
        self.connect(card.node, card.mqtt_host, card.mqtt_port)

    def _left(self, client: str) -> None:
        node = node_of_client(client)  # None: a person with mosquitto_sub
        if node and node != self._options.me:
            self._deliver(NeighbourLost(node))


def _trusting(ca_file: str) -> ssl.SSLContext:
    """TLS that checks the broker's certificate and name. Raises StartError."""
    try:
        return ssl.create_default_context(cafile=ca_file or None)
    except OSError as exc:  # ssl.SSLError too: no certificate in it
        raise StartError(
            f"swarm.brokers_ca = {ca_file!r} cannot be used: {exc.strerror or exc}. Name a file "
            "with the certificate (PEM) that your brokers' certificates are signed with."
        ) from exc
