"""What goes wrong in a simulated swarm, as a user names it: loss=0.05,crash=2,slow=0.1. Pure.

Each fault is one number. Those of the network and of single devices hold from start to end of the
trouble; a partition cuts a share of the devices off for its middle third.
"""

import math
from dataclasses import dataclass, fields
from random import Random

from coeld.errors import ConfigError
from coeld.sim.device import Network, Stalls
from coeld.sim.world import World

PINNED_RUN_S = 0.2
PINNED_MEAN_S = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """Nothing goes wrong unless told."""

    loss: float = 0.0
    """Share of messages that vanish."""
    dup: float = 0.0
    """Share of messages that arrive twice."""
    reorder: float = 0.0
    """Share of messages that take 100 times as long as they should."""
    delay: float = 0.003
    """Longest way of a message in seconds; the shortest is a sixth of it."""
    crash: float = 0.0
    """Crashes per minute of the whole swarm, every other one without a word; back after 20 s."""
    partition: float = 0.0
    """Share of the devices that is cut off from the others."""
    asym: float = 0.0
    """Share of the devices that hear everybody but are heard by nobody, at the same time."""
    slow: float = 0.0
    """Share of the devices with all cores pinned: they stall again and again."""
    stall: float = 2.0
    """Longest stall of such a device in seconds; the mean is 0.3."""
    skew: float = 0.0
    """Largest relative error of a clock's pace; clocks also start anywhere."""

    @staticmethod
    def parse(text: str) -> "Faults":
        """From name=number,…  Raises ConfigError."""
        names = [item.name for item in fields(Faults)]
        values: dict[str, float] = {}
        for item in filter(None, text.split(",")):
            name, _, number = item.partition("=")
            try:
                values[name] = float(number)
            except ValueError:
                values[name] = math.nan
            if name not in names or not 0 <= values[name] <= _MOST.get(name, 1.0):
                allowed = ", ".join(f"{one} (0 to {_MOST.get(one, 1.0):g})" for one in names)
                raise ConfigError(
                    f"--faults {item!r} is no fault with a number that it may have. Known are"
                    f" {allowed}; example: loss=0.05,crash=2"
                )
        return Faults(**values)

    def begin(self, world: World, rng: Random) -> None:
        """From now on messages and devices are as bad as this."""
        world.network = Network((self.delay / 6, self.delay), self.loss, self.dup, self.reorder)
        devices = list(world.devices.values())
        for device in rng.sample(devices, round(self.slow * len(devices))):
            device.stalls = Stalls(PINNED_RUN_S, PINNED_MEAN_S, self.stall)

    def skew_clocks(self, world: World, rng: Random) -> None:
        """Before anybody starts."""
        for device in world.devices.values():
            if self.skew:
                device.pace = 1 + rng.uniform(-self.skew, self.skew)
                device.ahead_s = rng.uniform(0, 1e6)

    def cut(self, world: World, rng: Random) -> None:
        """The partition begins."""
        devices = list(world.devices.values())
        rng.shuffle(devices)
        away = round(self.partition * len(devices))
        world.split([devices[:away], devices[away:]])
        mute = rng.sample(devices, round(self.asym * len(devices)))
        world.deafen((device, other) for device in mute for other in devices if other is not device)

    def end(self, world: World) -> None:
        """Everything is well again; clocks stay as they are."""
        world.network = Network()
        world.split([])
        world.deafen([])
        for device in world.devices.values():
            device.stalls = None


_MOST = {"delay": 10.0, "crash": 10_000.0, "stall": 60.0, "skew": 0.1}
