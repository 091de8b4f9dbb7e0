"""The embedded MQTT broker: amqtt behind our own listener, which lets in only what is needed.

Devices publish on their own broker, from inside the process, and listen at the brokers of their
neighbours. So a client here connects (with a last will), subscribes, pings, leaves; it never
publishes. The reader below parses nothing but the fixed header of each packet, and ends connections
that claim large packets, send other kinds, or go silent: amqtt itself would buffer 256 MB for
anyone, keep half-open connections for ever, and never tell that their clients are gone. The writer
never waits: a subscriber that does not read is cut off once its buffer is full, instead of
collecting one task per message.
"""

import asyncio
import logging
import os
import re
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from amqtt.adapters import ReaderAdapter, WriterAdapter
from amqtt.broker import Broker
from amqtt.contexts import Action, BaseContext
from amqtt.errors import AMQTTError, MQTTError, NoDataError
from amqtt.plugins.base import BaseAuthPlugin, BaseTopicPlugin
from amqtt.session import Session

from coeld.errors import FrameError, StartError
from coeld.net.mqtt_topics import Card, Topics, node_of_client

CLIENTS_MAX: Final = 64
PACKET_BYTES_MAX: Final = 4096
"""From a client. The largest we send is a CONNECT with a last will: about 100 bytes."""
SUBSCRIPTIONS_MAX: Final = 8
"""Per client. Ours make three."""
CONNECT_S: Final = 5.0
"""From the TCP connection to a complete CONNECT."""
IDLE_S: Final = 60.0
"""Without any packet, whatever keep-alive the client asked for."""
KEEP_ALIVE_GRACE_S: Final = 5
"""Added to a client's keep-alive before it counts as gone."""
UNREAD_BYTES_MAX: Final = 4 << 20
"""That a slow subscriber may leave in its buffer."""

CONNECT, SUBSCRIBE, UNSUBSCRIBE, PINGREQ, DISCONNECT = 1, 8, 10, 12, 14
ALLOWED_KINDS: Final = frozenset((CONNECT, SUBSCRIBE, UNSUBSCRIBE, PINGREQ, DISCONNECT))
CLIENT_ID: Final = re.compile(r"[0-9a-zA-Z_-]{1,64}\Z")

_PARSER_ERRORS: Final = (
    AMQTTError,
    MQTTError,
    NoDataError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    struct.error,
    OSError,
)
"""What amqtt raises on malformed packets; seen by fuzzing it."""

log = logging.getLogger(__name__)


class EmbeddedBroker:
    """Start it, publish on it, stop it.

    `met` gets the calling card (last will) of each device that connects, `lost` the client id of
    each client that has gone.
    """

    def __init__(
        self,
        host: str,
        port: int,
        topics: Topics,
        met: Callable[[Card], None],
        lost: Callable[[str], None],
    ) -> None:
        self._host, self._wanted_port = host, port
        self._rules = {"topics": topics, "met": met, "lost": lost}
        self._broker: Broker | None = None
        self._server: asyncio.Server | None = None
        self._writers: set[_Writer] = set()
        self.port = 0
        """That it listens on, once started."""
        self.refused = 0
        """Connections that broke a rule, since the start."""

    @property
    def clients(self) -> int:
        return len(self._writers)

    async def start(self) -> None:
        """Raises StartError when the address cannot be used."""
        for name in ("amqtt", "transitions"):  # they report every stray byte of every client
            logging.getLogger(name).setLevel(logging.CRITICAL)
        broker = Broker(
            {
                "listeners": {"default": {"type": "external"}},
                "plugins": {f"{__name__}.Rules": self._rules},
                "timeout_disconnect_delay": KEEP_ALIVE_GRACE_S,
            }
        )
        broker._subscriptions = _Subscriptions()
        await broker.start()
        self._broker = broker
        try:
            self._server = await asyncio.start_server(
                self._serve, self._host, self._wanted_port, limit=PACKET_BYTES_MAX * 2
            )
        except OSError as exc:
            await broker.shutdown()
            reason = os.strerror(exc.errno) if exc.errno else exc
            raise StartError(
                f"the MQTT broker cannot listen on {self._host}:{self._wanted_port}: {reason}. "
                "Another program may use that port: choose another network.mqtt_port (0 = any "
                "free one), or check network.host."
            ) from exc
        self.port = self._server.sockets[0].getsockname()[1]

    async def publish(self, topic: str, payload: bytes) -> None:
        """To all clients that subscribed; QoS 0."""
        assert self._broker is not None
        await self._broker.internal_message_broadcast(topic, payload, 0)

    async def stop(self) -> None:
        if self._server:
            self._server.close()
        for writer in list(self._writers):
            await writer.close()
        if self._broker:
            await self._broker.shutdown()
            self._broker = None

    async def _serve(self, stream: asyncio.StreamReader, out: asyncio.StreamWriter) -> None:
        """One client from connection to end."""
        assert self._broker is not None
        reader, writer = _Reader(stream), _Writer(out)
        if len(self._writers) >= CLIENTS_MAX:
            self.refused += 1
            out.transport.abort()
            return
        out.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._writers.add(writer)
        try:
            await self._broker.external_connected(reader, writer, "default")
        except _PARSER_ERRORS as exc:
            reader.broken = reader.broken or repr(exc)
        finally:
            self._writers.discard(writer)
            out.transport.abort()
            if reader.broken:
                self.refused += 1
                log.debug("closed an MQTT client: %s", reader.broken)


class _Subscriptions(dict[str, list[tuple[Session, int]]]):
    """Walked over as a snapshot: amqtt awaits between its steps while clients come and go.

    Without it a message that is being handed out when anybody subscribes or leaves is lost to the
    rest of its receivers, and a client that connects at that moment is cut off.
    """

    def __iter__(self) -> Iterator[str]:
        return iter(list(super().__iter__()))

    def items(self) -> Any:
        return [(name, list(subscribers)) for name, subscribers in super().items()]


class _Reader(ReaderAdapter):  # type: ignore[misc]
    """Hands amqtt whole packets that keep the rules; everything else is the end of the stream."""

    def __init__(self, stream: asyncio.StreamReader) -> None:
        self._stream = stream
        self._packet = b""
        self._seen_connect = False
        self._ended = False
        self.broken = ""
        """The rule that was broken, once one was."""

    async def read(self, n: int = -1) -> bytes:
        if n == 0:
            return b""
        if not self._packet and not self._ended:
            try:
                async with asyncio.timeout(IDLE_S if self._seen_connect else CONNECT_S):
                    self._packet = await self._next_packet()
            except TimeoutError:
                self._break("silent for too long")
            except asyncio.CancelledError:  # keep-alive expired, or the broker stops
                self._ended = True
                raise
            except (asyncio.IncompleteReadError, ConnectionError):
                self._ended = True
        if not self._ended and n > len(self._packet):
            self._break(f"a field of {n} bytes in a packet with {len(self._packet)} left")
        if self._ended:
            raise asyncio.IncompleteReadError(b"", n)
        data, self._packet = self._packet[:n], self._packet[n:]
        return data

    async def _next_packet(self) -> bytes:
        """Fixed header and body. IncompleteReadError when a rule is broken."""
        header = await self._stream.readexactly(1)
        kind = header[0] >> 4
        length, shift = 0, 0
        while True:
            byte = await self._stream.readexactly(1)
            header += byte
            length |= (byte[0] & 0x7F) << shift
            shift += 7
            if byte[0] < 0x80 or shift > 21:
                break
        if kind not in ALLOWED_KINDS:
            self._break(f"a packet of kind {kind}, which clients must not send here")
        elif (kind == CONNECT) == self._seen_connect:
            self._break("the first packet, and no other, must be CONNECT")
        elif length > PACKET_BYTES_MAX:
            self._break(f"a packet of {length} bytes, at most {PACKET_BYTES_MAX} are allowed")
        if self._ended:
            raise asyncio.IncompleteReadError(b"", 1)
        self._seen_connect = True
        return header + await self._stream.readexactly(length)

    def _break(self, rule: str) -> None:
        self._ended, self.broken = True, rule

    def feed_eof(self) -> None:
        self._stream.feed_eof()


class _Writer(WriterAdapter):  # type: ignore[misc]
    """Writes without waiting; cuts off whoever does not read."""

    def __init__(self, out: asyncio.StreamWriter) -> None:
        self._out = out

    def write(self, data: bytes) -> None:
        transport = self._out.transport
        if transport.is_closing():
            return
        if transport.get_write_buffer_size() > UNREAD_BYTES_MAX:
            transport.abort()
            return
        transport.write(data)

    async def drain(self) -> None:
        """Nothing: `write` bounds the buffer."""

    def get_peer_info(self) -> tuple[str, int] | None:
        peer = self._out.get_extra_info("peername")
        return (peer[0], peer[1]) if peer else None

    def get_ssl_info(self) -> None:
        return None

    async def close(self) -> None:
        self._out.transport.close()


class Rules(BaseAuthPlugin, BaseTopicPlugin):  # type: ignore[misc]
    """amqtt's plugin: who may connect and subscribe to what, who came and who has gone.

    Anybody may connect (trust comes with certificates, later), but may announce only a will of its
    own, and hear only this swarm.
    """

    @dataclass
    class Config:
        """Given by EmbeddedBroker."""

        topics: Any
        met: Any
        lost: Any

    def __init__(self, context: BaseContext) -> None:
        super().__init__(context)
        self._topics: Topics = self.config.topics
        self._met: Callable[[Card], None] = self.config.met
        self._lost: Callable[[str], None] = self.config.lost

    async def authenticate(self, *, session: Session) -> bool:
        session.is_anonymous = True  # amqtt forgets such a session when its connection ends
        client = session.client_id or ""
        if not CLIENT_ID.match(client):
            return False
        if not session.will_flag:
            return True
        try:
            card = Card.decode(bytes(session.will_message or b""))
        except FrameError:
            return False
        if session.will_retain or session.will_topic != self._topics.will(card.node):
            return False
        if node_of_client(client) != card.node:
            return False
        self._met(card)
        return True

    async def topic_filtering(
        self,
        *,
        session: Session | None = None,
        topic: str | None = None,
        action: Action | None = None,
    ) -> bool:
        if action != Action.SUBSCRIBE:
            return bool(action == Action.RECEIVE)
        subscriptions: dict[str, list[tuple[Session, int]]] = self.context.subscriptions
        held = sum(
            session == subscriber
            for subscribers in subscriptions.values()
            for subscriber, _ in subscribers
        )
        return held < SUBSCRIPTIONS_MAX and self._topics.is_ours(topic or "")

    async def on_broker_client_disconnected(self, *, client_id: str, **_: Any) -> None:
        self._lost(client_id)
