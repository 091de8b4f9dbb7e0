"""Sets of lots on the wire: the same lots come out, in few bytes, and nonsense is refused."""

import json
from random import Random

import pytest

from coeld.errors import FrameError
from coeld.ids import Lot
from coeld.lot_sets import LOTS_PER_RECORD_MAX, RUN_CHARS, lot_runs, pack, unpack


@pytest.mark.parametrize("seed", range(60))
def test_what_is_packed_comes_out_again(seed: int) -> None:
    rng = Random(seed)
    experts, share = rng.choice([8, 128, 300]), rng.choice([0.05, 0.5, 0.95, 1.0])
    items = [
        (Lot(layer, expert), (rng.choice([0, 0, 0, 1]), 7 << rng.choice([0, 44])))
        for layer in sorted(rng.sample(range(1024), 6))
        for expert in range(rng.choice([0, 4096 - experts]), 4096)[:experts]
        if rng.random() < share
    ]
    rows = json.loads(json.dumps(pack(items)))
    assert unpack(rows, 2, 1 << 62) == items, f"seed={seed}"


def test_scattered_experts_of_a_layer_take_one_row_and_whole_layers_one_run() -> None:
    scattered = [(Lot(3, expert), ()) for expert in range(0, 128, 2)]
    assert pack(scattered) == [[3, 0, "5" * 32]] == pack(unpack([[3, 0, "5" * 32]], 0, 0))
    assert pack((Lot(3, expert), ()) for expert in range(128)) == [[3, 0, 128]]
    assert lot_runs([Lot(0, 0), Lot(0, 1), Lot(1, 2)]) == [[0, 0, 2], [1, 2, 1]]


@pytest.mark.parametrize(
    "rows",
    [
        [[0, 0, ""]],
        [[0, 0, "0"]],
        [[0, 0, "0x1f"]],
        [[0, 0, "F"]],
        [[0, 0, "f" * 1025]],
        [[0, 4095, "2"]],
        [[0, 0, 0]],
        [[0, 0, True]],
        [[0, 0, 1.0]],
        [[1024, 0, 1]],
        [[0, 0, 2], [0, 1, 1]],
        [[0, 1, "5"], [0, 3, 1]],
        [*([layer, 0, 4096] for layer in range(8)), [8, 0, 1]],
        [[0, 0, 1, 1]],
        [[0, 0]],
        "no row",
    ],
)
def test_rows_that_name_no_lots_or_too_many_or_one_twice_are_refused(rows: list[object]) -> None:
    with pytest.raises(FrameError):
        unpack(rows, 0, 0)


def test_as_many_lots_as_a_record_may_name_are_taken() -> None:
    rows = [[layer, 0, "f" * 1024] for layer in range(8)]
    assert len(unpack(rows, 0, 0)) == LOTS_PER_RECORD_MAX


@pytest.mark.parametrize("seed", range(20))
def test_a_row_of_bits_is_never_much_longer_than_its_runs(seed: int) -> None:
    """Else a short message would come out again as one that is too long to pass on."""
    rng = Random(seed)
    lots = sorted(rng.sample(range(4096), rng.choice([2, 3, 5, 50, 2000])))
    rows = pack((Lot(9, expert), ()) for expert in lots)
    runs = lot_runs(Lot(9, expert) for expert in lots)
    assert len(json.dumps(rows)) <= len(json.dumps(runs)) + RUN_CHARS
