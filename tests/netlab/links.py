"""What a network does to packets: delay, jitter, loss, rate, order, partition. Pure.

A packet from a to b waits its turn at a's port (`port_bps`, shared by everything a sends), then on
the link (`rate_bps`), travels `delay_s` ± `jitter_s`, and arrives at b's port, which everything
sent to b shares. Packets of one direction keep their order, except the `reorder` share that is
held back so that later ones overtake. A queue longer than QUEUE_S drops its tail, as routers do.
"""

from dataclasses import dataclass, fields, replace
from random import Random
from typing import Final

QUEUE_S: Final = 0.1
"""Longest wait for a turn: 12.5 MB at 1 Gb/s, 250 KB at 20 Mb/s."""
HELD_BACK_S: Final = 0.002
"""A reordered packet is late by this and by half its link's delay."""


@dataclass(frozen=True, slots=True)
class Link:
    """One direction between two devices."""

    delay_s: float = 0.0
    """What the switch adds on purpose; by itself it adds about 0.05 to 0.1 ms."""
    jitter_s: float = 0.0
    """Uniform, both ways from delay_s."""
    loss: float = 0.0
    """Share of packets that vanish."""
    rate_bps: float = 0.0
    """Bits per second. 0 = as fast as the ports."""
    reorder: float = 0.0
    """Share of packets that later ones overtake."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            high = 1.0 if item.name in ("loss", "reorder") else 1e12
            if not 0 <= value <= high:
                raise ValueError(f"{item.name} = {value}: use 0 to {high:g}")
        if self.jitter_s > self.delay_s:
            raise ValueError("jitter_s must not exceed delay_s: no packet arrives before it left")


@dataclass(frozen=True, slots=True)
class Profile:
    """A kind of network: every link, every port, and the size of packets."""

    link: Link
    port_bps: float
    mtu: int


PROFILES: Final = {
    "lan": Profile(Link(delay_s=0.00006), 1e9, 9000),
    "wifi": Profile(Link(delay_s=0.0019, jitter_s=0.0005, loss=0.002), 300e6, 1500),
    "far": Profile(Link(delay_s=0.0099, loss=0.01), 20e6, 1500),
}
"""Round trips of 0.3 ms, 4 ± 1 ms and 20 ms, the switch's own time included. `lan` has large
packets because a switch in Python forwards some 10 000s a second, not the 80 000 of 1 Gb/s."""


@dataclass(slots=True)
class Counts:
    """What has happened to the packets of one direction."""

    packets: int = 0
    bytes: int = 0
    lost: int = 0
    overflowed: int = 0
    cut: int = 0


class Direction:
    """The state of one direction of one link."""

    __slots__ = ("counts", "free_s", "last_s", "link", "up")

    def __init__(self, link: Link) -> None:
        self.link = link
        self.up = True
        self.counts = Counts()
        self.free_s = 0.0
        """When the link has sent everything that waits for it."""
        self.last_s = 0.0
        """When the last packet arrives: the next one must not be earlier."""


class Fabric:
    """All links between `names`, and the ports. Chance comes from `rng`."""

    def __init__(self, names: list[str], profile: Profile, rng: Random) -> None:
        self.names, self.profile, self._rng = names, profile, rng
        self.directions = {(a, b): Direction(profile.link) for a in names for b in names if a != b}
        self._out_free_s = dict.fromkeys(names, 0.0)
        self._in_free_s = dict.fromkeys(names, 0.0)

    def change(self, a: str, b: str, **values: float) -> None:
        """Change some values of the direction a -> b. Raises ValueError, KeyError."""
        known = {item.name for item in fields(Link)}
        if unknown := set(values) - known:
            raise ValueError(f"unknown {sorted(unknown)}; known are {sorted(known)}")
        direction = self.directions[a, b]
        direction.link = replace(direction.link, **values)

    def cut(self, a: str, b: str) -> None:
        """Nothing passes from a to b any more."""
        self.directions[a, b].up = False

    def partition(self, *sets: list[str]) -> None:
        """Only devices of one set reach each other; who is in none reaches nobody."""
        side = {name: number for number, names in enumerate(sets) for name in names}
        if unknown := set(side) - set(self.names):
            raise KeyError(f"no such device: {sorted(unknown)}")
        for (a, b), direction in self.directions.items():
            direction.up = a in side and b in side and side[a] == side[b]

    def heal(self) -> None:
        """Everybody reaches everybody; delay, loss and rate stay as they are."""
        for direction in self.directions.values():
            direction.up = True

    def reset(self) -> None:
        """Every link as the profile says, nothing cut."""
        for direction in self.directions.values():
            direction.up, direction.link = True, self.profile.link

    def arrival_s(self, a: str, b: str, size_bytes: int, now_s: float) -> float | None:
        """When a packet that a sends to b now comes to b's port; None: never."""
        direction = self.directions[a, b]
        link, counts, rng = direction.link, direction.counts, self._rng
        counts.packets += 1
        counts.bytes += size_bytes
        if not direction.up:
            counts.cut += 1
            return None
        start_s = max(now_s, self._out_free_s[a])
        port_sent_s = sent_s = start_s + size_bytes * 8 / self.profile.port_bps
        if link.rate_bps:
            start_s = max(start_s, direction.free_s)
            sent_s = max(sent_s, start_s + size_bytes * 8 / link.rate_bps)
        if start_s - now_s > QUEUE_S:
            counts.overflowed += 1
            return None
        self._out_free_s[a], direction.free_s = port_sent_s, sent_s
        if link.loss and rng.random() < link.loss:
            counts.lost += 1
            return None
        arrival_s = sent_s + link.delay_s
        if link.jitter_s:
            arrival_s += rng.uniform(-link.jitter_s, link.jitter_s)
        if link.reorder and rng.random() < link.reorder:
            return arrival_s + HELD_BACK_S + link.delay_s / 2
        direction.last_s = max(arrival_s, direction.last_s)
        return direction.last_s

    def admission_s(self, a: str, b: str, size_bytes: int, arrival_s: float) -> float | None:
        """When a packet that has come to b's port is through it; called in order of arrival."""
        port_s = size_bytes * 8 / self.profile.port_bps
        through_s = max(arrival_s, self._in_free_s[b] + port_s)
        if through_s - arrival_s > QUEUE_S:
            self.directions[a, b].counts.overflowed += 1
            return None
        self._in_free_s[b] = through_s
        return through_s
