"""Measurements of a simulated swarm, made from outside: what was sent, believed, loaded. Pure.

Nothing here is told to the nodes and nothing relies on their counters: news are followed from
delivery to delivery, verdicts are read off the messages that spread them, and compared with who
really lives.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from coeld.effects import Effect, Publish
from coeld.events import Event, MessageReceived
from coeld.ids import NodeId
from coeld.messages import Beat, Delta, Status
from coeld.sim.device import Device
from coeld.sim.world import World

EXCUSED_S = 15.0
"""After a partition verdicts from before it are still on their way."""
SAMPLE_S = 0.5


@dataclass(slots=True)
class News:
    """A record on its way through the swarm."""

    origin: NodeId
    seq: int
    at: float
    hops: dict[NodeId, int] = field(default_factory=dict)
    last_at: float = 0.0


@dataclass(slots=True)
class Death:
    """A crash, and how it was noticed."""

    device: Device
    life: int
    at: float
    silent: bool
    first_s: float | None = None
    all_s: float | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """One moment of the timeline; rates are since the moment before."""

    at_s: float
    up: int
    agreeing: float
    """Share of the devices that hold the most common view."""
    bytes_per_device_s: float
    moves: int
    """Lots loaded so far."""


class Observer:
    """Attach it before anybody starts."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.deaths: list[Death] = []
        self.news: list[News] = []
        self.samples: list[Sample] = []
        self.marks: list[tuple[float, str]] = []
        """What began when, for the picture."""
        self.false_dead: set[tuple[NodeId, int, int]] = set()
        self.false_suspects: set[tuple[NodeId, int, int]] = set()
        self.excused_until = float("-inf")
        self._began = world.now
        self._sampled_at, self._sampled_bytes = world.now, 0
        world.watchers.append(self._said)
        world.observers.append(self._heard)

    # ---- while it runs -----------------------------------------------------------------------

    def run(self, for_s: float, until: Callable[[], bool] | None = None) -> bool:
        """Let time pass, at most until `until` is true; returns whether it was."""
        world = self.world
        end = world.now + for_s
        while world.now < end - 1e-9:
            world.run(min(0.05 if self._open() else SAMPLE_S / 2, end - world.now))
            self._look()
            if until is not None and until():
                return True
        return False

    def mark(self, text: str) -> None:
        self.marks.append((self.world.now - self._began, text))

    def crash(self, device: Device, silent: bool) -> None:
        self.deaths.append(Death(device, device.life, self.world.now, silent))
        self.world.crash(device, noticed=not silent)

    def follow(self, device: Device) -> None:
        """The device has just changed its record: measure how that spreads."""
        assert device.node is not None
        me = device.node.perception.me
        news = News(device.id, me.seq, self.world.now)
        news.hops[device.id] = 0
        self.news = [*self.news, news]

    def _open(self) -> list[Death]:
        recent = self.world.now - 30
        return [death for death in self.deaths if death.all_s is None and death.at > recent]

    def _look(self) -> None:
        for death in self._open():
            if death.device.life != death.life:
                continue  # it is back: who did not notice never will
            believe = [
                self._gone(device, death)
                for device in self.world.up()
                if device.stalls is None  # what a pinned device makes of it is its own affair
            ]
            if death.first_s is None and any(believe):
                death.first_s = self.world.now - death.at
            if all(believe):
                death.all_s = self.world.now - death.at
        if self.world.now - self._sampled_at >= SAMPLE_S - 1e-9:
            self._sample()

    def _gone(self, device: Device, death: Death) -> bool:
        assert device.node is not None
        member = device.node.perception.membership.members.get(death.device.id)
        return member is None or member.status >= Status.DEAD

    def _sample(self) -> None:
        world = self.world
        views = Counter(d.node.perception.view for d in world.up() if d.node is not None)
        sent = sum(device.sent_bytes for device in world.devices.values())
        passed_s = world.now - self._sampled_at
        self.samples.append(
            Sample(
                world.now - self._began,
                len(world.up()),
                max(views.values(), default=0) / max(1, len(world.up())),
                (sent - self._sampled_bytes) / passed_s / max(1, len(world.up())),
                moves(world),
            )
        )
        self._sampled_at, self._sampled_bytes = world.now, sent

    # ---- what is said and heard ----------------------------------------------------------------

    def _said(self, world: World, device: Device, effect: Effect) -> None:
        if not isinstance(effect, Publish) or not isinstance(effect.message, Beat):
            return
        for entry in effect.message.news:
            if entry.status not in (Status.SUSPECT, Status.DEAD):
                continue
            other = world.devices[entry.node]
            lives = other.node is not None and other.life == entry.incarnation
            if lives and world.now >= self.excused_until:
                verdict = (entry.node, entry.incarnation, entry.heartbeat)
                dead = entry.status == Status.DEAD
                (self.false_dead if dead else self.false_suspects).add(verdict)

    def _heard(self, device: Device, event: Event) -> None:
        if not isinstance(event, MessageReceived) or not isinstance(event.message, Delta):
            return
        for news in self.news:
            if device.id in news.hops or event.sender not in news.hops or device.node is None:
                continue
            held = device.node.perception.held.get(news.origin)
            if held is not None and held.seq >= news.seq:
                news.hops[device.id] = news.hops[event.sender] + 1
                news.last_at = self.world.now


def moves(world: World) -> int:
    """Lots loaded by all devices so far."""
    return sum(device.lots_loaded for device in world.devices.values())


def all_met(world: World) -> bool:
    """Does everybody know of everybody?"""
    nodes = [device.node for device in world.up() if device.node is not None]
    others = len(world.devices) - 1
    return len(nodes) > others and all(
        node.perception.membership.present_count == others for node in nodes
    )


def same_view(world: World) -> bool:
    """Does everybody know the same? By the nodes' own fingerprints: quick, not a proof."""
    views = {device.node.perception.view for device in world.up() if device.node is not None}
    return len(views) == 1 and len(world.up()) == len(world.devices)


def quantile(values: Iterable[float], share: float) -> float | None:
    """The nearest-rank quantile; None of nothing."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(share * len(ranked)) - 1)] if ranked else None
