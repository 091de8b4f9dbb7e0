"""The narrow form of experts: what is stored in 8 bits, as it is held in 4. Pure.

Devices that cannot hold a model as it is stored hold some layers in fewer bits. Nothing is stored
or fetched for that: whoever loads such an expert makes its narrow form from the stored blob, alike
on every device (coeld.compression.requantize). What is stored in 4 bits or fewer stays as it is,
and so does float32, which is for measuring.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Final

from coeld.ids import Lot
from coeld.model.manifest import (
    BlobRef,
    Manifest,
    Shape,
    TensorRef,
    expert_matrices,
    matrix_form,
    tensor_bytes,
)
from coeld.view import ModelDemand

NARROW_BITS: Final = 4
"""Of an expert that is narrowed."""
STORED_BITS: Final = 8
"""Of those that may be."""


@dataclass(frozen=True, slots=True)
class Narrow(BlobRef):
    """An expert that is in no file: `tensors` are those of its narrow form."""

    source: BlobRef


def narrow_ref(shape: Shape, ref: BlobRef) -> BlobRef:
    """The narrow form of a stored expert; the expert itself if it has none."""
    tensors = dict(ref.tensors)
    for name, n, k in expert_matrices(shape):
        if matrix_form(ref, name, n, k).bits != STORED_BITS:
            return ref
        stored = tensors[f"{name}.w"]
        tensors[f"{name}.w"] = TensorRef("uint8", (1, n, k * NARROW_BITS // 8), stored.offset)
    return Narrow(ref.sha256, ref.bytes, tensors, ref)


def narrowed(manifest: Manifest, lots: Collection[Lot]) -> Manifest:
    """The same model with these experts in their narrow form."""
    if not lots:
        return manifest
    rows = [list(layer) for layer in manifest.experts]
    for layer, expert in lots:
        rows[layer][expert] = narrow_ref(manifest.shape, rows[layer][expert])
    return replace(manifest, experts=tuple(map(tuple, rows)))


def narrow_experts(manifest: Manifest, layers: Collection[int]) -> int:
    """How many experts lose bits when these layers are narrow."""
    refs = (ref for layer in layers for ref in manifest.experts[layer])
    return sum(isinstance(narrow_ref(manifest.shape, ref), Narrow) for ref in refs)


def demand_of(manifest: Manifest) -> ModelDemand:
    """What the market has to know of a model, its narrow form included."""
    demand = manifest.demand()
    refs = [ref for layer in manifest.experts for ref in layer]
    narrow_bytes = max(tensor_bytes(narrow_ref(manifest.shape, ref)) for ref in refs)
    if narrow_bytes >= demand.lot_bytes:
        return demand
    return replace(demand, narrow_lot_bytes=narrow_bytes, narrow_first=narrow_first(manifest))


def narrow_first(manifest: Manifest) -> tuple[int, ...]:
    """The layers in the order in which they should lose bits.

    By what 4 bits are expected to cost, where the import has measured it. Else from the middle on
    outwards: the first layers and the last ones hurt more (docs/log.md).
    """
    layers = range(manifest.shape.layers)
    costs = manifest.statistics.errors.get(NARROW_BITS) if manifest.statistics else None
    if costs is not None:
        return tuple(sorted(layers, key=lambda layer: (sum(costs[layer]), layer)))
    middle = manifest.shape.layers - 1
    return tuple(sorted(layers, key=lambda layer: (abs(2 * layer - middle), layer)))
