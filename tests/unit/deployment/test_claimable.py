"""Whole layers while they suffice, every lot when they do not."""

from random import Random

import pytest

from coeld.deployment.pricing import claimable, missing_lots
from coeld.ids import ModelHash
from coeld.view import ModelDemand

DEMAND = ModelDemand(ModelHash("m"), "m", layers=10, experts=8, lot_bytes=1, trunk_bytes=0)


def test_a_part_of_a_layer_is_not_claimed_while_whole_layers_cover_the_model() -> None:
    assert claimable(45, [45, 43], DEMAND) == 40
    assert claimable(43, [45, 43], DEMAND) == 40


def test_every_lot_counts_when_whole_layers_are_not_enough() -> None:
    assert claimable(44, [44, 39], DEMAND) == 44


def test_where_the_model_does_not_fit_no_layer_is_begun_that_others_would_have_to_complete() -> (
    None
):
    assert claimable(45, [45], DEMAND) == 40
    assert claimable(7, [7, 45], DEMAND) == 0
    assert missing_lots(80 - 40, [45], DEMAND) == 35
    assert missing_lots(0, [45, 43], DEMAND) == 0


def test_what_cannot_be_loaded_though_there_is_room_is_no_lack_of_memory() -> None:
    assert missing_lots(3, [80], DEMAND) == 0
    assert missing_lots(0, [70], DEMAND) == 0, "served still, after memory was taken away"


@pytest.mark.parametrize("seed", range(100))
def test_what_can_be_covered_is_covered(seed: int) -> None:
    """Rounding never loses coverage that the swarm has room for."""
    rng = Random(seed)
    rooms = [rng.randint(0, 60) for _ in range(rng.randint(1, 6))]
    claims = [claimable(room, rooms, DEMAND) for room in rooms]
    assert all(claim <= room for claim, room in zip(claims, rooms, strict=True))
    assert (sum(claims) >= 80) == (sum(rooms) >= 80), f"seed={seed}"
    missing = missing_lots(max(0, 80 - sum(claims)), rooms, DEMAND)
    assert missing == max(0, 80 - sum(rooms)), f"seed={seed}"
