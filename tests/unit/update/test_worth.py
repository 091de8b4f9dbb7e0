"""When a better placement pays for moving there."""

from coeld.update.worth import GAIN_MIN_PERCENT, HORIZON_S, MOVE_MB_PER_S, worth_moving


def test_a_gain_below_the_floor_moves_nothing_even_for_free() -> None:
    assert not worth_moving(1000, 1001 - 10 * GAIN_MIN_PERCENT, 0)
    assert worth_moving(1000, 1000 - 10 * GAIN_MIN_PERCENT, 0)
    assert not worth_moving(1000, 1200, 0)


def test_what_is_saved_within_the_horizon_has_to_pay_for_the_bytes() -> None:
    half = HORIZON_S * MOVE_MB_PER_S * 1_000_000 // 2
    assert worth_moving(1000, 500, half)
    assert not worth_moving(1000, 500, half + 10**6)
