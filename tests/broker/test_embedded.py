"""The embedded topology: real amqtt brokers on loopback, in this process."""

import asyncio
import contextlib
import gc
import os
import socket
import struct
from random import Random

import psutil
import pytest

from coeld.errors import StartError
from coeld.events import MessageReceived
from coeld.ids import NodeId
from coeld.messages import MESSAGE_BYTES_MAX
from coeld.net.mqtt_broker import CLIENTS_MAX, SUBSCRIPTIONS_MAX, EmbeddedBroker
from coeld.net.mqtt_topics import Topics
from tests.fakes.bus import WAIT_S, Station, eventually, linked

GROWTH_BYTES_MAX = 24 << 20


def rss_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def text(value: str) -> bytes:
    return struct.pack("!H", len(value)) + value.encode()


def packet(kind: int, body: bytes) -> bytes:
    length, left = bytearray(), len(body)
    while True:
        length.append(left & 0x7F | (0x80 if left > 0x7F else 0))
        left >>= 7
        if not left:
            return bytes([kind]) + bytes(length) + body


def connect(client: str, keep_alive_s: int = 60) -> bytes:
    return packet(0x10, text("MQTT") + struct.pack("!BBH", 4, 2, keep_alive_s) + text(client))


def subscribe(topic: str) -> bytes:
    return packet(0x82, b"\0\1" + text(topic) + b"\0")


async def answers(port: int, *data: bytes) -> bytes:
    """Send, then read until the broker closes or is silent for a moment."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    found = b""
    with contextlib.suppress(ConnectionError, TimeoutError):
        for one in data:
            writer.write(one)
            await writer.drain()
        while chunk := await asyncio.wait_for(reader.read(1 << 16), 0.3):
            found += chunk
    writer.transport.abort()
    return found


def arrived(station: Station) -> int:
    (link,) = station.bus.status()["links"]
    return int(link["messages"]) + int(link["dropped"])


def test_two_devices_hear_each_other_although_only_one_knows_the_other() -> None:
    async def scenario() -> None:
        async with Station(1).on_air() as one:
            seeds = (("127.0.0.1", one.bus.port),)
            async with Station(2, seeds=seeds).on_air() as two:
                await linked(one, two)
                heard = one.messages(two)
                await two.bus.send(one.node, two.beat())
                await one.until(lambda: one.messages(two) > heard)
                assert two.bus.status()["links"][0]["node"] == one.node

    asyncio.run(scenario())


def test_a_burst_of_a_thousand_messages_arrives_whole() -> None:
    async def scenario() -> None:
        async with Station(1).on_air() as one:
            seeds = (("127.0.0.1", one.bus.port),)
            async with Station(2, seeds=seeds).on_air() as two:
                await linked(one, two)
                two.heard.clear()
                for number in range(1000):
                    await one.bus.publish(one.beat(1000 + number))
                burst = [1000 + number for number in range(1000)]
                await two.until(lambda: two.messages(one) >= 1000)
                found = [e.message.incarnation for e in two.heard if isinstance(e, MessageReceived)]
                assert [number for number in found if number >= 1000] == burst

    asyncio.run(scenario())


def test_a_neighbour_that_vanishes_is_lost_on_both_ways_and_found_again() -> None:
    async def scenario() -> None:
        async with Station(1).on_air() as one:
            seeds = (("127.0.0.1", one.bus.port),)
            two = Station(2, seeds=seeds)
            async with two.on_air():
                await linked(one, two)
                port = two.bus.port
            await one.until(lambda: one.lost(two))
            again = Station(2, port=port)  # no seeds: it is one that comes back to two
            async with again.on_air():
                one.heard.clear()
                await linked(one, again)

    asyncio.run(scenario())


def test_a_broker_that_restarts_is_listened_to_again() -> None:
    async def scenario() -> None:
        async with contextlib.AsyncExitStack() as stack:
            one = Station(1)
            async with one.on_air():
                port = one.bus.port
                seeds = (("127.0.0.1", port),)
                two = await stack.enter_async_context(Station(2, seeds=seeds).on_air())
                await linked(one, two)
            await two.until(lambda: two.lost(one))
            two.heard.clear()
            async with Station(1, port=port).on_air() as again:
                await linked(again, two)

    asyncio.run(scenario())


def test_stopping_is_quick_even_while_a_neighbour_is_out_of_reach() -> None:
    async def scenario() -> float:
        loop = asyncio.get_running_loop()
        with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, never answers
            seeds = (silent.getsockname()[:2], ("127.0.0.1", 9))
            async with Station(1, seeds=seeds).on_air() as one:
                await one.bus.publish(one.beat())
                await asyncio.sleep(0.2)
                began = loop.time()
        return loop.time() - began

    assert asyncio.run(scenario()) < 1.0


def test_neighbours_with_impossible_addresses_do_no_harm() -> None:
    async def scenario() -> None:
        async with Station(1).on_air() as one:
            hosts = ["", "..", "x" * 253, "a..b", "::::", "%", "-", "256.1.1.1", "0.0.0.0"]
            for number, host in enumerate(hosts):
                one.bus.connect(NodeId(f"{number + 50:016x}"), host, 1)
            await asyncio.sleep(0.3)
            seeds = (("127.0.0.1", one.bus.port),)
            async with Station(2, seeds=seeds).on_air() as two:
                await linked(one, two)

    asyncio.run(scenario())


def test_a_port_in_use_is_named() -> None:
    async def scenario() -> None:
        async with Station(1).on_air() as one:
            with pytest.raises(StartError, match=f"{one.bus.port}.*mqtt_port"):
                await Station(2, port=one.bus.port).bus.start()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "data",
    [
        (packet(0x30, text("coeld/1/test/all/x") + b"hi"),),  # before CONNECT
        (connect("c"), packet(0x30, text("coeld/1/test/all/x") + b"hi")),  # PUBLISH
        (connect("c"), connect("c")),
        (connect("c"), b"\x82\xff\xff\xff\x7f"),  # a SUBSCRIBE of 256 MB
        (b"\x10\xff\xff\xff\x7f" + b"x" * 10_000,),  # a CONNECT of 256 MB
        (connect("c"), b"\x82\xff\xff\xff\xff\xff\xff"),
        (connect("no spaces"),),
        (b"GET / HTTP/1.1\r\n\r\n",),
    ],
)
def test_a_client_that_breaks_a_rule_is_cut_off(data: tuple[bytes, ...]) -> None:
    async def scenario() -> None:
        async with Station(1).on_air() as one:
            async with asyncio.timeout(WAIT_S):
                reader, writer = await asyncio.open_connection("127.0.0.1", one.bus.port)
                with contextlib.suppress(ConnectionError):
                    for piece in data:
                        writer.write(piece)
                        await writer.drain()
                    while await reader.read(1000):
                        pass
                writer.transport.abort()

    asyncio.run(scenario())


def test_subscriptions_stay_within_the_swarm_and_are_few() -> None:
    async def scenario() -> None:
        async with Station(1).on_air() as one:
            wanted = ["#", "$SYS/#", "coeld/1/other/all/+", "coeld/1/test/all/+"]
            wanted += [f"coeld/1/test/to/{i}/+" for i in range(SUBSCRIPTIONS_MAX)]
            found = await answers(one.bus.port, connect("c"), *map(subscribe, wanted))
            granted = list(found[8::5])
            assert granted[:4] == [0x80, 0x80, 0x80, 0]
            assert granted.count(0) == SUBSCRIPTIONS_MAX

    asyncio.run(scenario())


def test_ten_thousand_random_packets_at_the_port_harm_nobody() -> None:
    async def scenario() -> None:
        rng = Random(7)
        async with Station(1).on_air() as one:
            seeds = (("127.0.0.1", one.bus.port),)
            async with Station(2, seeds=seeds).on_air() as two:
                await linked(one, two)
                before = rss_bytes()
                for round_number in range(100):
                    reader, writer = await asyncio.open_connection("127.0.0.1", one.bus.port)
                    if round_number % 2:
                        writer.write(connect(f"c{round_number}"))
                    for _ in range(100):
                        kind = rng.choice((0x10, 0x30, 0x82, 0xA2, 0xC0, 0xE0, rng.randrange(256)))
                        writer.write(packet(kind, os.urandom(rng.choice((0, 2, 9, 300, 5000)))))
                    with contextlib.suppress(ConnectionError):
                        await writer.drain()
                    with contextlib.suppress(ConnectionError, TimeoutError):
                        async with asyncio.timeout(0.5):
                            await reader.read()
                    writer.transport.abort()
                assert rss_bytes() - before < GROWTH_BYTES_MAX
                two.heard.clear()
                await one.bus.publish(one.beat(77))
                await two.until(lambda: two.messages(one) > 0)
                assert not two.lost(one)

    asyncio.run(scenario())


def test_nobody_misses_a_message_because_others_come_and_go(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        async with Station(1).on_air() as one:
            seeds = (("127.0.0.1", one.bus.port),)
            async with Station(2, seeds=seeds).on_air() as two:
                await linked(one, two)

                async def come_and_go(number: int) -> None:
                    for round_number in range(10):
                        topic = f"coeld/1/test/to/{number}-{round_number}/+"
                        reader, writer = await asyncio.open_connection("127.0.0.1", one.bus.port)
                        writer.write(connect(f"c{number}-{round_number}") + subscribe(topic))
                        await reader.read(9)
                        writer.write(b"\xe0\0")  # DISCONNECT
                        await reader.read()
                        writer.transport.abort()

                two.heard.clear()
                async with asyncio.TaskGroup() as group:
                    guests = [
                        group.create_task(come_and_go(number), name="guest") for number in range(8)
                    ]
                    sent = 0
                    while not all(guest.done() for guest in guests):
                        await one.bus.publish(one.beat(sent))
                        sent += 1
                        await asyncio.sleep(0.001)
                await two.until(lambda: two.messages(one) == sent)
                assert one.bus.status()["broker_refused"] == 0
        gc.collect()  # a task that died unseen complains when it is collected
        # A busy machine makes asyncio's debug mode complain of slow callbacks: not what is asked.
        complaints = [r for r in caplog.records if r.name == "asyncio" and "took" not in r.msg]
        assert complaints == []

    asyncio.run(scenario())


def test_more_clients_than_allowed_are_turned_away() -> None:
    async def scenario() -> None:
        broker = EmbeddedBroker("127.0.0.1", 0, Topics("test"), lambda _: None, lambda _: None)
        await broker.start()
        open_now = [
            await asyncio.open_connection("127.0.0.1", broker.port) for _ in range(CLIENTS_MAX + 5)
        ]
        async with asyncio.timeout(WAIT_S):
            for reader, _ in open_now[CLIENTS_MAX:]:
                with contextlib.suppress(ConnectionError):
                    assert await reader.read(1) == b""
        assert broker.clients <= CLIENTS_MAX
        await broker.stop()
        for _, writer in open_now:
            writer.transport.abort()

    asyncio.run(scenario())


def test_a_neighbour_that_publishes_rubbish_is_counted_and_nothing_grows() -> None:
    async def scenario() -> None:
        rng = Random(3)
        liar = EmbeddedBroker("127.0.0.1", 0, Topics("test"), lambda _: None, lambda _: None)
        await liar.start()
        async with Station(1, seeds=(("127.0.0.1", liar.port),)).on_air() as one:
            sender = "f" * 16
            topics = [
                f"coeld/1/test/all/{sender}",
                f"coeld/1/test/to/{one.node}/{sender}",
                f"coeld/1/test/will/{sender}",
                "coeld/1/test/all/nobody",
            ]
            await eventually(lambda: liar.clients and one.bus.status()["links"][0]["up"])
            before = rss_bytes()
            sent = 0
            for number in range(10_000):
                size = MESSAGE_BYTES_MAX + 1 if number % 1000 == 0 else rng.randrange(200)
                await liar.publish(topics[number % 4], rng.randbytes(size))
                sent += 1
                if number % 100 == 0:  # no faster than it is read: who does not read is cut off
                    await eventually(lambda so_far=sent: arrived(one) >= so_far)
            await eventually(lambda: arrived(one) >= sent)
            link = one.bus.status()["links"][0]
            assert link["dropped"] >= 10
            assert sum(one.bus.malformed.values()) == link["messages"]
            assert one.heard == []
            assert rss_bytes() - before < GROWTH_BYTES_MAX
        await liar.stop()

    asyncio.run(scenario())


def test_a_broker_that_announces_a_huge_packet_is_cut_off_before_it_is_collected() -> None:
    async def scenario() -> None:
        connections = 0
        cut = asyncio.Event()

        async def lie(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal connections
            connections += 1
            await reader.read(1000)
            writer.write(packet(0x20, b"\0\0"))
            await reader.read(1000)
            writer.write(packet(0x90, b"\0\1\0\0\0"))
            writer.write(b"\x30\xff\xff\xff\x7f")
            with contextlib.suppress(ConnectionError):
                while True:
                    writer.write(bytes(1 << 16))
                    await writer.drain()
            writer.transport.abort()
            cut.set()

        liar = await asyncio.start_server(lie, "127.0.0.1", 0)
        before = rss_bytes()
        async with Station(1, seeds=(liar.sockets[0].getsockname(),)).on_air():
            async with asyncio.timeout(WAIT_S):
                await cut.wait()
            assert rss_bytes() - before < GROWTH_BYTES_MAX
        liar.close()

    asyncio.run(scenario())


def test_a_listener_that_does_not_read_is_cut_off() -> None:
    async def scenario() -> None:
        async with Station(1).on_air() as one:
            _reader, writer = await asyncio.open_connection("127.0.0.1", one.bus.port, limit=1000)
            writer.write(connect("lazy") + subscribe("coeld/1/test/all/+"))
            await eventually(lambda: one.bus.status()["broker_clients"] == 1)
            broker = one.bus._broker
            async with asyncio.timeout(WAIT_S):
                while one.bus.status()["broker_clients"]:
                    await broker.publish("coeld/1/test/all/x", bytes(200_000))
                    await asyncio.sleep(0)
            writer.transport.abort()

    asyncio.run(scenario())


def test_two_names_of_one_neighbour_end_as_one_link() -> None:
    async def scenario() -> None:
        async with Station(1).on_air() as one:
            port = one.bus.port
            async with Station(2, seeds=(("localhost", port),)).on_air() as two:
                two.bus.connect(NodeId("c" * 16), "127.0.0.1", port)  # by whatever name
                await linked(one, two)
                await eventually(lambda: len(two.bus.status()["links"]) == 1)
                assert two.bus.status()["links"][0]["host"] == "localhost"

    asyncio.run(scenario())
