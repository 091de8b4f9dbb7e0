"""Many nodes, one heap of future events, one virtual clock, one seed. No I/O, no real time.

Every message goes through the real codec. The network delays, loses, repeats and reorders; devices
crash with or without their neighbours noticing; engines load at the speed of a disk. Links work
as in the embedded topology: a device hears those whose broker it was told to listen to, and its
shell restores links by itself. The same seed gives the same trace, which is kept as one sha256.
"""

import hashlib
import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from random import Random

from coeld.effects import (
    Connect,
    DropLots,
    Effect,
    LoadLots,
    Publish,
    Report,
    Send,
    SwapRoutes,
)
from coeld.events import (
    EngineStarted,
    EngineStopped,
    Event,
    LoadFailed,
    LotsDropped,
    LotsLoaded,
    MessageReceived,
    NeighbourLost,
    ResourcesSampled,
    Tick,
)
from coeld.ids import Lot, ModelHash, NodeId
from coeld.messages import decode, encode
from coeld.node import Node, NodeConfig
from coeld.routes import RouteTable
from coeld.view import ModelDemand, Resources

MODEL = ModelDemand(ModelHash("5e" * 32), "simulated", 30, 8, 350_000, 30_000_000)
RELINK_S = 0.2
DRAIN_S = 0.02
RESET_S = 0.005
"""How long a peer's TCP reset takes to arrive when a process dies."""


@dataclass(slots=True)
class Network:
    """How badly messages travel."""

    delay_s: tuple[float, float] = (0.0005, 0.003)
    loss: float = 0.0
    repeat: float = 0.0
    slow: float = 0.0
    """Share of messages that take 100 times as long: these overtake and are overtaken."""


@dataclass(frozen=True, slots=True)
class Spec:
    """One device: what it has and how fast it reads its disk."""

    budget_bytes: int
    kernel_mb_per_s: int = 4000
    disk_mb_per_s: int = 200


@dataclass(slots=True)
class Device:
    """A device as the world sees it: the truth that checkers compare views with."""

    id: NodeId
    spec: Spec
    life: int = 0
    node: Node | None = None
    engine: int = 0
    """Counts engine processes; 0: none runs."""
    engines: int = 0
    serving: set[Lot] = field(default_factory=set)
    loading: set[Lot] = field(default_factory=set)
    draining: set[Lot] = field(default_factory=set)
    left_memory: dict[Lot, float] = field(default_factory=dict)
    """When a lot was last dropped or lost."""
    table: RouteTable | None = None
    tick_at: float = -1.0
    sent_bytes: int = 0
    sent_messages: int = 0


class World:
    """Devices are numbered from 0; `seeds` are those whose brokers everyone is told of."""

    def __init__(
        self,
        seed: int,
        specs: Sequence[Spec],
        demand: ModelDemand = MODEL,
        config: NodeConfig | None = None,
        seeds: Sequence[int] = (0,),
    ) -> None:
        self.rng = Random(seed)
        self.now = 1000.0
        self.demand = demand
        self.network = Network()
        self.config = config or NodeConfig()
        self.devices = {
            id: Device(id, spec) for id, spec in zip(_ids(seed, len(specs)), specs, strict=True)
        }
        self.order = list(self.devices)
        self.seeds = [self.order[i] for i in seeds]
        self.load_failure = 0.0
        """Probability that a batch fails to load."""
        self.reports: list[tuple[float, NodeId, str]] = []
        self.watchers: list[Callable[[World, Device, Effect], None]] = []
        self._links: set[tuple[NodeId, NodeId]] = set()
        self._split: dict[NodeId, int] = {}
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._trace = hashlib.sha256()

    # ---- what tests do ---------------------------------------------------------------------

    def device(self, index: int) -> Device:
        return self.devices[self.order[index]]

    def up(self) -> list[Device]:
        return [device for device in self.devices.values() if device.node is not None]

    def start(self, device: Device, engine_after_s: float = 0.1) -> None:
        """A new life: fresh node, higher incarnation, engine a little later."""
        device.life += 1
        config = _named(self.config, device.id)
        device.node = Node(device.id, device.life, config, Random(self.rng.getrandbits(64)))
        device.table = None
        self._links |= {(device.id, seed) for seed in self.seeds if seed != device.id}
        spec = device.spec
        resources = Resources(spec.budget_bytes, spec.budget_bytes, 5, spec.kernel_mb_per_s)
        self.feed(device, ResourcesSampled(resources))
        self._later(engine_after_s, lambda life=device.life: self.start_engine(device, life))  # type: ignore[misc]

    def start_all(self) -> None:
        for device in self.devices.values():
            self._later(self.rng.uniform(0, 0.3), lambda device=device: self.start(device))  # type: ignore[misc]

    def start_engine(self, device: Device, life: int) -> None:
        if device.node is not None and device.life == life and not device.engine:
            device.engines += 1
            device.engine = device.engines
            self.feed(device, EngineStarted(self.demand, f"{device.id}.local", 9000))

    def crash(self, device: Device, noticed: bool = True) -> None:
        """kill -9 of everything on a device; `noticed`: links are reset, else it just goes dark."""
        assert device.node is not None
        device.node = None
        self._empty(device)
        for listener, broker in sorted(self._links):
            other = listener if broker == device.id else broker if listener == device.id else None
            if other and noticed and self._connected(device.id, other):
                self._later(RESET_S, lambda other=other: self._lost(other, device.id))  # type: ignore[misc]
        self._links = {link for link in self._links if link[0] != device.id}

    def crash_engine(self, device: Device, restart_after_s: float = 1.0) -> None:
        if device.node is not None and device.engine:
            self._empty(device)
            self.feed(device, EngineStopped())
            self._later(restart_after_s, lambda life=device.life: self.start_engine(device, life))  # type: ignore[misc]

    def leave(self, device: Device) -> None:
        assert device.node is not None
        for effect in device.node.leave():
            self._perform(device, effect)
        device.node = None
        self._empty(device)

    def split(self, groups: Iterable[Iterable[Device]]) -> None:
        """Cut the network into islands; `split([])` heals it."""
        self._split = {d.id: i for i, group in enumerate(groups) for d in group}

    def run(self, for_s: float) -> None:
        end = self.now + for_s
        while self._heap and self._heap[0][0] <= end:
            self.now, _, action = heapq.heappop(self._heap)
            action()
        self.now = end

    def run_until(self, done: Callable[[], bool], limit_s: float) -> float:
        """Virtual seconds until `done`, to 10 ms; asserts that it happens within `limit_s`."""
        start = self.now
        while not done():
            assert self.now - start <= limit_s, f"not done after {limit_s} s"
            self.run(0.01)
        return self.now - start

    def fingerprint(self) -> str:
        """sha256 of everything that happened."""
        return self._trace.hexdigest()

    # ---- the machine -----------------------------------------------------------------------

    def _later(self, delay_s: float, action: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._heap, (self.now + delay_s, self._count, action))

    def feed(self, device: Device, event: Event) -> None:
        if device.node is None:
            return
        self._trace.update(f"{self.now:.9f} {device.id} {type(event).__name__}\n".encode())
        for effect in device.node.step(event, self.now):
            self._perform(device, effect)
        self._wake(device)

    def _wake(self, device: Device) -> None:
        """Have a Tick at the node's deadline, a little late as real timers are."""
        node = device.node
        if node is None or self.now < device.tick_at <= node.deadline:
            return
        at = max(self.now, node.deadline) + self.rng.uniform(0, 0.001)
        device.tick_at = at

        def tick(life: int = device.life) -> None:
            if device.node is not None and device.life == life and device.tick_at == at:
                device.tick_at = -1.0
                if device.node.deadline <= self.now:
                    self.feed(device, Tick())
                else:
                    self._wake(device)

        self._later(at - self.now, tick)

    def _perform(self, device: Device, effect: Effect) -> None:
        for watcher in self.watchers:
            watcher(self, device, effect)
        match effect:
            case Publish(message):
                data = encode(message)
                for listener, broker in sorted(self._links):
                    if broker == device.id:
                        self._transmit(device, listener, data)
            case Send(to, message):
                if {(device.id, to), (to, device.id)} & self._links:
                    self._transmit(device, to, encode(message))
            case Connect(node):
                link = (device.id, node)
                self._later(RESET_S, lambda: self._links.add(link))
            case LoadLots(lots):
                self._load(device, lots)
            case DropLots(lots):
                device.serving -= set(lots)
                device.draining |= set(lots)
                self._later(DRAIN_S, self._engine_call(device, lots, self._dropped))
            case SwapRoutes(table):
                device.table = table
            case Report(text):
                self.reports.append((self.now, device.id, text))

    def _transmit(self, device: Device, to: NodeId, data: bytes) -> None:
        device.sent_bytes += len(data)
        device.sent_messages += 1
        self._trace.update(to.encode() + data)
        network = self.network
        if self.rng.random() < network.loss:
            return
        for _ in range(2 if self.rng.random() < network.repeat else 1):
            delay_s = self.rng.uniform(*network.delay_s)
            delay_s *= 100 if self.rng.random() < network.slow else 1
            self._later(delay_s, lambda: self._arrive(device.id, to, data))

    def _arrive(self, sender: NodeId, to: NodeId, data: bytes) -> None:
        if self._connected(sender, to):
            self.feed(self.devices[to], MessageReceived(sender, decode(data)))

    def _connected(self, a: NodeId, b: NodeId) -> bool:
        return self._split.get(a, 0) == self._split.get(b, 0)

    def _lost(self, who: NodeId, node: NodeId) -> None:
        self.feed(self.devices[who], NeighbourLost(node))

    # ---- engines ---------------------------------------------------------------------------

    def _empty(self, device: Device) -> None:
        device.engine = 0
        device.left_memory |= dict.fromkeys(device.serving | device.draining, self.now)
        for held in (device.serving, device.loading, device.draining):
            held.clear()

    def _engine_call(
        self,
        device: Device,
        lots: tuple[Lot, ...],
        action: Callable[[Device, tuple[Lot, ...]], None],
    ) -> Callable[[], None]:
        """`action` later, unless the engine has died by then."""
        engine = device.engine

        def call() -> None:
            if engine and device.engine == engine:
                action(device, lots)

        return call

    def _load(self, device: Device, lots: tuple[Lot, ...]) -> None:
        assert not device.loading & set(lots)
        device.loading |= set(lots)
        seconds = len(lots) * self.demand.lot_bytes / (device.spec.disk_mb_per_s * 1e6)
        failed = self.rng.random() < self.load_failure
        action = self._failed if failed else self._loaded
        self._later(seconds, self._engine_call(device, lots, action))

    def _loaded(self, device: Device, lots: tuple[Lot, ...]) -> None:
        device.loading -= set(lots)
        device.serving |= set(lots)
        self.feed(device, LotsLoaded(lots))

    def _failed(self, device: Device, lots: tuple[Lot, ...]) -> None:
        device.loading -= set(lots)
        self.feed(device, LoadFailed(lots, "simulated read error"))

    def _dropped(self, device: Device, lots: tuple[Lot, ...]) -> None:
        device.draining -= set(lots)
        device.left_memory |= dict.fromkeys(lots, self.now)
        self.feed(device, LotsDropped(lots))


def _ids(seed: int, count: int) -> list[NodeId]:
    return [
        NodeId(hashlib.sha256(f"{seed}/{index}".encode()).hexdigest()[:16])
        for index in range(count)
    ]


def _named(config: NodeConfig, id: NodeId) -> NodeConfig:
    fields = {name: getattr(config, name) for name in NodeConfig.__slots__}
    return NodeConfig(**fields | {"name": id[:4], "mqtt_host": f"{id}.local", "mqtt_port": 1883})
