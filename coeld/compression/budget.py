"""The budget: how many bits each expert gets, so that the whole fits and errs least. Pure.

Each expert is stored at one of several widths; each width costs bytes and causes an expected error,
and errors add up. Choosing one width per expert with the least total error within a number of bytes
is a multiple-choice knapsack (Sinha & Zoltners, Operations Research 27, 1979). Of each expert only
the widths on the lower convex hull of (bytes, error) are considered. Along the hull, each wider
width saves less error per byte than the one before, so taking the steps of all experts in the order
of error saved per byte is optimal for every budget at which a step ends (it is the solution of the
Lagrangian, and of the linear relaxation). In between, the steps that still fit are taken in
the same order. The result is off the best by no more than the one step that did not fit first would
have saved. Ties go to the expert with the lower index, so that every machine finds the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf

from coeld.errors import BudgetTooSmall


@dataclass(frozen=True, slots=True)
class Choice:
    """A way to store an expert."""

    bits: int
    bytes: int
    error: float
    """Expected, in any unit that adds up over experts."""


@dataclass(frozen=True, slots=True)
class Step:
    """From one choice of an expert to a larger one."""

    item: int
    choice: Choice
    bytes: int
    saved: float


def solve(items: Sequence[Sequence[Choice]], budget_bytes: int) -> list[Choice]:
    """For each item one of its choices, at most `budget_bytes` together.

    Raises BudgetTooSmall, with the bytes of the smallest choices, when not even those fit.
    """
    hulls = [hull(choices) for choices in items]
    chosen = [choices[0] for choices in hulls]
    left = budget_bytes - sum(choice.bytes for choice in chosen)
    if left < 0:
        raise BudgetTooSmall(budget_bytes, budget_bytes - left)
    stopped = set()
    for step in steps(hulls):
        if step.item in stopped or step.bytes > left:
            stopped.add(step.item)  # its later steps start where this one ends
            continue
        chosen[step.item] = step.choice
        left -= step.bytes
    return chosen


def hull(choices: Sequence[Choice]) -> list[Choice]:
    """The lower convex hull of (bytes, error), from the smallest choice to the best one."""
    found: list[Choice] = []
    for choice in sorted(choices, key=lambda choice: (choice.bytes, choice.error)):
        if found and choice.error >= found[-1].error:
            continue
        while len(found) > 1 and _slope(found[-2], choice) <= _slope(found[-2], found[-1]):
            found.pop()
        found.append(choice)
    return found


def steps(hulls: Sequence[Sequence[Choice]]) -> list[Step]:
    """All steps along the hulls, the one that saves the most error per byte first."""
    found = []
    for item, choices in enumerate(hulls):
        slope = -inf
        for before, after in pairwise(choices):
            # Rounding must not put a step before the one it continues.
            slope = max(slope, _slope(before, after))
            size, saved = after.bytes - before.bytes, before.error - after.error
            found.append((slope, Step(item, after, size, saved)))
    # Sorting is stable: where slopes tie, items and then widths keep their order.
    return [step for _, step in sorted(found, key=lambda pair: pair[0])]


def _slope(before: Choice, after: Choice) -> float:
    """Change of error per byte: negative, and along a hull rising."""
    return (after.error - before.error) / (after.bytes - before.bytes)
