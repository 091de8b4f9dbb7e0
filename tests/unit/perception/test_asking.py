"""What a device is asked for: smoothed, told in steps, and never for noise."""

import math
from random import Random

import pytest

from coeld.asked import EVEN, EVIDENCE, LEVELS, NOTHING, Asked, Rates, levels_of
from coeld.events import Used
from coeld.ids import ModelHash
from coeld.perception.asking import HALF_LIFE_S, Asking
from coeld.perception.popularity import TELL_S, Habit, total_variation

MODEL = ModelHash("5e" * 32)


def used(requests: int = 1, prompt_tokens: int = 0, tokens: int = 0) -> Used:
    return Used(requests, prompt_tokens, tokens, {})


def steady(asking: Asking, tokens_per_min: int, minutes: int, start: float) -> list[Asked]:
    """What is told while that many tokens are asked for in every minute."""
    told = []
    for minute in range(minutes):
        now = start + 60 * minute
        asking.count(used(1, 0, tokens_per_min), now)
        told += [asked for asked in (asking.news(False, now),) if asked is not None]
    return told


@pytest.mark.parametrize("tokens_per_min", [1, 30, 1000])
def test_steady_demand_is_told_within_a_factor_of_two(tokens_per_min: int) -> None:
    asking = Asking(MODEL)
    steady(asking, tokens_per_min, 180, 0.0)
    told = asking.told.rates
    assert 30 < told.requests < 120
    assert 30 * tokens_per_min < told.tokens < 120 * tokens_per_min
    assert told.prompt_tokens == 0


def test_one_request_adds_little_and_is_forgotten_in_steps_at_times_known_beforehand() -> None:
    asking = Asking(MODEL)
    asking.count(used(1, 50, 200), 0.0)
    assert asking.news(False, 0.0) == Asked(Rates(2, 128, 512))
    told = []
    while asking.due < float("inf"):
        now = asking.due
        assert asking.news(False, now - 0.01) is None
        news = asking.news(False, now)
        assert news is not None
        told.append((round(now), news.rates.tokens))
        assert asking.due > now
    assert asking.told == NOTHING
    assert [tokens for _, tokens in told] == sorted((tokens for _, tokens in told), reverse=True)
    assert told[-1][0] < 12 * HALF_LIFE_S


@pytest.mark.parametrize("seed", range(10))
def test_noise_around_a_steady_demand_is_not_told(seed: int) -> None:
    """Tokens per minute ±10 %, and answers that come in bursts of a few minutes."""
    asking, rng = Asking(MODEL), Random(seed)
    steady(asking, rng.choice([90, 350, 1000]), 240, 0.0)
    before = asking.told
    for minute in range(60):
        now = 240 * 60.0 + 60 * minute
        tokens = round(before.rates.tokens / 60 * rng.uniform(0.9, 1.1))
        asking.count(used(1, 0, tokens), now)
        assert asking.news(False, now) is None, f"seed={seed}"


def test_the_end_of_demand_is_told_about_once_per_half_life() -> None:
    asking = Asking(MODEL)
    steady(asking, 1000, 180, 0.0)
    told = []
    while asking.told != NOTHING:
        news = asking.news(False, asking.due)
        assert news is not None
        told.append(news)
    lasts = told[0].rates.tokens
    assert lasts < 65536
    assert len(told) <= 3 * 17, "three rates of at most 2^17 per hour"


# ---- popularity --------------------------------------------------------------------------------


def rows(rng: Random, weights: list[float], count: int) -> tuple[int, ...]:
    """Uses of each expert when `count` are drawn by weight."""
    drawn = rng.choices(range(len(weights)), weights, k=count)
    return tuple(map(drawn.count, range(len(weights))))


SKEWED = [8.0, 4.0, 2.0, 1.0, 1.0, 1.0, 0.5, 0.5]


def test_nothing_is_told_while_layers_are_whole_and_afterwards_it_goes_on() -> None:
    habit, rng = Habit(), Random(1)
    habit.count({2: rows(rng, SKEWED, 4000)}, 0.0)
    assert habit.told(False, 0.0) == ()
    first = habit.told(True, 1.0)
    assert [len(row) for row in first] == [0, 0, 8]
    assert habit.told(False, 2.0) == first


def test_levels_say_how_often_experts_are_used() -> None:
    habit, rng = Habit(), Random(1)
    habit.count({0: rows(rng, SKEWED, 40_000)}, 0.0)
    (row,) = habit.told(True, 0.0)  # the mean weight is 18 / 8 = 2.25
    assert [level - EVEN for level in row] == [2, 1, 0, -1, -1, -1, -2, -2]


def test_what_a_calibration_told_already_is_not_told_again_and_what_differs_is() -> None:
    rng = Random(1)
    row = rows(rng, SKEWED, 40_000)
    prior = (levels_of(row), b"")
    habit = Habit(prior)
    habit.count({0: rows(rng, SKEWED, 4000), 1: row}, 0.0)
    assert habit.told(True, 0.0) == (b"", levels_of(row))
    habit = Habit(prior)
    habit.count({0: rows(rng, SKEWED[::-1], 4000)}, 0.0)
    (told,) = habit.told(True, 0.0)
    assert told == levels_of(rows(rng, SKEWED[::-1], 40_000))
    habit = Habit(prior)
    habit.count({0: rows(rng, [1.0] * 8, 40_000)}, 0.0)
    assert habit.told(True, 0.0) == (bytes([EVEN] * 8),), "even use is news where it was not even"


def test_levels_are_the_nearest_powers_of_two() -> None:
    rng = Random(2)
    for _ in range(300):
        counts = [rng.lognormvariate(0, 2) for _ in range(rng.randint(1, 40))]
        mean = sum(counts) / len(counts)
        exact = [EVEN + math.log2(count / mean) for count in counts]
        expected = [min(LEVELS - 1, max(0, round(level))) for level in exact]
        assert list(levels_of(counts)) == expected
    assert levels_of([0, 0, 3]) == bytes([0, 0, 6])


def test_a_few_uses_say_nothing_and_even_use_is_never_told() -> None:
    habit, rng = Habit(), Random(1)
    habit.count({0: rows(rng, SKEWED, 8 * EVIDENCE - 8)}, 0.0)
    assert habit.told(True, 0.0) == ()
    for minute in range(240):
        habit.count({1: rows(rng, [1.0] * 8, 200)}, 60.0 * minute)
        assert habit.told(True, 60.0 * minute) == ()


@pytest.mark.parametrize("seed", range(10))
def test_the_noise_of_drawing_is_not_told_and_drift_is(seed: int) -> None:
    habit, rng, now = Habit(), Random(seed), 0.0
    weights = [rng.lognormvariate(0, 0.7) for _ in range(32)]
    told = []
    for _ in range(8 * 60):
        habit.count({0: rows(rng, weights, 400)}, now)
        told.append(habit.told(True, now))
        now += 60
    first_hour = len(set(told[:60]))
    assert len(set(told[60:])) == 1, f"seed={seed}: noise was told"
    assert first_hour <= 2
    drifted = weights[::-1]
    for _ in range(5 * 60):
        habit.count({0: rows(rng, drifted, 400)}, now)
        told.append(habit.told(True, now))
        now += 60
    assert told[-1] != told[8 * 60 - 1]
    fresh = Habit()
    fresh.count({0: rows(rng, drifted, 100_000)}, 0.0)
    (exact,) = fresh.told(True, 0.0)
    apart = [total_variation(row, exact) for (row,) in (told[8 * 60 - 1], told[-1])]
    assert apart[1] < 0.6 * apart[0], f"seed={seed}: {apart}"


def test_popularity_is_told_at_most_every_five_minutes() -> None:
    habit = Habit()
    habit.count({0: (1000, 10, 10, 10)}, 0.0)
    first = habit.told(True, 0.0)
    habit.count({0: (0, 100_000, 0, 0)}, 1.0)
    assert habit.told(True, 1.0) == first
    assert habit.told(True, TELL_S) != first
