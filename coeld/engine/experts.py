"""The experts this device holds in memory: loaded, dropped and run while tokens flow.

All held experts of a layer share one session; when one comes or goes the layer's session is built
anew beside the old one and swapped in, so a run never waits for a load. Layers whose experts are
compiled into the trunk's spans have no session of their own. Threads: the loader changes the set,
the decoder and the peers' connections run it.
"""

import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from coeld.datapath.ports import Held
from coeld.engine.feed_forward import session_order
from coeld.engine.graphs import expert_graph
from coeld.engine.narrow import NarrowBlobs
from coeld.engine.sessions import Session, let_go, make_session
from coeld.engine.side_by_side import never, side_by_side
from coeld.errors import BadChecksum, PeerRefused
from coeld.ids import Lot
from coeld.model.manifest import BlobRef, Manifest, tensor_bytes
from coeld.model.narrow import narrow_ref, narrowed
from coeld.model.store import Store

NONE: Final = Held()


class LotsDamaged(BadChecksum):
    """Blobs of these lots are missing or damaged. The others that were asked for are loaded."""

    def __init__(self, message: str, lots: frozenset[Lot]) -> None:
        super().__init__(message)
        self.lots = lots


@dataclass(frozen=True, slots=True)
class Resident:
    """The experts of one layer that are here; their order is that of the session's gate columns."""

    held: Held
    session: Session
    places: Mapping[int, int]
    """Where each is among them."""


class ExpertSet:
    """Lots in memory, by layer."""

    def __init__(
        self, manifest: Manifest, store: Store, gently: Callable[[], bool] = never
    ) -> None:
        self._manifest = manifest
        self._gently = gently
        self._store = store
        self._layers: dict[int, Resident] = {}
        self._held: frozenset[Lot] = frozenset()
        self._narrow: frozenset[Lot] = frozenset()
        """Those of them that are here in fewer bits than they are stored in."""
        self._fused: frozenset[int] = frozenset()
        self._change = threading.Lock()
        """Held while the set changes; running takes no lock."""

    @property
    def lots(self) -> frozenset[Lot]:
        """What is in memory, in whichever form."""
        return self._held

    @property
    def fusible(self) -> frozenset[Lot]:
        """What the trunk's spans may contain: they are built from what is stored."""
        return self._held - self._narrow

    @property
    def bytes(self) -> int:
        shape, experts = self._manifest.shape, self._manifest.experts
        stored = sum(tensor_bytes(experts[lot.layer][lot.expert]) for lot in self.fusible)
        narrow = (narrow_ref(shape, experts[lot.layer][lot.expert]) for lot in self._narrow)
        return stored + sum(map(tensor_bytes, narrow))

    def here(self, layer: int) -> Held:
        """Experts of the layer that `run` can run."""
        resident = self._layers.get(layer)
        return resident.held if resident else NONE

    def load(self, lots: Iterable[Lot], narrow: bool = False) -> None:
        """Read these lots from the store, to hold them as they are stored, or `narrow`.

        One that is here in the other form changes it, and answers meanwhile. Raises LotsDamaged
        once all that are sound are here, if others are not.
        """
        with self._change:
            there = self._held & self._narrow if narrow else self.fusible
            added = frozenset(lots) - there
            bad: dict[Lot, BlobRef] = {}

            def check(layer: int) -> None:
                bad.update(self._damaged(layer, added))

            def then() -> tuple[frozenset[Lot], frozenset[Lot]]:
                """What is held, and of that narrow, when the sound ones are here."""
                good = added.difference(bad)
                return self._held | good, self._narrow | good if narrow else self._narrow - good

            def built(layer: int) -> Resident | None:
                sound = any(lot.layer == layer and lot not in bad for lot in added)
                return self._built(layer, *then()) if sound and layer not in self._fused else None

            layers = sorted({lot.layer for lot in added})
            residents = side_by_side(check, built, layers, self._gently)
            for layer, resident in zip(layers, residents, strict=True):
                if resident is not None:
                    self._swap(layer, resident)
            self._held, self._narrow = then()
            if bad:
                complaint = self._store.complaint(list(bad.values()))
                raise LotsDamaged(complaint, frozenset(bad))

    def drop(self, lots: Iterable[Lot]) -> None:
        """Let go of these lots; a run that has begun finishes."""
        with self._change:
            kept = self._held - frozenset(lots)
            gone = self._held - kept
            self._held, self._narrow = kept, self._narrow & kept
            self._rebuild({lot.layer for lot in gone} - self._fused, kept)

    def hold_fused(self, lots: Iterable[Lot]) -> None:
        """Hold lots that the trunk's spans are about to contain: no sessions of their own.

        `verify_layers` is to be called before a span is built.
        """
        with self._change:
            held = frozenset(lots)
            self._fused |= {lot.layer for lot in held}
            self._held |= held

    def verify_layers(self, layers: Iterable[int]) -> None:
        """Read the layers' held blobs. Raises BadChecksum if one is missing or damaged."""
        self._store.verify(self._refs(layers, self._held).values())

    def fuse(self, layers: Collection[int]) -> None:
        """Give up the sessions of these layers: the spans contain their experts now."""
        with self._change:
            self._fused |= frozenset(layers)
            for layer in self._layers.keys() & self._fused:
                self._swap(layer, None)

    def unfuse(self, layers: Collection[int]) -> None:
        """Build the sessions of these layers again, for peers to call."""
        with self._change:
            some = self._fused & frozenset(layers)
            self._rebuild(some, self._held)
            self._fused -= some

    def run(
        self,
        layer: int,
        experts: Sequence[int],
        x: NDArray[np.float32],
        gates: NDArray[np.float32] | None,
    ) -> NDArray[np.float32]:
        """Sum over `experts` of gate * expert(x) for every row of x (n, H).

        `gates` (n, len(experts)), None: all 1. Raises PeerRefused when one of them is not here
        (any more).
        """
        resident = self._layers.get(layer)
        if resident is None or not resident.held.experts.issuperset(experts):
            raise PeerRefused(f"layer {layer}: not all of the experts {list(experts)} are here")
        if gates is None or experts != resident.held.order:
            columns = np.zeros((len(x), len(resident.held.order)), np.float32)
            columns[:, [resident.places[expert] for expert in experts]] = (
                1 if gates is None else gates
            )
            gates = columns
        result: NDArray[np.float32] = resident.session.ort.run(("y",), {"x": x, "gates": gates})[0]
        return result

    def _damaged(self, layer: int, lots: frozenset[Lot]) -> dict[Lot, BlobRef]:
        """Lots of the layer that cannot be loaded. If one of them is here in its other form, that
        is all of them: without its blob no session for the layer can be built."""
        refs = self._refs([layer], lots)
        names = {ref.sha256 for ref in self._store.damaged(refs.values())}
        bad = {lot: ref for lot, ref in refs.items() if ref.sha256 in names}
        return refs if self._held.intersection(bad) else bad

    def _refs(self, layers: Iterable[int], lots: frozenset[Lot]) -> dict[Lot, BlobRef]:
        some, experts = frozenset(layers), self._manifest.experts
        chosen = sorted(lot for lot in lots if lot.layer in some)
        return {lot: experts[lot.layer][lot.expert] for lot in chosen}

    def _built(self, layer: int, held: frozenset[Lot], narrow: frozenset[Lot]) -> Resident | None:
        """The layer with its held experts, None if there are none."""
        ids = [lot.expert for lot in held if lot.layer == layer]
        manifest = narrowed(self._manifest, [lot for lot in narrow if lot.layer == layer])
        experts = session_order(manifest, layer, ids)
        if not experts:
            return None
        graph = expert_graph(manifest, NarrowBlobs(self._store), layer, experts)
        places = {expert: place for place, expert in enumerate(experts)}
        return Resident(Held(experts), make_session(graph), places)

    def _rebuild(self, layers: Collection[int], held: frozenset[Lot]) -> None:
        """The sessions of these layers, with what is held of them."""
        some = sorted(layers)

        def built(layer: int) -> Resident | None:
            return self._built(layer, held, self._narrow)

        residents = side_by_side(lambda _layer: None, built, some, self._gently)
        for layer, resident in zip(some, residents, strict=True):
            self._swap(layer, resident)

    def _swap(self, layer: int, resident: Resident | None) -> None:
        layers = {k: v for k, v in self._layers.items() if k != layer}
        if resident is not None:
            layers[layer] = resident
        old = self._layers.get(layer)
        self._layers = layers
        if old is not None:
            let_go([old], self._gently)
