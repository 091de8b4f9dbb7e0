"""Simulated devices and the network between them: the truth that views are compared with. Pure."""

from dataclasses import dataclass, field

from coeld.events import ReleaseFound
from coeld.ids import Lot, ModelHash, NodeId
from coeld.node import Node
from coeld.routes import RouteTable
from coeld.view import ModelDemand


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
    kernel_mb_per_s: int = 16_000
    """Fast enough for whole layers to be best: what is placed in parts is searched for longer."""
    disk_mb_per_s: int = 200
    engine: bool = True
    """False: a member of the swarm that runs no model."""
    open_s: float = 0.3
    """From letting one model go until the next is open."""


@dataclass(slots=True)
class Stalls:
    """A device with all its cores pinned: it gets to run now and then, for a moment."""

    run_s: float = 0.2
    """Longest time between two stalls."""
    mean_s: float = 0.3
    max_s: float = 2.0
    begins: float = 0.0
    ends: float = 0.0


@dataclass(slots=True, eq=False)
class Request:
    """Somebody's question, answered with one version of the model if it is answered."""

    model: ModelHash | None
    """None: it was refused."""
    outcome: str = ""
    """"done", "failed", or nothing yet."""


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
    narrow: set[Lot] = field(default_factory=set)
    """What is in memory, or is being read, in fewer bits than stored."""
    changing: set[Lot] = field(default_factory=set)
    """Serving, and being read in the other width."""
    left_memory: dict[Lot, float] = field(default_factory=dict)
    """When a lot was last dropped or lost."""
    table: RouteTable | None = None
    demand: ModelDemand | None = None
    """The model that its engine has open."""
    chosen: ModelDemand | None = None
    """The one to open; None: the world's."""
    found: dict[ModelHash, ReleaseFound] = field(default_factory=dict)
    """Versions on its disk, or on the way there."""
    refusal: str = ""
    requests: list[Request] = field(default_factory=list)
    tick_at: float = -1.0
    sent_bytes: int = 0
    sent_messages: int = 0
    heard_bytes: int = 0
    lots_loaded: int = 0
    pace: float = 1.0
    """Seconds of its clock per second."""
    ahead_s: float = 0.0
    """What its clock showed at time 0."""
    stalls: Stalls | None = None

    def clock(self, now: float) -> float:
        return self.ahead_s + now * self.pace
