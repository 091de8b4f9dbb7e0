"""From statistics and a budget to the width of every expert; and what other budgets would give.

Bytes are those of the weights as they lie in the blobs: levels, scales, biases, norms, routers,
embedding and head. The experts get what the rest leaves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Final

from coeld.compression.budget import Choice, solve
from coeld.errors import BudgetTooSmall
from coeld.model.families.blueprint import Blueprint
from coeld.model.manifest import Form, expert_matrices, head_block, trunk_matrices
from coeld.model.onnx_blobs import FLOAT_BITS
from coeld.model.statistics import Statistics

Table = tuple[tuple[int, ...], ...]
"""Bits of each expert, per layer."""

POINTS: Final = 25
"""Of a curve."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The widths of all experts, and what follows from them."""

    table: Table
    bytes: int
    """Of the whole model's weights."""
    error: float
    """Expected divergence (KL) from the exact experts, in nats per token."""

    @property
    def mean_bits(self) -> float:
        widths = [bits for row in self.table for bits in row]
        return sum(widths) / len(widths)


class Allocation:
    """The choices of one model."""

    def __init__(
        self, blueprint: Blueprint, trunk_bits: int, statistics: Statistics, widths: Sequence[int]
    ) -> None:
        self._statistics, self._columns = statistics, blueprint.shape.experts
        self._rest = trunk_bytes(blueprint, trunk_bits)
        self._sizes = {bits: expert_bytes(blueprint, bits) for bits in widths}
        self.widths = tuple(widths)

    def fit(self, budget_bytes: int) -> Plan:
        """The least expected error within a budget. Raises BudgetTooSmall."""
        errors = self._statistics.errors
        items = [
            [Choice(bits, size, errors[bits][layer][e]) for bits, size in self._sizes.items()]
            for layer in range(len(self._statistics.popularity))
            for e in range(self._columns)
        ]
        try:
            chosen = solve(items, budget_bytes - self._rest)
        except BudgetTooSmall as exc:
            raise BudgetTooSmall(budget_bytes, exc.smallest_bytes + self._rest) from exc
        rows = range(0, len(chosen), self._columns)
        table = tuple(tuple(c.bits for c in chosen[at : at + self._columns]) for at in rows)
        total = self._rest + sum(choice.bytes for choice in chosen)
        return Plan(table, total, sum(choice.error for choice in chosen))

    def uniform(self, bits: int) -> Plan:
        """All experts alike."""
        layers = len(self._statistics.popularity)
        error = sum(map(sum, self._statistics.errors[bits]))
        size = self._rest + layers * self._columns * self._sizes[bits]
        return Plan(((bits,) * self._columns,) * layers, size, error)

    def curve(self) -> list[Plan]:
        """From the smallest that works to the largest, evenly in bytes."""
        low, high = self.uniform(min(self._sizes)).bytes, self.uniform(max(self._sizes)).bytes
        return [self.fit(low + (high - low) * i // (POINTS - 1)) for i in range(POINTS)]


def expert_bytes(blueprint: Blueprint, bits: int) -> int:
    """Weight bytes of one expert. A dense block's bias, which one slice carries, is not in it."""
    shape, form = blueprint.shape, Form(bits, blueprint.block)
    total = sum(matrix_bytes(n, k, form) for _, n, k in expert_matrices(shape))
    if shape.routing is not None and "gate.b" in blueprint.layers[0].experts[0]:
        total += sum(4 * n for _, n, _ in expert_matrices(shape))
    return total


def trunk_bytes(blueprint: Blueprint, trunk_bits: int) -> int:
    """Weight bytes of all but the experts, biases of dense blocks included."""
    shape = blueprint.shape
    form = Form(trunk_bits, blueprint.block)
    head = Form(FLOAT_BITS if trunk_bits == FLOAT_BITS else 8, head_block(shape.hidden))
    copies = 1 if blueprint.tied else 2
    total = copies * matrix_bytes(shape.vocab, shape.hidden, head) + 4 * shape.hidden
    matrices = {name: matrix_bytes(n, k, form) for name, n, k in trunk_matrices(shape)}
    for layer in blueprint.layers:
        for name, sources in layer.trunk.items():
            count = sum(prod(source.shape) for source in sources)
            total += matrices.get(name, 4 * count)
        if shape.routing is None:
            biases = [source for name, source in layer.experts[0].items() if name.endswith(".b")]
            total += sum(4 * prod(source.shape) for source in biases)
    return total


def matrix_bytes(n: int, k: int, form: Form) -> int:
    """Levels and scales of a matrix (n, k)."""
    if form.bits == FLOAT_BITS:
        return 4 * n * k
    return n * k * form.bits // 8 + 4 * n * k // form.block
