"""The experts this device holds in memory: loaded, dropped and run while tokens flow.

All held experts of a layer share one session; when one comes or goes the layer's session is built
anew beside the old one and swapped in, so a run never waits for a load. Threads: the loader
changes the set, the decoder and the peers' connections run it.
"""

import threading
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from coeld.engine.graphs import expert_graph
from coeld.engine.sessions import make_session
from coeld.errors import PeerRefused
from coeld.ids import Lot
from coeld.model.manifest import Manifest, tensor_bytes
from coeld.model.store import Store


@dataclass(frozen=True, slots=True)
class Resident:
    """The experts of one layer that are here, in the order of the session's neurons."""

    experts: tuple[int, ...]
    session: ort.InferenceSession


class ExpertSet:
    """Lots in memory, by layer."""

    def __init__(self, manifest: Manifest, store: Store) -> None:
        self._manifest = manifest
        self._store = store
        self._layers: dict[int, Resident] = {}
        self._held: frozenset[Lot] = frozenset()
        self._fused = False
        self._change = threading.Lock()
        """Held while the set changes; running takes no lock."""

    @property
    def lots(self) -> frozenset[Lot]:
        """What is in memory, in whichever form."""
        return self._held

    @property
    def bytes(self) -> int:
        experts = self._manifest.experts
        return sum(tensor_bytes(experts[lot.layer][lot.expert]) for lot in self._held)

    def here(self, layer: int) -> frozenset[int]:
        """Experts of the layer that `run` can run."""
        resident = self._layers.get(layer)
        return frozenset(resident.experts) if resident else frozenset()

    def load(self, lots: Iterable[Lot]) -> None:
        """Read these lots from the store. Raises ModelError if a blob is missing or damaged."""
        with self._change:
            added = frozenset(lots) - self._held
            if not self._fused:
                for layer in sorted({lot.layer for lot in added}):
                    self._rebuild(layer, self._held | added)
            self._held |= added

    def drop(self, lots: Iterable[Lot]) -> None:
        """Let go of these lots; a run that has begun finishes."""
        with self._change:
            kept = self._held - frozenset(lots)
            gone = self._held - kept
            self._held = kept
            if not self._fused:
                for layer in sorted({lot.layer for lot in gone}):
                    self._rebuild(layer, kept)

    def fuse(self) -> None:
        """Give up the layers' own sessions: the spans contain these experts now."""
        with self._change:
            self._fused = True
            self._layers = {}

    def unfuse(self) -> None:
        """Build the layers' own sessions again, for peers to call."""
        with self._change:
            self._fused = False
            for layer in sorted({lot.layer for lot in self._held}):
                self._rebuild(layer, self._held)

    def run(
        self, layer: int, experts: Collection[int], x: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Sum of the outputs of `experts` on every row of x (n, H).

        Raises PeerRefused when one of them is not here (any more).
        """
        resident = self._layers.get(layer)
        wanted = frozenset(experts)
        if resident is None or not wanted.issubset(resident.experts):
            raise PeerRefused(f"layer {layer}: not all of the experts {sorted(wanted)} are here")
        mask = _mask(resident.experts, wanted, self._manifest.shape.expert_width)
        result: NDArray[np.float32] = resident.session.run(("y",), {"x": x, "mask": mask})[0]
        return result

    def _rebuild(self, layer: int, held: frozenset[Lot]) -> None:
        experts = tuple(sorted(lot.expert for lot in held if lot.layer == layer))
        layers = dict(self._layers)
        layers.pop(layer, None)
        if experts:
            graph = expert_graph(self._manifest, self._store, layer, experts)
            session = make_session(graph.nodes, graph.inputs, graph.outputs, graph.weights)
            layers[layer] = Resident(experts, session)
        self._layers = layers


@lru_cache(maxsize=1024)
def _mask(resident: tuple[int, ...], wanted: frozenset[int], width: int) -> NDArray[np.float32]:
    """(1, len(resident) * width): 1 for the neurons of wanted experts."""
    flags = np.array([[expert in wanted for expert in resident]], np.float32)
    return np.repeat(flags, width, axis=1)
