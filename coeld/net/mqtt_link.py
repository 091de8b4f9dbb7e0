"""One connection to one broker, kept up: connect, subscribe, hand on what arrives, reconnect.

aiomqtt does the protocol. Around it: the inbox is bounded and drops what is too large before
anything looks at it; the pause between attempts grows from 0.2 s to 5 s with jitter, so that a
broker that comes back is not met by everybody at once; trouble is logged once, not every time.

Brokers of the user's own are spoken to in MQTT 5, which need not send a device its own messages
back, and lets those die that nobody takes; one that refuses it is spoken to in 3.1.1. The embedded
brokers know 3.1.1 only.
"""

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Callable
from random import Random
from typing import Any, Final, cast

import aiomqtt
import paho.mqtt.client as mqtt
from paho.mqtt.enums import MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from coeld.config import Broker
from coeld.messages import MESSAGE_BYTES_MAX
from coeld.net.mqtt_topics import Card, Topics, client_id

KEEP_ALIVE_S: Final = 5
CONNECT_S: Final = 1.5
"""TCP connection; also the longest that stopping has to wait for a thread of paho's."""
ANSWER_S: Final = 3.0
"""CONNACK, SUBACK."""
CLOSE_S: Final = 0.3
INBOX_MAX: Final = 4096
PACKET_BYTES_MAX: Final = 4 << 20
"""From a broker. Above MESSAGE_BYTES_MAX a message is dropped, above this the connection is."""
PAUSE_S: Final = (0.2, 5.0)
EXPIRY_S: Final = 10
"""That a broker keeps a message; older ones say nothing new."""
STEADY_S: Final = 5.0
"""A connection that lasted this long starts over with the shortest pause."""

log = logging.getLogger(__name__)
_paho_log = logging.getLogger("coeld.paho")
_paho_log.setLevel(logging.CRITICAL)


class Link:
    """Run `run` in a task; the callbacks come from there."""

    def __init__(
        self,
        number: int,
        address: tuple[str, int],
        topics: Topics,
        card: Card,
        on_message: Callable[["Link", str, bytes], None],
        on_change: Callable[["Link"], None],
        rng: Random,
        external: Broker | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.number = number
        self.address = address
        self.external = external
        """None: the embedded broker of another device."""
        self.version = 5 if external else 4
        """Of MQTT, as it counts itself: 4 is 3.1.1."""
        self.node: str | None = None
        """Whose broker it is, once known."""
        self.up = False
        self.messages = 0
        self.dropped = 0
        """Too large, or more than the inbox held."""
        self.down_since = 0.0
        self._topics, self._card = topics, card
        self._on_message, self._on_change, self._rng = on_message, on_change, rng
        self._tls = tls if external and external.tls else None
        self._client: aiomqtt.Client | None = None

    async def run(self, give_up_s: float | None) -> None:
        """Until cancelled, or until it has been down for `give_up_s` (None: never)."""
        clock = asyncio.get_running_loop().time
        pause_s, complained = PAUSE_S[0], False
        self.down_since = clock()
        while give_up_s is None or clock() - self.down_since < give_up_s:
            began = clock()
            try:
                await self._listen()
            except aiomqtt.MqttError as exc:
                if self.up or not complained:
                    what = "lost" if self.up else "no"
                    log.info("%s connection to the MQTT broker %s:%s: %s", what, *self.address, exc)
                    complained = True
            if self.up:
                self.up = False
                self.down_since = clock()
                self._on_change(self)
            elif self.external:
                self.version = 4 if self.version == 5 else 5
            if clock() - began > STEADY_S:
                pause_s = PAUSE_S[0]
            await asyncio.sleep(pause_s * self._rng.uniform(0.5, 1.5))
            pause_s = min(pause_s * 2, PAUSE_S[1])

    async def publish(self, topic: str, payload: bytes) -> None:
        """QoS 0; lost when the link is down."""
        if self._client and self.up:
            with contextlib.suppress(aiomqtt.MqttError):  # `run` notices a broken link itself
                await self._client.publish(
                    topic, payload, properties=self._expiry(), timeout=ANSWER_S
                )

    async def _listen(self) -> None:
        """One connection from beginning to end. Raises MqttError."""
        client = aiomqtt.Client(
            *self.address,
            protocol=aiomqtt.ProtocolVersion(self.version),
            username=(self.external.user or None) if self.external else None,
            password=(self.external.password or None) if self.external else None,
            tls_context=self._tls,
            identifier=client_id(self._card.node, self.number),
            will=aiomqtt.Will(self._topics.will(self._card.node), self._card.encode()),
            keepalive=KEEP_ALIVE_S,
            timeout=ANSWER_S,
            queue_type=cast(Any, self._inbox),
            max_queued_incoming_messages=INBOX_MAX,
            logger=_paho_log,
            socket_options=[(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)],
        )
        client._client.connect_timeout = CONNECT_S
        _bound_packets(client._client)
        try:
            await self._open(client)
            topics = self._topics.subscriptions(self._card.node)
            options: Any = SubscribeOptions(qos=0, noLocal=True) if self.version == 5 else 0
            await client.subscribe([(topic, options) for topic in topics])
            self._client, self.up = client, True
            log.info("listening at the MQTT broker %s:%s", *self.address)
            self._on_change(self)
            async for message in client.messages:
                self.messages += 1
                self._on_message(self, str(message.topic), bytes(message.payload))
        finally:
            self._client = None
            await self._close(client)

    def _expiry(self) -> Properties | None:
        if self.version < 5:
            return None
        expiry = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        expiry.MessageExpiryInterval = EXPIRY_S
        return expiry

    async def _open(self, client: aiomqtt.Client) -> None:
        """Raises MqttError, also for a host that no name service would take."""
        try:
            await client.__aenter__()
        except ValueError as exc:  # empty, or with an empty or endless label
            raise aiomqtt.MqttError(f"not a host name: {exc}") from exc

    async def _close(self, client: aiomqtt.Client) -> None:
        """Say goodbye if that goes quickly, and free the socket in any case."""
        with contextlib.suppress(aiomqtt.MqttError, TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                if client._connected.done():
                    await client.__aexit__(None, None, None)
        for future in (client._connected, client._disconnected):
            if future.done() and not future.cancelled():
                future.exception()  # seen, so that nothing complains that it never was
        client._client._sock_close()  # aiomqtt leaves it open when no CONNACK came

    def _inbox(self, maxsize: int) -> "_Inbox":
        return _Inbox(self, maxsize)


def _bound_packets(paho: mqtt.Client) -> None:
    """End the connection when the broker announces a packet that nobody of ours would send.

    paho would collect up to 256 MB; it has no limit of its own for MQTT 3.1.1.
    """
    read = paho.loop_read

    def bounded(max_packets: int = 1) -> MQTTErrorCode:
        status = read(max_packets)
        announced = paho._in_packet["remaining_length"]
        if announced > PACKET_BYTES_MAX:
            raise aiomqtt.MqttError(f"the broker sends a packet of {announced} bytes")
        return status

    paho.loop_read = bounded  # type: ignore[method-assign]


class _Inbox(asyncio.Queue[aiomqtt.Message]):
    """Drops, and counts, what does not fit."""

    def __init__(self, link: Link, maxsize: int) -> None:
        super().__init__(maxsize)
        self._link = link

    def put_nowait(self, item: aiomqtt.Message) -> None:
        if self.full() or len(bytes(item.payload)) > MESSAGE_BYTES_MAX:
            self._link.dropped += 1
        else:
            super().put_nowait(item)
