"""The solver against trying everything, and its promise on how far off it may be."""

from itertools import product
from random import Random

import pytest

from coeld.compression.budget import Choice, hull, solve, steps
from coeld.errors import BudgetTooSmall

WIDTHS = (2, 3, 4, 8)


def random_items(rng: Random, count: int) -> list[list[Choice]]:
    """Mostly errors that fall with the width, as real ones; sometimes a width that is worse."""
    items = []
    for _ in range(count):
        importance, size = 10 ** rng.uniform(-3, 3), rng.choice([64, 64, 100])
        choices = []
        for bits in WIDTHS:
            error = importance * 4.0**-bits * rng.uniform(0.5, 2)
            choices.append(Choice(bits, bits * size, error if rng.random() < 0.95 else importance))
        items.append(choices)
    return items


def best(items: list[list[Choice]], budget_bytes: int) -> float:
    """The least error of all combinations that fit."""
    fitting = [
        sum(choice.error for choice in combination)
        for combination in product(*items)
        if sum(choice.bytes for choice in combination) <= budget_bytes
    ]
    return min(fitting)


@pytest.mark.parametrize("seed", range(60))
def test_it_is_off_the_best_by_no_more_than_one_step(seed: int) -> None:
    rng = Random(seed)
    items = random_items(rng, rng.randint(1, 5))
    least = sum(min(choice.bytes for choice in choices) for choices in items)
    most = sum(max(choice.bytes for choice in choices) for choices in items)
    for budget in [least, most, *(rng.randint(least, most) for _ in range(4))]:
        chosen = solve(items, budget)
        assert all(choice in choices for choice, choices in zip(chosen, items, strict=True))
        assert sum(choice.bytes for choice in chosen) <= budget, f"seed={seed}"
        left = budget - least
        first_missed = 0.0
        for step in steps([hull(choices) for choices in items]):
            if step.bytes > left:
                first_missed = step.saved
                break
            left -= step.bytes
        found = sum(choice.error for choice in chosen)
        assert found <= best(items, budget) + first_missed + 1e-12, f"seed={seed}"


@pytest.mark.parametrize("seed", range(20))
def test_where_a_step_ends_it_is_the_best(seed: int) -> None:
    items = random_items(Random(seed), 4)
    hulls = [hull(choices) for choices in items]
    budget = sum(choices[0].bytes for choices in hulls)
    for step in steps(hulls):
        budget += step.bytes
        found = sum(choice.error for choice in solve(items, budget))
        assert found == pytest.approx(best(items, budget), rel=1e-9), f"seed={seed}"


def test_more_room_never_gives_more_error_where_all_experts_have_one_size() -> None:
    rng = Random(1)
    items = [
        [Choice(bits, bits * 64, importance * 4.0**-bits) for bits in WIDTHS]
        for importance in (10 ** rng.uniform(-2, 2) for _ in range(30))
    ]
    budgets = range(2 * 64 * 30, 8 * 64 * 30, 64)
    errors = [sum(choice.error for choice in solve(items, budget)) for budget in budgets]
    assert errors == sorted(errors, reverse=True)


def test_the_important_expert_gets_the_bits() -> None:
    items = [[Choice(bits, bits, weight * 4.0**-bits) for bits in (2, 4, 8)] for weight in (1, 100)]
    assert [choice.bits for choice in solve(items, 10)] == [2, 8]


def test_equal_experts_are_served_in_order() -> None:
    items = [[Choice(2, 2, 1.0), Choice(4, 4, 0.1)]] * 4
    assert [choice.bits for choice in solve(items, 12)] == [4, 4, 2, 2]


def test_a_width_that_is_larger_and_no_better_is_never_taken() -> None:
    items = [[Choice(2, 2, 1.0), Choice(3, 3, 1.0), Choice(4, 4, 2.0)]]
    assert solve(items, 100) == [Choice(2, 2, 1.0)]


def test_a_budget_that_cannot_work_says_the_smallest_that_can() -> None:
    items = random_items(Random(0), 5)
    smallest = sum(min(choice.bytes for choice in choices) for choices in items)
    with pytest.raises(BudgetTooSmall) as failure:
        solve(items, smallest - 1)
    assert failure.value.smallest_bytes == smallest
    assert len(solve(items, smallest)) == 5
