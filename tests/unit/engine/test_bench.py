"""`coeld bench` on a tiny model: every figure it promises, and what it refuses."""

import pytest

from coeld.engine import measure
from coeld.errors import BadRequest


def test_every_figure_is_there(tiny, tiny_store) -> None:
    speed = measure.bench(tiny_store, "tiny", 16, 8, 1, 1)
    assert speed.prefill_tokens_per_s > 0
    assert speed.decode_tokens_per_s > 0
    assert speed.weights_bytes == tiny.weights_bytes
    assert speed.resident_bytes > speed.weights_bytes
    assert 0 < speed.kv_bytes < speed.resident_bytes


def test_more_tokens_than_the_model_was_trained_for_are_refused(tiny, tiny_store) -> None:
    with pytest.raises(BadRequest, match=str(tiny.shape.context_max)):
        measure.bench(tiny_store, "tiny", tiny.shape.context_max, 8, 1, 1)
