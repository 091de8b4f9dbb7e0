"""What a node can be told: every knob of the decision core, with unit, range and trade-off.

The stages read it and nothing else decides their timing. `coeld.config` builds it from the
user's file; the defaults are right for a LAN with an embedded broker on each device.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """Defaults detect a silent device in 4 s and a device whose broker link broke in 1 s."""

    swarm: str = "coeld"
    """Name of the swarm, 1..64 printable characters. Messages of other swarms are ignored."""
    name: str = ""
    """What people call this device, 0..64 printable characters. Only shown."""
    mqtt_host: str = ""
    """Where others reach this device's own broker; empty when external brokers are used."""
    mqtt_port: int | None = None
    """1..65535, or None when external brokers are used."""
    blob_host: str = ""
    blob_port: int = 0
    """Where others fetch the weights that this device has on disk; 0: nowhere."""
    heartbeat_ms: int = 500
    """50..60000. Shorter finds failures sooner and repairs lost messages sooner; costs about 160
    bytes to each neighbour per beat, whatever the size of the swarm."""
    silence_ms: int = 3000
    """2..100 × heartbeat_ms. Silence that makes a device suspect when nothing else told of its
    failure. Shorter is quicker and accuses busy devices more often."""
    suspicion_ms: int = 1000
    """1..100 × heartbeat_ms. How long a suspect may refute before it counts as dead and its lots
    go to others, if others confirm; up to 3 times as long if nobody does. Multiplied by up to 8
    while this device itself runs late (Lifeguard)."""
    forget_ms: int = 600_000
    """10 × silence_ms or more. How long the dead and the left are remembered, so that old news of
    them cannot revive them. Longer costs memory only."""
    neighbours_max: int = 8
    """2..64, even. Other brokers to listen to; a full mesh up to this size, beyond it two on each
    of half as many rings. More finds news sooner, and load per device grows with it."""
    replicas_max: int = 2
    """1..8 owners of a lot, where memory allows. More survives more failures at once without a
    pause; costs memory and start-up time."""
    round_ms: int = 20
    """1..1000. Shortest time between two bids of this device. Shorter settles sooner when
    messages are quick; longer saves messages when they are slow."""
    quiet_ms: int = 60
    """round_ms or more. How long the auction must be quiet before lots that nobody serves are
    loaded. Longer avoids loading what is about to be lost to a better bid."""
    settle_ms: int = 1000
    """quiet_ms or more. The same for moves and replicas, which nobody waits for, and before
    anyone is told that memory is missing."""
    join_ms: int = 500
    """0..10000. After its engine started a device bids at once and loads this much later, so that
    devices started together share the work instead of the first taking all it can."""
    load_batch_bytes: int = 256 * 2**20
    """1 or more: one lot at least is loaded. Larger batches compile fewer plans; smaller ones serve
    the first lots sooner."""

    drain_ms: int = 60_000
    """settle_ms or more. How long requests may go on with the version of a model that is being
    replaced; then they fail. Longer ends more answers, and lets new requests wait longer where
    memory is for one version only."""
    spans: bool = True
    """Serve runs of whole layers in one call where that is cheaper, and send own requests through
    such runs. The same on all devices, or they place the model differently."""

    context_tokens: int = 2048
    """The longest request that this device runs layers for. Shorter than another device's: nobody's
    requests go through whole layers here, for that device's might not fit."""

    narrow: bool = True
    """Hold layers in fewer bits than stored where the swarm lacks memory for the model. If one
    device with the model says no, none is."""

    def __post_init__(self) -> None:
        assert self.heartbeat_ms > 0
        assert self.silence_ms >= 2 * self.heartbeat_ms
        assert self.suspicion_ms >= self.heartbeat_ms
        assert self.forget_ms >= self.silence_ms
        assert 1 <= self.replicas_max <= 8
        assert 1 <= self.round_ms <= self.quiet_ms <= self.settle_ms
        assert self.neighbours_max >= 2
        assert self.settle_ms <= self.drain_ms
