"""Every field of a manifest in the store, edited by hand: refused as damaged, or understood."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coeld.errors import BadChecksum, BadModelFile, ModelError
from coeld.model.importer import Precision, import_checkpoint
from coeld.model.manifest import Manifest
from coeld.model.store import Store
from tests.fakes.memory_checkpoint import huggingface
from tests.harness.importing import quiet

NAMES = ("gpt_oss", "qwen2_moe", "olmoe", "llama")
"""Sinks, biases and windows; a shared expert; norms of q and k; dense and tied."""
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 3, 1 << 70, -(1 << 70), 0.5, -0.5, float("nan"), float("inf"),
    1e308, "", "1", "../../x", "\0", "a" * 64, "softmax", [], [0], [[]], {}, {"a": 1}, [None] * 5,
]  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    store = Store(tmp_path_factory.mktemp("s"))
    for name in NAMES:
        precision = Precision(32, 32) if name == "olmoe" else Precision(4, 8)
        import_checkpoint(
            store, huggingface(name), name.replace("_", "-"), quiet, precision=precision
        )
    return store


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every path into a tree; of a list, to the last of its elements."""
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    elif isinstance(value, list) and value:
        yield from places(value[-1], (*path, len(value) - 1))


def tree(store: Store, name: str) -> Any:
    return json.loads((store.root / "models" / f"{name}.json").read_text())


def opened(store: Store, value: Any) -> Manifest | None:
    """What the store makes of an edited manifest: None when it refuses it."""
    (store.root / "models" / "edited.json").write_text(json.dumps(value))
    try:
        return store.manifest("edited")
    except BadModelFile:
        return None


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    key, *rest = path
    inner = replaced(value[key], tuple(rest), new)
    if isinstance(value, dict):
        return {**value, key: inner}
    return [inner if index == key else old for index, old in enumerate(value)]


def without(value: Any, path: tuple[Any, ...]) -> Any:
    *outer, last = path
    parent = value
    for key in outer:
        parent = parent[key]
    if isinstance(parent, dict):
        left: Any = {key: inner for key, inner in parent.items() if key != last}
    else:
        left = [inner for index, inner in enumerate(parent) if index != last]
    return replaced(value, tuple(outer), left)


@pytest.mark.parametrize("name", [name.replace("_", "-") for name in NAMES])
def test_every_field_is_checked(store: Store, name: str) -> None:
    good = tree(store, name)
    every = list(places(good))
    assert len(every) > 70
    rng = random.Random(name)
    refused = tried = 0
    for path in every:
        for new in rng.sample(ODD, 3):
            tried += 1
            refused += opened(store, replaced(good, path, new)) is None
    assert refused > tried * 0.8


@pytest.mark.parametrize("name", ["gpt-oss", "qwen2-moe"])
def test_every_field_is_needed_or_optional(store: Store, name: str) -> None:
    good = tree(store, name)
    for path in places(good):
        if path and opened(store, without(good, path)) is not None:
            last = path[-1] if not isinstance(path[-1], int) else path[-2]
            optional = (".b", ".correction", "sinks", "shared_score", "eos_tokens")
            assert str(last).endswith(optional), path


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_no_value_anywhere_makes_anything_but_a_bad_model_file(store: Store, data: Any) -> None:
    good = tree(store, "gpt-oss")
    path = data.draw(st.sampled_from(list(places(good))))
    new = data.draw(st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4), x, max_size=3),
        max_leaves=6,
    ))  # fmt: skip
    opened(store, replaced(good, path, new))


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "9" * 10_000, "\ufeff{}", "{" * 9]
)
def test_a_text_that_is_no_manifest_is_refused(store: Store, text: str) -> None:
    (store.root / "models" / "edited.json").write_text(text)
    with pytest.raises(BadModelFile):
        store.manifest("edited")


def test_a_blob_cannot_be_called_by_a_path(store: Store) -> None:
    good = tree(store, "llama")
    for sha256 in ("../models/llama.json", "/etc/passwd", "..", "a" * 63 + "/", "A" * 64, "a" * 65):
        assert opened(store, replaced(good, ("head", "sha256"), sha256)) is None


@pytest.mark.parametrize("edit", ["flip", "cut", "grow", "gone", "swap"])
def test_a_blob_whose_bytes_are_others_is_found_before_the_model_runs(
    tmp_path: Path, edit: str
) -> None:
    store = Store(tmp_path)
    manifest = import_checkpoint(store, huggingface("mixtral"), "m", quiet)
    victim = store.blob_path(manifest.experts[1][2])
    data = victim.read_bytes()
    victim.unlink()
    if edit == "flip":
        victim.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif edit == "swap":
        victim.write_bytes(store.blob_path(manifest.experts[0][0]).read_bytes())
    elif edit != "gone":
        victim.write_bytes(data[:-1] if edit == "cut" else data + b"\0")
    with pytest.raises(BadChecksum, match=victim.name):
        store.verify(manifest.blobs())
    if edit not in ("flip", "swap"):
        with pytest.raises(ModelError, match=victim.name):
            store.tensors(manifest.experts[1][2])
