"""What a node may ask for. Values; one place in the agent performs them."""

from dataclasses import dataclass

from coeld.ids import Lot, ModelHash, NodeId
from coeld.messages import Message
from coeld.routes import RouteTable


@dataclass(frozen=True, slots=True)
class Publish:
    """To every device that listens."""

    message: Message


@dataclass(frozen=True, slots=True)
class Send:
    """To one device."""

    to: NodeId
    message: Message


@dataclass(frozen=True, slots=True)
class Connect:
    """Listen to this neighbour's broker (embedded topology). Idempotent."""

    node: NodeId
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Stop listening to this device's broker: it is no neighbour. Idempotent."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class LoadLots:
    """Read these lots from disk into the engine; answered by LotsLoaded or LoadFailed. Those that
    are in memory in the other width answer calls meanwhile."""

    lots: tuple[Lot, ...]
    narrow: bool = False
    """To be held in fewer bits than they are stored in."""


@dataclass(frozen=True, slots=True)
class DropLots:
    """Free these lots once no call is using them; answered by LotsDropped."""

    lots: tuple[Lot, ...]


@dataclass(frozen=True, slots=True)
class SwapRoutes:
    """Hand the data path a new table."""

    table: RouteTable


@dataclass(frozen=True, slots=True)
class Admit:
    """From now on begin no requests of this device and give `refusal` as the reason, answered by
    Drained as soon as none is under way; with an empty one, begin them again."""

    refusal: str


@dataclass(frozen=True, slots=True)
class EndRequests:
    """Requests of this device that are under way took too long: they fail, and `why` is told."""

    why: str


@dataclass(frozen=True, slots=True)
class OpenModel:
    """Let the open model go, with all of its lots, then open this one; EngineStarted tells."""

    name: str
    model: ModelHash


@dataclass(frozen=True, slots=True)
class Report:
    """One line for the log: something people want to know."""

    text: str


Effect = (
    Publish
    | Send
    | Connect
    | Disconnect
    | LoadLots
    | DropLots
    | SwapRoutes
    | Admit
    | EndRequests
    | OpenModel
    | Report
)
