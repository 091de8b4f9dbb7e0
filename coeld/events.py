"""What can happen to a node. The shell turns the world into these; the node decides.

Every event carries everything the node needs: no handles, no clocks.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from coeld.ids import Lot, NodeId
from coeld.measured import MeasuredLink
from coeld.messages import Message
from coeld.releases import Progress
from coeld.view import ModelDemand, Resources


@dataclass(frozen=True, slots=True)
class Tick:
    """`Node.deadline` has passed."""


@dataclass(frozen=True, slots=True)
class MessageReceived:
    """A decoded control message arrived from `sender` over any broker."""

    sender: NodeId
    message: Message


@dataclass(frozen=True, slots=True)
class NeighbourLost:
    """A broker link to `node` broke, or its last will arrived: a reason to suspect, no more."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class BrokersReached:
    """The last of the user's own brokers has gone (`any` is False), or the first is back.

    Without one nobody can be heard, which says nothing about anybody."""

    any: bool


@dataclass(frozen=True, slots=True)
class CallFailed:
    """The data path could not reach `node`: a reason to suspect, no more."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class ResourcesSampled:
    resources: Resources


@dataclass(frozen=True, slots=True)
class LinksMeasured:
    """What the links to the devices that this engine calls or probes are like now."""

    links: tuple[MeasuredLink, ...]


@dataclass(frozen=True, slots=True)
class EngineStarted:
    """The engine runs, has opened the model's trunk (None: no model installed yet), listens."""

    demand: ModelDemand | None
    data_host: str
    data_port: int


@dataclass(frozen=True, slots=True)
class EngineStopped:
    """The engine died: nothing is held in memory any more."""


@dataclass(frozen=True, slots=True)
class LotsLoaded:
    lots: tuple[Lot, ...]


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """These lots are not in memory and will not be; `why` is for people."""

    lots: tuple[Lot, ...]
    why: str


@dataclass(frozen=True, slots=True)
class LotsDropped:
    lots: tuple[Lot, ...]


@dataclass(frozen=True, slots=True)
class Used:
    """What this device itself was asked for since the engine last told."""

    requests: int
    prompt_tokens: int
    tokens: int
    """Generated."""
    experts: Mapping[int, tuple[int, ...]]
    """By layer, where the engine sees it: how many rows used each expert."""


@dataclass(frozen=True, slots=True)
class ReleaseFound:
    """A newer version of the open model is coming to this device's disk, or cannot."""

    demand: ModelDemand
    progress: Progress


@dataclass(frozen=True, slots=True)
class Drained:
    """No request of this device is under way, and none begins (see Admit)."""


Event = (
    Tick
    | MessageReceived
    | NeighbourLost
    | BrokersReached
    | CallFailed
    | ResourcesSampled
    | LinksMeasured
    | EngineStarted
    | EngineStopped
    | LotsLoaded
    | LoadFailed
    | LotsDropped
    | Used
    | ReleaseFound
    | Drained
)
