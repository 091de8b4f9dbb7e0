"""Several brokers of the user's own: bridged, frozen, gone, guarded, and beside embedded ones."""

import asyncio
import contextlib
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from coeld.config import Broker
from coeld.errors import StartError
from tests.fakes.agents import Device, running, serving
from tests.fakes.bus import Station, eventually, linked
from tests.fakes.fake_model import install
from tests.harness.mosquitto import Mosquitto

pytestmark = pytest.mark.broker

ALL_ALIVE = ["alive"] * 4


@pytest.fixture
def bridged(tmp_path: Path) -> Iterator[tuple[Mosquitto, Mosquitto]]:
    """Two brokers, the second of which bridges everything to and from the first."""
    first = Mosquitto(tmp_path)
    bridge = (
        f"allow_anonymous true\nconnection home\naddress 127.0.0.1:{first.port}\n"
        "topic coeld/# both 0\nrestart_timeout 1\n"
    )
    second = Mosquitto(tmp_path, bridge)
    first.start()
    second.start()
    yield first, second
    first.stop()
    second.stop()


def devices_on(tmp_path: Path, *brokers: list[str], **sections: dict[str, object]) -> list[Device]:
    install(tmp_path / "store")
    swarms = [{"brokers": urls, "discovery": "off", "name": "test"} for urls in brokers]
    return [
        Device(tmp_path / f"d{i}", tmp_path / "store", swarm=swarm, **sections)
        for i, swarm in enumerate(swarms)
    ]


def states(status: dict) -> list[str]:
    return [member["status"] for member in status["node"]["members"]]


def test_devices_on_both_sides_of_a_bridge_are_one_swarm_and_hear_everything_once(
    tmp_path: Path, bridged: tuple[Mosquitto, Mosquitto]
) -> None:
    first, second = ([broker.url] for broker in bridged)
    devices = devices_on(tmp_path, first, first, second, second)
    with running(*devices):
        for device in devices:
            device.wait(lambda status: states(status) == ALL_ALIVE and serving(status))
        before = devices[3].status()["bus"]["links"][0]["messages"]
        for device in devices:
            status = device.wait(lambda s: s["bus"]["links"][0]["messages"] > before + 40)
            assert status["bus"]["repeated"] == 0


def test_a_device_at_both_bridged_brokers_drops_what_comes_twice(
    bridged: tuple[Mosquitto, Mosquitto],
) -> None:
    async def scenario() -> None:
        both = bridged[0].brokers + bridged[1].brokers
        one, two = (
            Station(1, brokers=both, embedded=False),
            Station(2, brokers=both, embedded=False),
        )
        async with one.on_air(), two.on_air():
            await linked(one, two)
            await eventually(lambda: all(link["up"] for link in two.bus.status()["links"]))
            before = two.messages(one)
            for number in range(100):
                await one.bus.publish(one.beat(2 + number))
            await two.until(lambda: two.messages(one) >= before + 100)
            await eventually(lambda: two.bus.status()["repeated"] >= 100)
            assert two.messages(one) == before + 100

    asyncio.run(scenario())


def test_a_broker_that_freezes_keeps_nobody_from_the_other(
    tmp_path: Path, mosquitto: Mosquitto
) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        both = frozen.brokers + mosquitto.brokers
        one, two = (
            Station(1, brokers=both, embedded=False),
            Station(2, brokers=both, embedded=False),
        )
        async with one.on_air(), two.on_air():
            await linked(one, two)
            frozen.process.send_signal(signal.SIGSTOP)
            before = two.messages(one)
            began = loop.time()
            for number in range(200):
                await one.bus.publish(one.beat(1000 + number))
            assert loop.time() - began < 3, "publishing waited for the frozen broker"
            await two.until(lambda: two.messages(one) >= before + 200)
            frozen.process.send_signal(signal.SIGCONT)

    frozen = Mosquitto(tmp_path)
    frozen.start()
    try:
        asyncio.run(scenario())
    finally:
        frozen.stop()


def test_a_broker_is_spoken_to_in_mqtt_5_and_sends_nobody_his_own_messages_back(
    mosquitto: Mosquitto,
) -> None:
    async def scenario() -> None:
        one, two = (Station(number, brokers=mosquitto.brokers, embedded=False) for number in (1, 2))
        async with one.on_air(), two.on_air():
            await linked(one, two)
            (link,) = one.bus._links.values()
            assert link.version == 5
            await one.bus.send(one.node, one.beat(7))
            await two.bus.publish(two.beat(8))
            await one.until(lambda: one.heard[-1].message.incarnation == 8)
            assert link.messages == one.messages(two), "our own messages came back"

    asyncio.run(scenario())


def test_a_broker_that_refuses_mqtt_5_is_spoken_to_in_3_1_1() -> None:
    async def scenario() -> None:
        old = Station(9)  # its embedded broker knows nothing else
        async with old.on_air():
            brokers = (Broker("127.0.0.1", old.bus.port),)
            async with Station(1, brokers=brokers, embedded=False).on_air() as one:
                (link,) = one.bus._links.values()
                with contextlib.suppress(TimeoutError):  # a busy machine may need another round
                    await eventually(lambda: link.up)
                await eventually(lambda: link.up)
                assert link.version == 4

    asyncio.run(scenario())


def test_losing_every_broker_leaves_the_last_routes_serving(
    tmp_path: Path, mosquitto: Mosquitto
) -> None:
    fast = {"brokers": [mosquitto.url], "discovery": "off", "name": "test"}
    fast |= {"heartbeat_ms": 50, "silence_ms": 200, "suspicion_ms": 50}
    install(tmp_path / "store")
    devices = [Device(tmp_path / f"d{i}", tmp_path / "store", swarm=fast) for i in (0, 1)]
    with running(*devices):
        for device in devices:
            device.wait(lambda s: states(s) == ["alive"] * 2 and serving(s))
        mosquitto.stop()
        for device in devices:
            device.wait(lambda status: not status["bus"]["links"][0]["up"])
        for device in devices * 50:  # a hundred questions take many times the silence allowed
            status = device.status()
            assert states(status) == ["alive"] * 2
            assert serving(status)
        status, answer = devices[0].request("POST", "/v1/completions", {"prompt": "hello"})
        assert (status, answer["choices"][0]["text"]) == (200, "you said: hello ")
        devices[1].kill()
        mosquitto.start()
        devices[0].wait(lambda status: "dead" in states(status) and serving(status))


def test_embedded_and_external_brokers_at_once_and_either_is_enough(
    tmp_path: Path, mosquitto: Mosquitto
) -> None:
    async def scenario() -> None:
        one = Station(1, brokers=mosquitto.brokers)
        async with one.on_air():
            seeds = (("127.0.0.1", one.bus.port),)
            two, far = (
                Station(2, brokers=mosquitto.brokers, seeds=seeds),
                Station(3, brokers=mosquitto.brokers, embedded=False),
            )
            async with two.on_air(), far.on_air():
                await linked(one, two, far)
                assert two.bus.status()["topology"] == "embedded and external"
                await eventually(lambda: sum(x["up"] for x in two.bus.status()["links"]) == 2)
                mosquitto.stop()
                await eventually(lambda: sum(x["up"] for x in two.bus.status()["links"]) == 1)
                one.heard.clear()
                two.heard.clear()
                await linked(one, two)

    asyncio.run(scenario())
    mosquitto.start()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ca.pem, and cert.pem with key.pem for 127.0.0.1 signed with it."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("certificates")
    new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    new += ["-nodes", "-days", "2"]
    name = ["-addext", "subjectAltName=IP:127.0.0.1", "-subj"]
    ca = ["-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=our CA"]
    cert = [*name, "/CN=broker", "-keyout", "key.pem", "-out", "cert.pem"]
    signed = ["-CA", "ca.pem", "-CAkey", "ca.key", "-addext", "basicConstraints=CA:FALSE"]
    for more in (ca, [*cert, *signed]):
        subprocess.run([*new, *more], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.mark.filterwarnings("ignore:Exception ignored in. <ssl.SSLSocket")  # paho leaves it to gc
def test_a_guarded_broker_wants_tls_and_a_password(tmp_path: Path, certificates: Path) -> None:
    async def scenario() -> None:
        right = Broker("127.0.0.1", guarded.port, True, "pi", "secret")
        ca = str(certificates / "ca.pem")
        good = [Station(i, brokers=(right,), brokers_ca=ca, embedded=False) for i in (1, 2)]
        strangers = [
            Station(3, brokers=(right,), embedded=False),  # trusts only the system's
            Station(4, brokers=(right._replace(password="guess"),), brokers_ca=ca, embedded=False),
            Station(5, brokers=(Broker("127.0.0.1", guarded.port),), embedded=False),
        ]
        async with contextlib.AsyncExitStack() as stack:
            for station in (*strangers, *good):
                await stack.enter_async_context(station.on_air())
            await linked(*good)
            ups = [x["up"] for one in strangers for x in one.bus.status()["links"]]
            assert ups == [False] * 3
        with pytest.raises(StartError, match="brokers_ca"):
            await Station(6, brokers=(right,), brokers_ca=str(tmp_path)).bus.start()

    passwords = tmp_path / "passwords"
    passwords.write_text("pi:secret\n")
    passwords.chmod(0o600)
    subprocess.run(["mosquitto_passwd", "-U", str(passwords)], check=True)
    guarded = Mosquitto(
        tmp_path,
        f"cafile {certificates}/ca.pem\ncertfile {certificates}/cert.pem\n"
        f"keyfile {certificates}/key.pem\npassword_file {passwords}\n"
        "allow_anonymous false\nuser root",
    )
    guarded.start()
    try:
        asyncio.run(scenario())
    finally:
        guarded.stop()


def test_everything_works_over_ipv6(tmp_path: Path) -> None:
    """Embedded brokers, data ports and the fetching of weights by a device that has none."""
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
            port = server.getsockname()[1]
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    install(tmp_path / "store")
    network = {"host": "::1", "mqtt_port": port}
    first = Device(tmp_path / "d0", tmp_path / "store", network=network)
    swarm = {"discovery": "off", "name": "test", "neighbours": [f"[::1]:{port}"]}
    second = Device(
        tmp_path / "d1", tmp_path / "empty", network={"host": "::1", "mqtt_port": 0}, swarm=swarm
    )
    with running(first, second):
        for device in (first, second):
            status = device.wait(lambda s: states(s) == ["alive"] * 2 and both_serve(s))
            assert {member["host"] for member in status["node"]["members"]} == {"::1"}


def both_serve(status: dict) -> bool:
    return serving(status) and all(member["serving"] for member in status["node"]["members"])
