"""The numpy reference itself, on things that can be said without a second implementation."""

from pathlib import Path

import numpy as np
import pytest

from tests.reference.gguf_numpy import Reference, load
from tests.reference.tiny_gguf import Type, write_tiny_llama

TOKENS = [3, 77, 5, 200, 41, 41, 8]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return load(write_tiny_llama(tmp_path_factory.mktemp("r") / "m.gguf", kind=Type.F32))


def test_a_token_sees_only_what_came_before_it(reference: Reference) -> None:
    whole = reference.logits(TOKENS)
    for count in range(1, len(TOKENS)):
        np.testing.assert_allclose(reference.logits(TOKENS[:count]), whole[:count], atol=1e-4)


def test_the_order_of_tokens_matters(reference: Reference) -> None:
    swapped = [TOKENS[1], TOKENS[0], *TOKENS[2:]]
    assert np.abs(reference.logits(TOKENS)[-1] - reference.logits(swapped)[-1]).max() > 1e-2


def test_rotation_depends_on_the_distance_only(reference: Reference) -> None:
    """What rotary embedding is for: q at i times k at j is a function of i - j."""
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, 1, 16)).astype(np.float32)
    turned_q, turned_k = (reference.rotate(x.repeat(20, axis=1))[0] for x in (q, k))
    scores = turned_q @ turned_k.T
    for distance in range(-10, 10):
        np.testing.assert_allclose(np.diagonal(scores, distance).std(), 0, atol=1e-4)


def test_quantised_files_are_close_to_the_original(tmp_path: Path, reference: Reference) -> None:
    wanted = reference.logits(TOKENS)
    for kind, tolerance in ((Type.F16, 0.003), (Type.Q8_0, 0.03), (Type.Q4_1, 0.4)):
        found = load(write_tiny_llama(tmp_path / "m.gguf", kind=kind)).logits(TOKENS)
        assert np.linalg.norm(found - wanted) < tolerance * np.linalg.norm(wanted)
