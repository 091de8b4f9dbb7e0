"""The external topology: a real mosquitto, shared by everybody."""

import asyncio
import contextlib
import socket
from pathlib import Path
from random import Random

import aiomqtt
import psutil
import pytest

from coeld.events import NeighbourLost
from coeld.ids import NodeId
from coeld.net.mqtt_topics import Card, Topics
from tests.fakes.agents import Device, running
from tests.fakes.bus import Station, eventually, linked
from tests.fakes.fake_model import install
from tests.harness.mosquitto import Mosquitto

pytestmark = pytest.mark.broker


def test_devices_hear_each_other_once_and_privately(mosquitto: Mosquitto) -> None:
    async def scenario() -> None:
        stations = [
            Station(number, brokers=mosquitto.brokers, embedded=False) for number in (1, 2, 3)
        ]
        one, two, three = stations
        async with one.on_air(), two.on_air(), three.on_air():
            await linked(*stations)
            before = two.messages(one), three.messages(one)
            await one.bus.send(two.node, one.beat())
            await two.until(lambda: two.messages(one) == before[0] + 1)
            assert three.messages(one) == before[1]
            assert not any(isinstance(event, NeighbourLost) for event in one.heard)

    asyncio.run(scenario())


def test_a_burst_of_a_thousand_messages_arrives_whole(mosquitto: Mosquitto) -> None:
    async def scenario() -> None:
        one, two = (Station(number, brokers=mosquitto.brokers, embedded=False) for number in (1, 2))
        async with one.on_air(), two.on_air():
            await linked(one, two)
            before = two.messages(one)
            for number in range(1000):
                await one.bus.publish(one.beat(2 + number))
            await two.until(lambda: two.messages(one) >= before + 1000)

    asyncio.run(scenario())


def test_two_brokers_are_better_than_one(tmp_path: Path, mosquitto: Mosquitto) -> None:
    async def scenario() -> None:
        both = second.brokers + mosquitto.brokers
        one, two = (Station(number, brokers=both, embedded=False) for number in (1, 2))
        async with one.on_air(), two.on_air():
            await linked(one, two)
            second.stop()
            await eventually(lambda: sum(x["up"] for x in two.bus.status()["links"]) == 1)
            two.heard.clear()
            await linked(one, two)

    second = Mosquitto(tmp_path)
    second.start()
    try:
        asyncio.run(scenario())
    finally:
        second.stop()


def test_a_broker_that_restarts_is_found_again(mosquitto: Mosquitto) -> None:
    async def scenario() -> None:
        one, two = (Station(number, brokers=mosquitto.brokers, embedded=False) for number in (1, 2))
        async with one.on_air(), two.on_air():
            await linked(one, two)
            mosquitto.stop()
            await eventually(lambda: not one.bus.status()["links"][0]["up"])
            mosquitto.start()
            one.heard.clear()
            two.heard.clear()
            await linked(one, two)

    asyncio.run(scenario())


def test_a_last_will_is_a_reason_to_suspect(mosquitto: Mosquitto) -> None:
    async def scenario() -> None:
        victim = NodeId("e" * 16)
        will = aiomqtt.Will(Topics("test").will(victim), Card(victim, 1).encode())
        async with Station(1, brokers=mosquitto.brokers, embedded=False).on_air() as one:
            await eventually(lambda: one.bus.status()["links"][0]["up"])
            client = aiomqtt.Client("127.0.0.1", mosquitto.port, will=will)
            await client.__aenter__()
            client._client._sock.shutdown(socket.SHUT_RDWR)  # the plug is pulled
            await one.until(lambda: NeighbourLost(victim) in one.heard)
            with contextlib.suppress(aiomqtt.MqttError):
                await client.__aexit__(None, None, None)

    asyncio.run(scenario())


def test_ten_thousand_random_messages_on_every_topic_harm_nobody(
    tmp_path: Path, mosquitto: Mosquitto
) -> None:
    """Against a whole agent: it stays up, stays small, and still hears its peer."""
    install(tmp_path / "store")
    rng = Random(11)

    def rubbish() -> bytes:
        words = [b"{", b"}", b'"v":1', b'"kind":1', b'"members":', b"[", b"]", b"1e999", b"\xff"]
        if rng.random() < 0.5:
            return b"".join(rng.choices(words, k=rng.randrange(30)))
        return rng.randbytes(rng.choice((0, 1, 50, 1000)))

    async def bombard(nodes: list[str]) -> None:
        topics = ["all/nobody", "will/nobody", "to/x/y", "shout", f"to/{nodes[0]}/{nodes[1]}"]
        topics += [f"all/{'9' * 16}", f"all/{nodes[1]}", f"will/{'9' * 16}"]
        async with aiomqtt.Client("127.0.0.1", mosquitto.port) as client:
            for number in range(10_000):
                await client.publish(f"coeld/1/test/{topics[number % 8]}", rubbish())
            await client.publish("coeld/1/test/all/" + "8" * 16, b"x" * (20 << 20))

    swarm = {"swarm": {"brokers": [mosquitto.url], "discovery": "off", "name": "test"}}
    devices = [Device(tmp_path / f"d{i}", tmp_path / "store", **swarm) for i in (0, 1)]
    with running(*devices):
        both = [
            device.wait(lambda status: len(status["node"]["members"]) == 2) for device in devices
        ]
        agent = psutil.Process(devices[0].process.pid)
        before = agent.memory_info().rss
        asyncio.run(bombard([status["node"]["me"] for status in both]))
        after = devices[0].wait(lambda status: sum(status["bus"]["malformed"].values()) > 2000)
        assert agent.memory_info().rss - before < 16 << 20
        states = [member["status"] for member in after["node"]["members"]]
        assert states == ["alive", "alive"]
        assert devices[0].stop()[0] == 0
