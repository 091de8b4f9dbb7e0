"""Where the time of a request goes: trunk and experts here, the wire, waiting for others."""

from dataclasses import asdict, dataclass


@dataclass(slots=True)
class Split:
    """Totals of one phase of a request, prefill or decode. What is left to its duration is the
    data path's own work and the turns of others."""

    trunk_s: float = 0.0
    """In graphs of this device: attention, head, and the experts of fused layers."""
    experts_s: float = 0.0
    """In sessions of experts on this device."""
    wire_s: float = 0.0
    """Calls to peers, less what they computed meanwhile: packing, the network, wake-ups."""
    wait_s: float = 0.0
    """While peers computed and this device did not, or nobody had an expert."""
    sent_bytes: int = 0
    """Of rows and gate weights, without headers."""
    received_bytes: int = 0
    cuts: int = 0
    """Layers whose experts ran outside a graph of this device."""

    @property
    def spent_s(self) -> float:
        return self.trunk_s + self.experts_s + self.wire_s + self.wait_s

    def away(self, took_s: float, computed_s: float) -> None:
        """This device waited `took_s` for calls; the peers computed `computed_s` of it."""
        waited_s = min(took_s, max(0.0, computed_s))
        self.wait_s += waited_s
        self.wire_s += took_s - waited_s

    def to_json(self) -> dict[str, float]:
        return {name: round(value, 6) for name, value in asdict(self).items()}
