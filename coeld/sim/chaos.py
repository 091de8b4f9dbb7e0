"""Random faults from a seed, then healing. The vocabulary is small; the combinations are not."""

from random import Random

from coeld.sim.device import Network
from coeld.sim.world import World


def torment(world: World, for_s: float, rng: Random) -> None:
    """Let `for_s` seconds pass with lossy links, crashes, partitions and slow devices."""
    world.network = Network(
        delay_s=(0.0005, rng.choice([0.003, 0.05])),
        loss=rng.choice([0.0, 0.05, 0.3]),
        repeat=rng.choice([0.0, 0.2]),
        slow=rng.choice([0.0, 0.05]),
    )
    world.load_failure = rng.choice([0.0, 0.0, 0.2])
    end = world.now + for_s
    while world.now < end:
        _one_fault(world, rng)
        world.run(rng.uniform(0.05, 2.0))


def _one_fault(world: World, rng: Random) -> None:
    devices = list(world.devices.values())
    device = rng.choice(devices)
    fault = rng.randrange(6)
    if device.node is None:
        if fault < 4:
            world.start(device)
    elif fault == 0:
        world.crash(device, noticed=True)
    elif fault == 1:
        world.crash(device, noticed=False)
    elif fault == 2:
        world.crash_engine(device, rng.uniform(0.2, 3.0))
    elif fault == 3:
        rng.shuffle(devices)
        cut = rng.randrange(len(devices))
        world.split([devices[:cut], devices[cut:]])
    elif fault == 4:
        world.split([])
    elif rng.random() < 0.3:
        world.leave(device)


def heal(world: World) -> None:
    """End all faults and start whatever is down."""
    world.network = Network()
    world.load_failure = 0.0
    world.split([])
    for device in world.devices.values():
        if device.node is None:
            world.start(device)
