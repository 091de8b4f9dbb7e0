"""What can go wrong in a swarm of real devices in the lab, begun and ended by name.

A schedule is a list of disasters with times, made from a seed. They never take away so much that
an answer could not go on: at any moment at most one device is down, frozen or cut off; loss of
packets may come on top. Which answers a disaster may cost is known beforehand: those of a device
whose agent or engine is killed, nobody else's.
"""

import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Final

from tests.harness.lab_swarm import LabDevice

LOSS: Final = 0.3
DEADLY: Final = ("kill", "kill agent", "kill engine", "restart all")
"""Whoever decodes on a victim loses its answers."""
LOCAL: Final = ("kill", "kill agent", "kill engine", "freeze", "cut", "mute", "isolate")
KINDS: Final = (*LOCAL, "loss", "restart all")


@dataclass(frozen=True, slots=True)
class Disaster:
    """`victim` is a device's name; of a cut link the end that `other` is the other end of."""

    kind: str
    victim: str
    other: str
    at_s: float
    lasts_s: float

    @property
    def end_s(self) -> float:
        return self.at_s + self.lasts_s

    def kills(self, name: str) -> bool:
        return self.kind in DEADLY and (self.kind == "restart all" or self.victim == name)

    def __str__(self) -> str:
        whom = {
            "loss": f"{LOSS:.0%} on every link",
            "restart all": "",
            "cut": f"{self.victim} <> {self.other}",
            "mute": f"{self.victim} > {self.other}",
        }.get(self.kind, self.victim)
        return f"{self.at_s:.2f} to {self.end_s:.2f} s: {' '.join((self.kind, whom)).strip()}"


def schedule(rng: Random, names: Sequence[str], pace: float = 1.0) -> list[Disaster]:
    """One to three disasters, one after the other but for the loss of packets, by their times,
    all of which are multiplied by `pace`."""
    found: list[Disaster] = []
    at_s = rng.uniform(0.0, 0.5)
    for _ in range(rng.choice((1, 1, 2, 3))):
        kind = rng.choice(LOCAL) if rng.random() < 0.9 else "restart all"
        victim, other = rng.sample(list(names), 2)
        found.append(Disaster(kind, victim, other, at_s, rng.uniform(0.2, 4.0)))
        at_s = found[-1].end_s + rng.choice((0.0, rng.uniform(0.0, 2.0)))
    if rng.random() < 0.25:
        found.append(Disaster("loss", names[0], names[1], rng.uniform(0, at_s), 2.0))
    paced = [replace(d, at_s=d.at_s * pace, lasts_s=d.lasts_s * pace) for d in found]
    return sorted(paced, key=lambda disaster: disaster.at_s)


class Havoc:
    """Begins and ends disasters; what is cut is the sum of those under way."""

    def __init__(self, devices: Sequence[LabDevice]) -> None:
        self._devices = {device.name: device for device in devices}
        self._lab = devices[0].lab
        self._under_way: list[Disaster] = []

    def begin(self, disaster: Disaster) -> None:
        self._under_way.append(disaster)
        device = self._devices[disaster.victim]
        match disaster.kind:
            case "kill":
                device.kill()
            case "kill agent":
                device.signal(signal.SIGKILL, "agent")
            case "kill engine":
                device.signal(signal.SIGKILL, "engine")
            case "freeze":
                device.signal(signal.SIGSTOP)
            case "restart all":
                for each in self._devices.values():
                    each.kill()
            case _:
                self._wire()

    def end(self, disaster: Disaster) -> None:
        self._under_way.remove(disaster)
        match disaster.kind:
            case "kill" | "kill agent" | "restart all":
                for device in self._victims(disaster):
                    assert device.process is not None
                    device.process.wait()
                    device.start()
            case "kill engine":
                pass  # its agent starts another
            case "freeze":
                self._devices[disaster.victim].signal(signal.SIGCONT)
            case _:
                self._wire()

    def _victims(self, disaster: Disaster) -> Iterable[LabDevice]:
        if disaster.kind == "restart all":
            return self._devices.values()
        return [self._devices[disaster.victim]]

    def _wire(self) -> None:
        """Every link as it should be now."""
        self._lab.reset()
        for disaster in self._under_way:
            for a, b in self._cut(disaster):
                self._lab.cut(a, b)
            if disaster.kind == "loss":
                for a in self._devices:
                    for b in self._devices:
                        if a != b:
                            self._lab.link(a, b, loss=LOSS)

    def _cut(self, disaster: Disaster) -> Iterator[tuple[str, str]]:
        match disaster.kind:
            case "cut":
                yield disaster.victim, disaster.other
                yield disaster.other, disaster.victim
            case "mute":
                yield disaster.victim, disaster.other
            case "isolate":
                for name in self._devices:
                    if name != disaster.victim:
                        yield disaster.victim, name
                        yield name, disaster.victim
