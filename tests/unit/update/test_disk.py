"""Which copies a full disk lets go: against a slow choice rule by rule, and swarms of disks."""

from random import Random

import pytest

from coeld.ids import Lot
from coeld.update.disk import Blob, Wanted, to_delete

LOTS = [Lot(layer, expert) for layer in range(4) for expert in range(4)]


def blob(number: int, *lots: Lot, size: int = 10) -> Blob:
    return Blob(f"{number:064x}", size, lots)


def by_the_rules(blobs: list[Blob], wanted: Wanted, excess: int) -> list[Blob]:
    """One after the other: of those that may go the one that is held most often, then the last."""
    left, gone = list(blobs), []
    while excess > 0:
        worst = None
        for each in left:
            copies = 10**9
            for lot in each.lots:
                copies = min(copies, wanted.servers.get(lot, 0))
                if lot in wanted.kept:
                    copies = 0
            if copies and (worst is None or copies >= worst[0]):
                worst = copies, each
        if worst is None:
            break
        left.remove(worst[1])
        gone.append(worst[1])
        excess -= worst[1].bytes
    return gone


def disk_of(rng: Random) -> list[Blob]:
    lots = rng.sample(LOTS, len(LOTS))
    cuts = [lots[:3], [lots[3]], [lots[4]], *([lot] for lot in lots[5:])]
    return [blob(n, *part, size=rng.randint(1, 9)) for n, part in enumerate(cuts)]


@pytest.mark.parametrize("seed", range(200))
def test_the_choice_is_that_of_the_rules_one_by_one(seed: int) -> None:
    rng = Random(seed)
    blobs = disk_of(rng)
    kept = rng.sample(LOTS, rng.randint(0, 6))
    wanted = Wanted(frozenset(kept), {lot: rng.randint(0, 3) for lot in LOTS})
    excess = rng.randint(-5, 80)
    assert to_delete(blobs, wanted, excess) == by_the_rules(blobs, wanted, excess), f"seed={seed}"


@pytest.mark.parametrize("seed", range(100))
def test_whatever_all_disks_delete_at_once_every_lot_stays_with_all_who_serve_it(seed: int) -> None:
    rng = Random(seed)
    devices = range(rng.randint(1, 5))
    serving = {device: set(rng.sample(LOTS, rng.randint(0, 12))) for device in devices}
    disks = {
        device: serving[device] | set(rng.sample(LOTS, rng.randint(0, 16))) for device in devices
    }
    held_before = set().union(*disks.values())
    for device in devices:
        others = [lot for other in devices if other != device for lot in serving[other]]
        wanted = Wanted(serving[device], {lot: others.count(lot) for lot in LOTS})
        blobs = [blob(LOTS.index(lot), lot) for lot in sorted(disks[device])]
        for each in to_delete(blobs, wanted, rng.randint(0, 200)):
            disks[device].discard(each.lots[0])
    assert set().union(*disks.values()) == held_before, f"seed={seed}"
    assert all(serving[device] <= disks[device] for device in devices), f"seed={seed}"


def test_what_two_others_serve_goes_before_what_one_serves() -> None:
    blobs = [blob(n, lot) for n, lot in enumerate(LOTS[:4])]
    wanted = Wanted(frozenset(), dict(zip(LOTS, (1, 2, 2, 1), strict=False)))
    assert [each.lots[0] for each in to_delete(blobs, wanted, 30)] == [LOTS[2], LOTS[1], LOTS[3]]
