"""What happens to simulated devices in tests."""

from random import Random

from coeld.events import LinksMeasured
from coeld.measured import MeasuredLink
from coeld.sim.device import Device
from coeld.sim.world import World


def measure_links(
    world: World, far: Device | None, far_us: int, rng: Random | None = None, others_us: int = 300
) -> None:
    """Every device measures its links, those of `far` as so long, ±10 % with `rng`."""
    for device in world.up():
        links = []
        for other in sorted(world.up(), key=lambda other: other.id):
            if other is not device:
                us = far_us if far in (device, other) else others_us
                us = int(us * rng.uniform(0.9, 1.1)) if rng else us
                links.append(MeasuredLink(other.id, us, 3 * us, 110))
        world.feed(device, LinksMeasured(tuple(links)))
