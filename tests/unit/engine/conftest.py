"""Devices of `tests/harness/span_devices.py`, which end with the test."""

import pytest

from coeld.ids import NodeId
from tests.harness.span_devices import A, Device


@pytest.fixture
def device(tiny, tiny_store):
    made: list[Device] = []

    def make(node: NodeId, **options) -> Device:
        made.append(Device(tiny, tiny_store, node, **options))
        return made[-1]

    make.store = tiny_store
    yield make
    for each in made:
        each.close()


@pytest.fixture(scope="module")
def expected(tiny, tiny_store) -> list[int]:
    alone = Device(tiny, tiny_store, A)
    alone.model.refit()
    alone.close()
    return alone.answer()
