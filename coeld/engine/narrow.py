"""Blobs of which some exist in their narrow form only: made while a graph is being built.

Kept until that graph's session exists, since a merged block reads each of them several times.
"""

from pathlib import Path

from coeld.compression.requantize import requantize
from coeld.engine.weights import Array
from coeld.model.manifest import BlobRef
from coeld.model.narrow import Narrow
from coeld.model.store import Store


class NarrowBlobs:
    """A store, as far as the engine reads it (coeld.engine.weights.Blobs). For one graph."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._made: dict[str, dict[str, Array]] = {}

    def blob_path(self, ref: BlobRef) -> Path | None:
        return None if isinstance(ref, Narrow) else self._store.blob_path(ref)

    def tensors(self, ref: BlobRef) -> dict[str, Array]:
        """Raises BadChecksum when the stored blob is missing."""
        if not isinstance(ref, Narrow):
            return self._store.tensors(ref)
        if ref.sha256 not in self._made:
            self._made[ref.sha256] = _narrow(self._store.tensors(ref.source))
        return self._made[ref.sha256]


def _narrow(tensors: dict[str, Array]) -> dict[str, Array]:
    """The tensors of an expert in 8 bits, in 4."""
    made = dict(tensors)
    for name in ("fc1", "fc2"):
        w, s = requantize(tensors[f"{name}.w"][0], tensors[f"{name}.s"][0])
        made |= {f"{name}.w": w[None], f"{name}.s": s[None]}
    return made
