"""The names of things: devices, lots, epochs. Imports nothing, imported by everything.

A *lot* is what changes hands in the auction: here one routed expert (or, in a dense model, one
neuron slice of a feed-forward block) of one layer. `Lot` sorts by layer, then expert.
"""

from typing import NamedTuple, NewType

NodeId = NewType("NodeId", str)
"""16 lower-case hex digits, made once per device and kept in its state directory."""

ModelHash = NewType("ModelHash", str)
"""sha256 (hex) of a model's manifest: two devices that name the same hash hold the same model."""


class Lot(NamedTuple):
    """One expert of one layer."""

    layer: int
    expert: int
