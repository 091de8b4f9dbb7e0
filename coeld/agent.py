"""The agent: one asyncio process that carries facts to the node and its decisions into the world.

Everything that happens (messages, engine, sensors, timers) goes through one inbox to `Node.step`,
and everything the node wants is performed in one place, `_perform`. The order of start and stop is
the order of the lines in `run`: state directory, control bus, local socket, engine; and on SIGTERM
a goodbye to the swarm first, so that others take over while we clean up.
"""

import asyncio
import contextlib
import logging
import os
import platform
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from random import Random
from typing import Any, Final, assert_never

from coeld import __version__
from coeld.api import listen
from coeld.api.serve import serve
from coeld.api.server import Api
from coeld.config import Config, broker_at, split_address
from coeld.deployment.expectation import expected_us, learned
from coeld.effects import (
    Admit,
    Connect,
    Disconnect,
    DropLots,
    Effect,
    EndRequests,
    LoadLots,
    OpenModel,
    Publish,
    Report,
    Send,
    SwapRoutes,
)
from coeld.engine.protocol import ENGINE_COMMAND, EngineOptions
from coeld.errors import NoModel, Starting
from coeld.events import (
    EngineStarted,
    EngineStopped,
    Event,
    MessageReceived,
    ResourcesSampled,
    Tick,
)
from coeld.host import state_dir
from coeld.host.disk import Disk
from coeld.host.notify import notify
from coeld.host.places import Places, places
from coeld.host.sensors import Sensors
from coeld.model.store import Store
from coeld.net.answer import Answer
from coeld.net.blobs import listening
from coeld.net.engine_link import EngineLink
from coeld.net.mqtt import BusOptions, ControlBus
from coeld.net.weights import DiskBudget, Weights
from coeld.node import Node, NodeConfig

INBOX_MAX: Final = 4096
"""Messages that wait for the node; more are dropped, gossip repeats them."""
SAMPLE_S: Final = 2.0
HAND_OVER_S: Final = 3.0
"""A device that is told to stop waits this long for others to take over what it serves."""
PARTING_S_MAX: Final = 1.5
"""And then so long for requests of others that have caches here to go over to another way."""
GOODBYE_S: Final = 0.1
"""For the goodbye to leave our sockets before they close."""

log = logging.getLogger(__name__)


class Agent:
    """Everything one daemon owns. `run` it once."""

    def __init__(
        self, config: Config, where: Places, engine_command: tuple[str, ...] = ENGINE_COMMAND
    ) -> None:
        self._config = config
        self._where = where
        self._engine_command = engine_command
        self._inbox: asyncio.Queue[Event] = asyncio.Queue()
        self._dropped = 0
        self._stop = asyncio.Event()
        self._rng = Random()
        self._sensors = Sensors(
            config.memory.budget_mb,
            config.device.battery_percent,
            Disk(where.store_dir, where.state_dir / "disk.json"),
        )
        self._clock = asyncio.get_running_loop().time

    async def run(self) -> None:
        """Until SIGTERM or SIGINT. Raises StartError when it cannot start."""
        _on_signals(self._stop.set)
        with state_dir.locked(self._where.state_dir):
            self._identity = state_dir.next_identity(self._where.state_dir)
            if self._identity.renewed:
                log.warning("the identity was damaged: this device is a new one for the swarm")
            self._bus = ControlBus(self._bus_options(), self._deliver, self._rng)
            network = self._config.network
            with self._listening() as sockets, listening(network.host, network.blob_port) as blobs:
                await self._bus.start()
                self._node = self._make_node(blobs)
                self._engine = EngineLink(
                    self._engine_options(),
                    self._config.model.name,
                    self._deliver,
                    self._engine_command,
                )
                self._weights = Weights(
                    Store(self._where.store_dir),
                    self._config.model.name,
                    self._identity.node,
                    network.blob_mb_per_s * 1e6,
                    DiskBudget(
                        self._config.device.disk_mb * 1_000_000,
                        self._config.device.disk_free_mb * 1_000_000,
                    ),
                    self._node.holders,
                    self._node.releases,
                    self._node.wanted_on_disk,
                    self._engine.load,
                    self._deliver,
                )
                self._api = Api(self)
                try:
                    await self._run_parts(sockets, blobs)
                finally:
                    notify("STOPPING=1")

    async def _run_parts(self, sockets: list[socket.socket], blobs: socket.socket) -> None:
        parts = {
            "bus": self._bus.run(),
            "engine": self._engine.run(),
            "api": serve(self._api.app, sockets),
            "blobs": serve(self._weights.server.app, [blobs]),
            "weights": self._weights.run(lambda: self._engine.model),
            "node": self._drive_node(),
            "sensors": self._sample(),
        }
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(part, name=name) for name, part in parts.items()]
            if self._config.swarm.discovery == "mdns" and self._config.swarm.embedded:
                tasks.append(group.create_task(self._discover(), name="discovery"))
            log.info(
                "coeld %s: device %s listens on %s",
                __version__,
                self._identity.node,
                self._where.socket,
            )
            notify("READY=1")
            await self._stop.wait()
            hand_over = group.create_task(self._hand_over(), name="hand-over")
            _on_signals(hand_over.cancel)  # told again, it goes without
            await asyncio.wait((hand_over,))
            await self._say_goodbye()
            for task in tasks:
                task.cancel()

    @contextlib.contextmanager
    def _listening(self) -> Iterator[list[socket.socket]]:
        """The API's sockets: systemd's, or our own, which go away again."""
        own = []
        sockets = listen.inherited_sockets()
        if path := listen.path_of(sockets):
            self._where = replace(self._where, socket=path)
        try:
            if not sockets:
                own = [listen.open_unix(self._where.socket)]
                sockets += own
            if self._config.api.tcp_port:
                sockets.append(listen.open_tcp(self._config.api.tcp_port))
            yield sockets
        finally:
            for sock in sockets:
                sock.close()
            if own:
                self._where.socket.unlink(missing_ok=True)

    # The node

    def _deliver(self, event: Event) -> None:
        """Anything that happened. Messages of others may be dropped, what we did ourselves not."""
        if isinstance(event, MessageReceived) and self._inbox.qsize() >= INBOX_MAX:
            self._dropped += 1
            return
        if isinstance(event, EngineStopped):
            self._weights.forget()
        if isinstance(event, EngineStarted):  # its speed comes before what it makes possible
            self._inbox.put_nowait(self._resources())
        self._inbox.put_nowait(event)

    def _resources(self) -> ResourcesSampled:
        sample = self._sensors.sample(self._engine.speeds, self._engine.pid)
        return ResourcesSampled(replace(sample, sparing=sample.sparing or self._stop.is_set()))

    async def _drive_node(self) -> None:
        while True:
            for effect in self._node.step(await self._next_event(), self._clock()):
                await self._perform(effect)

    async def _next_event(self) -> Event:
        """The next thing that happened, or Tick when the node's deadline comes first."""
        wait_s = self._node.deadline - self._clock()
        if wait_s <= 0:
            await asyncio.sleep(0)
            return Tick() if self._inbox.empty() else self._inbox.get_nowait()
        try:
            async with asyncio.timeout(wait_s):
                return await self._inbox.get()
        except TimeoutError:
            return Tick()

    async def _perform(self, effect: Effect) -> None:
        match effect:
            case Publish(message):
                await self._bus.publish(message)
            case Send(to, message):
                await self._bus.send(to, message)
            case Connect(node, host, port):
                self._bus.connect(node, host, port)
            case Disconnect(node):
                self._bus.disconnect(node)
            case LoadLots(lots, narrow):
                if model := self._engine.model:
                    self._weights.load(model, lots, narrow)
            case DropLots(lots):
                self._engine.drop(lots)
            case SwapRoutes(table):
                self._engine.routes(table)
            case Admit(refusal):
                self._engine.admit(refusal)
            case EndRequests(why):
                self._engine.end_requests(why)
            case OpenModel(_name, model):
                self._weights.forget()
                self._engine.open(model)
            case Report(text):
                log.info("%s", text)
            case _:
                assert_never(effect)

    async def _sample(self) -> None:
        await asyncio.to_thread(self._sensors.disk.measure)
        while True:
            self._deliver(self._resources())
            await asyncio.sleep(SAMPLE_S)

    async def _discover(self) -> None:
        from coeld.net.discovery import discover  # zeroconf costs 4 MB

        await discover(
            self._identity.node,
            self._config.swarm.name,
            (self._config.network.host, self._bus.port),
            self._bus.connect,
        )

    async def _hand_over(self) -> None:
        """Let others take over what only this device serves, while it still serves it."""
        log.info("stopping when others have taken over; tell it again to stop at once")
        self._deliver(self._resources())
        for _ in range(round(HAND_OVER_S / GOODBYE_S)):
            await asyncio.sleep(GOODBYE_S)
            if not self._node.still_needed():
                break
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PARTING_S_MAX):
                while True:
                    stats = await self._engine.stats()
                    if not stats.get("guest_kv_bytes"):
                        return
                    await asyncio.sleep(GOODBYE_S)

    async def _say_goodbye(self) -> None:
        notify("STOPPING=1")
        for effect in self._node.leave():
            await self._perform(effect)
        await asyncio.sleep(GOODBYE_S)

    # What the API asks (coeld.api.server.Answering)

    def model(self) -> tuple[str, int] | None:
        return self._engine.serves

    def not_ready(self) -> NoModel:
        if self._weights.fetching:
            return Starting(f"no model can answer yet: fetching {self._weights.fetching}")
        return self._engine.not_ready()

    def generate(self, request: dict[str, Any]) -> AbstractAsyncContextManager[Answer]:
        return self._engine.generate(request)

    def _token(self, stats: Mapping[str, Any]) -> dict[str, Any] | None:
        """What a token of a lone request took here along the present routes, and should take."""
        demand, table = self._node.demand, self._node.switchover.table
        if demand is None or table is None or "costs" not in stats:
            return None
        records, costs = self._node.market.records(), learned(stats["costs"])
        predicted_us = expected_us(demand, table, self._node.node_id, records, costs)
        measured_us, error_percent = stats["token_us"] or None, None
        if predicted_us is not None and measured_us is not None:
            error_percent = round(100 * (predicted_us / measured_us - 1), 1)
        return {
            "predicted_us": predicted_us,
            "measured_us": measured_us,
            "error_percent": error_percent,
        }

    async def status(self) -> dict[str, Any]:
        stats = await self._engine.stats()
        return {
            "versions": {"coeld": __version__, "python": platform.python_version()},
            "node": self._node.status(),
            "engine": {
                "pid": self._engine.pid,
                "model": self._engine.model.name if self._engine.model else None,
                "trouble": self._engine.trouble,
                "load_trouble": self._node.migration.trouble(self._clock()),
                "restarts": self._engine.restarts,
                "context_tokens": self._engine.context_tokens,
                "kernels": self._engine.kernels.table() if self._engine.kernels else {},
                "links": [link._asdict() for link in self._engine.links],
                "token": self._token(stats),
                "stats": stats,
            },
            "sensors": self._sensors.status(),
            "weights": self._weights.status(),
            "bus": self._bus.status() | {"inbox_dropped": self._dropped},
            "agent": {
                "pid": os.getpid(),
                "rss_bytes": self._sensors.own_rss_bytes(),
                "budget_is_measured": self._sensors.budget_is_measured,
                "spans": self._config.swarm.spans,
                "state_dir": str(self._where.state_dir),
                "store_dir": str(self._where.store_dir),
                "socket": str(self._where.socket),
            },
        }

    # Configuration to parts

    def _bus_options(self) -> BusOptions:
        swarm, network = self._config.swarm, self._config.network
        return BusOptions(
            swarm=swarm.name,
            me=self._identity.node,
            incarnation=self._identity.incarnation,
            host=network.host,
            port=network.mqtt_port,
            seeds=tuple(split_address("swarm.neighbours", text) for text in swarm.neighbours),
            brokers=tuple(map(broker_at, swarm.brokers)),
            brokers_ca=swarm.brokers_ca,
            embedded=swarm.embedded,
        )

    def _make_node(self, blobs: socket.socket) -> Node:
        swarm = self._config.swarm
        config = NodeConfig(
            swarm=swarm.name,
            name=(self._config.device.name or socket.gethostname())[:64],
            mqtt_host=self._config.network.host if swarm.embedded else "",
            mqtt_port=self._bus.port or None,
            blob_host=self._config.network.host,
            blob_port=blobs.getsockname()[1],
            heartbeat_ms=swarm.heartbeat_ms,
            silence_ms=swarm.silence_ms,
            suspicion_ms=swarm.suspicion_ms,
            spans=swarm.spans,
            narrow=self._config.memory.narrow,
            context_tokens=self._config.engine.context_tokens,
        )
        return Node(self._identity.node, self._identity.incarnation, config, self._rng)

    def _engine_options(self) -> EngineOptions:
        engine = self._config.engine
        return EngineOptions(
            store_dir=self._where.store_dir,
            node=self._identity.node,
            swarm=self._config.swarm.name,
            host=self._config.network.host,
            port=self._config.network.data_port,
            threads=engine.threads or os.cpu_count() or 1,
            context_tokens=engine.context_tokens,
            requests_max=engine.requests_max,
            call_deadline_ms=engine.call_deadline_ms,
            patience_s=engine.patience_s,
            kl_budget=engine.kl_budget,
            calibration=self._where.state_dir / "calibration.json",
        )


def up(config: Config, engine_command: tuple[str, ...] = ENGINE_COMMAND) -> None:
    """Run a device in the foreground until it is told to stop. Raises StartError."""

    async def main() -> None:
        await Agent(config, places(config), engine_command).run()

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    for name in ("uvicorn", "asyncio"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        asyncio.run(main())
    except BaseExceptionGroup as group:
        raise _first(group) from None


def _on_signals(act: Callable[[], object]) -> None:
    """What to do when told to stop, from now on."""
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, act)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one error that ended a task group, out of its wrappings."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
