"""Which experts are used, counted from gate weights."""

import numpy as np

from coeld.datapath.uses import Uses


def test_rows_are_counted_by_layer_and_expert_and_told_once() -> None:
    uses = Uses(3, 4)
    uses.count(1, np.array([[0, 0.5, 0.5, 0]], np.float32))
    uses.count(1, np.array([[0, 1, 0, 0], [0, 0.1, 0, 0.9], [0.2, 0, 0, 0.8]], np.float32))
    assert uses.take() == {1: [1, 3, 1, 2]}
    assert uses.take() == {}
