"""Many nodes, one heap of future events, one virtual clock, one seed. No I/O, no real time.

The network delays, loses, repeats and reorders; devices crash with or without their neighbours
noticing, stall as if all their cores were busy, and have clocks that run at their own pace; engines
load at the speed of a disk. Links work as in the embedded topology: a device hears those whose
broker it listens to, whoever is listened to listens back, and shells restore links by themselves.
Every message is encoded; with `codec` it is also decoded again before it arrives. The same seed
gives the same trace, which is kept as one sha256.
"""

import hashlib
import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from random import Random
from typing import Any

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
from coeld.events import (
    Drained,
    EngineStarted,
    EngineStopped,
    Event,
    LoadFailed,
    LotsDropped,
    LotsLoaded,
    MessageReceived,
    NeighbourLost,
    ReleaseFound,
    ResourcesSampled,
    Tick,
)
from coeld.ids import Lot, ModelHash, NodeId
from coeld.messages import Delta, Message, Record, decode, encode
from coeld.node import Node, NodeConfig
from coeld.releases import Progress
from coeld.sim.device import Device, Network, Request, Spec, Stalls
from coeld.view import ModelDemand, Resources

MODEL = ModelDemand(ModelHash("5e" * 32), "simulated", 30, 8, 350_000, 30_000_000)
LINK_S = 0.005
"""How long a new link, or the reset of a broken one, takes."""
DRAIN_S = 0.02
TOPIC_BYTES = 48
"""What MQTT adds to a message: fixed header, length, and coeld/1/<swarm>/all/<sender>."""
SLOW_FACTOR = 100
REPORTS_MAX = 100_000
DECODED_MAX = 2000


class World:
    """Devices are numbered from 0; `seeds` are those whose brokers everyone is told of."""

    def __init__(
        self,
        seed: int,
        specs: Sequence[Spec],
        demand: ModelDemand = MODEL,
        config: NodeConfig | None = None,
        seeds: Sequence[int] = (0,),
        codec: bool = True,
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
        self.introductions = 0
        """How many others each device finds by itself when it starts, besides the seeds."""
        self.models = {demand.model: demand}
        """Every model that ever was open."""
        self.load_failure = 0.0
        """Probability that a batch fails to load."""
        self.reports: list[tuple[float, NodeId, str]] = []
        self.watchers: list[Callable[[World, Device, Effect], None]] = []
        self.observers: list[Callable[[Device, Event], None]] = []
        """Told of every event after the device has taken it."""
        self._codec = codec
        self._decoded: dict[str, Record] = {}
        """Texts of records that travelled lately, and what they were read as."""
        self._listeners: dict[NodeId, dict[NodeId, None]] = {id: {} for id in self.devices}
        """Who listens to whose broker."""
        self._split: dict[NodeId, int] = {}
        self._deaf: set[tuple[NodeId, NodeId]] = set()
        """(from, to): ways on which nothing arrives."""
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
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
        device.table, device.refusal = None, ""
        for other in self._found(device):
            self._listen(device.id, other)
        for listener in list(self._listeners[device.id]):  # their shells come back to its broker
            self._later(LINK_S, self._listen, device.id, listener)
        spec = device.spec
        resources = Resources(spec.budget_bytes, spec.budget_bytes, 5, spec.kernel_mb_per_s)
        self.feed(device, ResourcesSampled(resources))
        if spec.engine:
            self._later(engine_after_s, self.start_engine, device, device.life)

    def start_all(self, within_s: float = 0.3) -> None:
        for device in self.devices.values():
            self._later(self.rng.uniform(0, within_s), self.start, device)

    def acquaint(self) -> None:
        """Tell everybody who is up of everybody: the short way to a swarm that has formed."""
        devices = self.up()
        records = [d.node.perception.told for d in devices if d.node is not None]
        for index, device in enumerate(devices):
            teller = devices[index - 1].id
            self.feed(
                device, MessageReceived(teller, Delta(self.config.swarm, teller, 1, (*records,)))
            )

    def start_engine(self, device: Device, life: int) -> None:
        if device.node is not None and device.life == life and not device.engine:
            device.engines += 1
            device.engine = device.engines
            demand = device.demand = device.chosen or self.demand
            self.models[demand.model] = demand
            self.feed(device, EngineStarted(demand, f"{device.id}.local", 9000))
            for found in device.found.values():
                self.feed(device, found)

    def crash(self, device: Device, noticed: bool = True) -> None:
        """kill -9 of everything on a device; `noticed`: links are reset, else it just goes dark."""
        assert device.node is not None
        device.node = None
        self._empty(device)
        for broker, listeners in self._listeners.items():
            linked = device.id in listeners or (broker in self._listeners[device.id])
            if linked and noticed and self._reaches(device.id, broker):
                self._later(LINK_S, self._lost, broker, device.id)
            listeners.pop(device.id, None)

    def crash_engine(self, device: Device, restart_after_s: float = 1.0) -> None:
        if device.node is not None and device.engine:
            self._empty(device)
            self.feed(device, EngineStopped())
            self._later(restart_after_s, self.start_engine, device, device.life)

    def release(self, device: Device, demand: ModelDemand, progress: Progress) -> None:
        """A newer version of the model is so far on the way to the device's disk."""
        device.found[demand.model] = found = ReleaseFound(demand, progress)
        self.feed(device, found)

    def ask(self, device: Device, for_s: float) -> Request:
        """A request that takes so long, begun at this device unless it is refused."""
        if device.demand is None or device.refusal:
            return Request(None)
        request = Request(device.demand.model)
        device.requests.append(request)
        self._later(for_s, self._end, device, request, "done")
        return request

    def leave(self, device: Device) -> None:
        assert device.node is not None
        for effect in device.node.leave():
            self._perform(device, effect)
        device.node = None
        self._empty(device)
        for listeners in self._listeners.values():
            listeners.pop(device.id, None)

    def split(self, groups: Iterable[Iterable[Device]]) -> None:
        """Cut the network into islands; `split([])` heals it."""
        self._split = {d.id: i for i, group in enumerate(groups) for d in group}

    def deafen(self, ways: Iterable[tuple[Device, Device]]) -> None:
        """From now on nothing arrives on these ways (from, to); `deafen([])` heals it."""
        self._deaf = {(a.id, b.id) for a, b in ways}

    def jump(self, device: Device, seconds: float) -> None:
        """The device's clock jumps, forwards or backwards."""
        device.ahead_s += seconds
        device.tick_at = -1.0
        self._wake(device)

    def after(self, delay_s: float, action: Callable[..., None], *arguments: Any) -> None:
        """Have something happen later."""
        self._later(delay_s, action, *arguments)

    def run(self, for_s: float) -> None:
        end = self.now + for_s
        heap, pop = self._heap, heapq.heappop
        while heap and heap[0][0] <= end:
            self.now, _, action, arguments = pop(heap)
            action(*arguments)
        self.now = end

    def run_until(self, done: Callable[[], bool], limit_s: float, step_s: float = 0.01) -> float:
        """Virtual seconds until `done`, to 10 ms; asserts that it happens within `limit_s`."""
        start = self.now
        while not done():
            assert self.now - start <= limit_s, f"not done after {limit_s} s"
            self.run(step_s)
        return self.now - start

    def fingerprint(self) -> str:
        """sha256 of everything that happened."""
        return self._trace.hexdigest()

    # ---- the machine -----------------------------------------------------------------------

    def _later(self, delay_s: float, action: Callable[..., None], *arguments: Any) -> None:
        self._count += 1
        heapq.heappush(self._heap, (self.now + delay_s, self._count, action, arguments))

    def feed(self, device: Device, event: Event) -> None:
        """Let it happen; on a device that stalls, as soon as it runs again."""
        if device.node is None:
            return
        if device.stalls is not None:
            wait_s = self._stalled_s(device.stalls)
            if wait_s > 0:
                self._later(wait_s, self._feed_life, device, device.life, event)
                return
        self._trace.update(f"{self.now:.9f} {device.id} {type(event).__name__}\n".encode())
        for effect in device.node.step(event, device.clock(self.now)):
            self._perform(device, effect)
        for observer in self.observers:
            observer(device, event)
        self._wake(device)

    def _feed_life(self, device: Device, life: int, event: Event) -> None:
        if device.life == life:
            self.feed(device, event)

    def _stalled_s(self, stalls: Stalls) -> float:
        """How long it still does not run."""
        while stalls.ends <= self.now:
            stalls.begins = self.now + self.rng.uniform(0, stalls.run_s)
            length_s = min(stalls.max_s, self.rng.expovariate(1 / stalls.mean_s))
            stalls.ends = stalls.begins + length_s
        return stalls.ends - self.now if self.now >= stalls.begins else 0.0

    def _wake(self, device: Device) -> None:
        """Have a Tick at the node's deadline, a little late as real timers are."""
        node = device.node
        if node is None:
            return
        due = (node.deadline - device.ahead_s) / device.pace
        if self.now < device.tick_at <= due:
            return
        at = max(self.now, due) + self.rng.uniform(0, 0.001)
        device.tick_at = at
        self._later(at - self.now, self._tick, device, device.life, at)

    def _tick(self, device: Device, life: int, at: float) -> None:
        if device.node is None or device.life != life or device.tick_at != at:
            return
        device.tick_at = -1.0
        if device.node.deadline <= device.clock(self.now):
            self.feed(device, Tick())
        else:
            self._wake(device)

    def _perform(self, device: Device, effect: Effect) -> None:
        for watcher in self.watchers:
            watcher(self, device, effect)
        match effect:
            case Publish(message):
                self._say(device, list(self._listeners[device.id]), message)
            case Send(to, message):
                if to in self._listeners[device.id]:
                    self._say(device, [to], message)
            case Connect(node):
                self._later(LINK_S, self._link, device, device.life, node)
            case Disconnect(node):
                if node in self._listeners:
                    self._listeners[node].pop(device.id, None)
            case LoadLots(lots, narrow):
                self._load(device, lots, narrow)
            case DropLots(lots):
                device.serving -= set(lots)
                device.draining |= set(lots)
                self._later(DRAIN_S, self._engine_call(device, lots, self._dropped))
            case Admit(refusal):
                device.refusal = refusal
                self._tell_drained(device)
            case EndRequests():
                self._end_all(device)
            case OpenModel(_, model):
                device.chosen = device.found[model].demand
                self._empty(device)
                self._later(device.spec.open_s, self.start_engine, device, device.life)
            case SwapRoutes(table):
                device.table = table
            case Report(text):
                if len(self.reports) < REPORTS_MAX:
                    self.reports.append((self.now, device.id, text))

    def _say(self, device: Device, listeners: Iterable[NodeId], message: Message) -> None:
        data = encode(message)
        self._trace.update(data)
        received = self._read(message, data) if self._codec else message
        for listener in listeners:
            self._transmit(device, listener, received, len(data))

    def _read(self, message: Message, data: bytes) -> Message:
        """What arrives. A record goes from device to device: whoever sends it, it is read once."""
        if not isinstance(message, Delta):
            return decode(data)
        texts = [record.to_json() for record in message.records]
        if not self._decoded.keys() >= set(texts):
            arrived = decode(data)
            assert isinstance(arrived, Delta)
            if len(self._decoded) > DECODED_MAX:
                self._decoded.clear()
            self._decoded |= zip(texts, arrived.records, strict=True)
        return replace(message, records=tuple(map(self._decoded.__getitem__, texts)))

    def _transmit(self, device: Device, to: NodeId, message: Message, size: int) -> None:
        size += TOPIC_BYTES
        device.sent_bytes += size
        device.sent_messages += 1
        network, rng = self.network, self.rng
        if rng.random() < network.loss:
            return
        times = 2 if network.repeat and rng.random() < network.repeat else 1
        for _ in range(times):
            delay_s = rng.uniform(*network.delay_s)
            if network.slow and rng.random() < network.slow:
                delay_s *= SLOW_FACTOR
            self._later(delay_s, self._arrive, device.id, to, message, size)

    def _arrive(self, sender: NodeId, to: NodeId, message: Message, size: int) -> None:
        if self._reaches(sender, to):
            device = self.devices[to]
            device.heard_bytes += size
            self.feed(device, MessageReceived(sender, message))

    def _reaches(self, sender: NodeId, to: NodeId) -> bool:
        if self._deaf and (sender, to) in self._deaf:
            return False
        return not self._split or self._split.get(sender, 0) == self._split.get(to, 0)

    def _lost(self, who: NodeId, node: NodeId) -> None:
        self.feed(self.devices[who], NeighbourLost(node))

    # ---- links -----------------------------------------------------------------------------

    def _found(self, device: Device) -> list[NodeId]:
        """Whose brokers a device finds when it starts: seeds, and some others by chance."""
        found = [seed for seed in self.seeds if seed != device.id]
        if self.introductions:
            found += self.rng.sample(self.order, self.introductions + 1)
        return [id for id in dict.fromkeys(found) if id != device.id]

    def _link(self, device: Device, life: int, node: NodeId) -> None:
        if device.node is not None and device.life == life and node in self.devices:
            self._listen(device.id, node)

    def _listen(self, listener: NodeId, broker: NodeId) -> None:
        """Listen at a broker; its owner sees the calling card and listens back."""
        if listener == broker or self.devices[listener].node is None:
            return
        fresh = listener not in self._listeners[broker]
        self._listeners[broker][listener] = None
        if fresh and broker not in self._listeners[listener]:
            self._later(LINK_S, self._listen, broker, listener)

    # ---- engines ---------------------------------------------------------------------------

    def _end(self, device: Device, request: Request, outcome: str) -> None:
        if request in device.requests:
            device.requests.remove(request)
            request.outcome = outcome
            self._tell_drained(device)

    def _end_all(self, device: Device) -> None:
        for request in list(device.requests):
            self._end(device, request, "failed")

    def _tell_drained(self, device: Device) -> None:
        if device.refusal and not device.requests:
            self._later(0, self._feed_life, device, device.life, Drained())

    def _empty(self, device: Device) -> None:
        device.engine, device.demand = 0, None
        self._end_all(device)
        device.left_memory |= dict.fromkeys(device.serving | device.draining, self.now)
        for held in (device.serving, device.loading, device.draining, device.changing):
            held.clear()
        device.narrow.clear()

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

    def _load(self, device: Device, lots: tuple[Lot, ...], narrow: bool) -> None:
        assert not (device.loading | device.changing) & set(lots)
        assert device.demand is not None
        device.changing |= set(lots) & device.serving
        device.loading |= set(lots) - device.serving
        if narrow:
            device.narrow |= set(lots) - device.serving
        seconds = len(lots) * device.demand.lot_bytes / (device.spec.disk_mb_per_s * 1e6)
        failed = self.rng.random() < self.load_failure
        action = self._failed if failed else self._loaded
        self._later(seconds, self._engine_call(device, lots, action))

    def _loaded(self, device: Device, lots: tuple[Lot, ...]) -> None:
        device.narrow ^= set(lots) & device.changing
        device.changing -= set(lots)
        device.loading -= set(lots)
        device.serving |= set(lots)
        device.lots_loaded += len(lots)
        self.feed(device, LotsLoaded(lots))

    def _failed(self, device: Device, lots: tuple[Lot, ...]) -> None:
        device.narrow -= set(lots) & device.loading
        device.changing -= set(lots)
        device.loading -= set(lots)
        self.feed(device, LoadFailed(lots, "simulated read error"))

    def _dropped(self, device: Device, lots: tuple[Lot, ...]) -> None:
        device.draining -= set(lots)
        device.narrow -= set(lots)
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
