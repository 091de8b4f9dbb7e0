"""Facts that travel between the stages: what a device offers, what a model needs.

Plain frozen values without behaviour beyond checks. Units are in the names.
"""

from dataclasses import dataclass

from coeld.asked import Popularity
from coeld.ids import Lot, ModelHash


@dataclass(frozen=True, slots=True)
class Resources:
    """One measurement of this device."""

    memory_budget_bytes: int
    """What the engine may hold in weights: configured, or measured from what is available."""
    memory_available_bytes: int
    cpu_load_percent: int
    """0..100, over all cores, smoothed by whoever samples it."""
    kernel_mb_per_s: int
    """Weight bytes per second that this device's own int8 kernels read in decode, in MB/s."""
    row_mb_per_s: int = 0
    """Weight bytes × rows per microsecond of the same kernels with many rows; 0: unknown."""
    cut_us: int = 0
    """Work of this device's processor for a call of experts, at both ends; 0: unknown."""
    memory_pressure_percent: int = 0
    """0..100: of the last minute, in which everything that could run waited for memory."""
    sparing: bool = False
    """It runs on a battery that is low."""


@dataclass(frozen=True, slots=True)
class ModelDemand:
    """What a model needs, read from its manifest: the auction knows nothing else of a model."""

    model: ModelHash
    name: str
    layers: int
    experts: int
    """Lots per layer. Every (layer, expert) with layer < layers, expert < experts is a lot."""
    lot_bytes: int
    """Bytes of one lot (the largest, if they differ)."""
    trunk_bytes: int
    """Bytes every device that decodes holds besides its lots."""
    top_k: int = 0
    """Lots of a layer that one token uses; 0: all of them, as in a dense model."""
    hidden: int = 0
    """Values in a row that travels to a lot and back."""
    embedding_bytes: int = 0
    """The part of the trunk of which a token reads one row only."""
    head_bytes: int = 0
    """The part of the trunk that is read once per answer token, after the last layer."""
    kv_bytes_per_token: int = 0
    """KV cache that one token of context takes and every later token reads, in all layers."""
    version: int = 1
    """One above what it replaced when it was imported; see coeld.releases."""
    popularity: tuple[tuple[int, ...], ...] = ()
    """Per layer and expert: the probability that a token uses it, in millionths. Empty: all the
    same."""
    prior: Popularity = ()
    """What a calibration text told of that, until devices tell what they are asked for."""

    narrow_lot_bytes: int = 0
    """Bytes of a lot that is held in fewer bits than it is stored in; 0: no lot can be."""
    narrow_first: tuple[int, ...] = ()
    """The layers in the order in which they should lose bits; empty: as they come."""

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of a lot as it is stored, and in fewer bits."""
        return self.lot_bytes, self.narrow_lot_bytes

    @property
    def used(self) -> int:
        """Lots of a layer that one token uses."""
        return self.top_k or self.experts

    def lots_of(self, layer: int) -> list[Lot]:
        return [Lot(layer, expert) for expert in range(self.experts)]

    def lots(self) -> list[Lot]:
        return [lot for layer in range(self.layers) for lot in self.lots_of(layer)]
