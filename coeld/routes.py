"""The route table: which devices serve which lot, at which address, in which epoch.

Written by the node (control plane), read by the data path. It is immutable and replaced whole:
a reader takes one reference per attempt at a layer and sees one epoch. The last table keeps
serving when the control plane is gone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from coeld.errors import FrameError
from coeld.ids import Lot, ModelHash, NodeId

OWNERS_PER_LOT_MAX = 8
LAYERS_MAX = 1024
EXPERTS_PER_LAYER_MAX = 4096


class Leg(NamedTuple):
    """Layers first..stop-1 of a request in one go at one device: attention, KV cache, experts."""

    node: NodeId
    first: int
    stop: int


@dataclass(frozen=True, slots=True)
class RouteTable:
    """Owners of every lot that somebody serves, nearest first.

    `missing_bytes` is what the alive devices could not take, once the auction is settled: 0 while
    everything is covered or while an owner is still loading. A lot that is in neither state is
    simply absent from `owners`, and the data path waits for the next epoch.
    """

    model: ModelHash
    epoch: int
    owners: Mapping[Lot, tuple[NodeId, ...]]
    addresses: Mapping[NodeId, tuple[str, int]] = field(default_factory=dict)
    """host, port of the data path of every alive device with this model, owner or not: whoever is
    here may call."""
    missing_bytes: int = 0
    legs: tuple[Leg, ...] = ()
    """The way of the requests that this device decodes through all layers, in order, without gaps;
    empty: every layer's attention here. Ways differ between devices; epochs do not tell them."""
    spans: tuple[Leg, ...] = ()
    """Legs that devices serve whole to whoever asks: layers in them may be compiled into one graph
    there, and are then not called expert by expert."""
    narrow: tuple[int, ...] = ()
    """Layers whose experts are held in fewer bits than they are stored in, at least some, or are
    about to be; ascending."""

    def owners_of(self, lot: Lot) -> tuple[NodeId, ...]:
        return self.owners.get(lot, ())

    def to_json(self) -> dict[str, Any]:
        """A plain value: {"model", "epoch", "owners": [[layer, expert, node, …]], …}."""
        return {
            "model": self.model,
            "epoch": self.epoch,
            "owners": [[*lot, *nodes] for lot, nodes in sorted(self.owners.items())],
            "addresses": {node: list(address) for node, address in sorted(self.addresses.items())},
            "missing_bytes": self.missing_bytes,
            "legs": [list(leg) for leg in self.legs],
            "spans": [list(leg) for leg in self.spans],
            "narrow": list(self.narrow),
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "RouteTable":
        """The inverse of `to_json`. Raises FrameError on anything malformed."""
        try:
            return RouteTable(
                model=ModelHash(str(value["model"])),
                epoch=int(value["epoch"]),
                owners={
                    Lot(int(row[0]), int(row[1])): tuple(NodeId(str(n)) for n in row[2:])
                    for row in value["owners"]
                },
                addresses={
                    NodeId(str(n)): (str(a[0]), int(a[1])) for n, a in value["addresses"].items()
                },
                missing_bytes=int(value["missing_bytes"]),
                legs=_legs(value["legs"]),
                spans=_legs(value["spans"]),
                narrow=tuple(map(int, value["narrow"])),
            )
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as exc:
            raise FrameError(f"malformed route table: {exc!r}") from exc


def _legs(rows: Any) -> tuple[Leg, ...]:
    return tuple(Leg(NodeId(str(node)), int(first), int(stop)) for node, first, stop in rows)
