"""Versions of a model in the store: ordered by what is in them, kept until nobody needs them."""

from dataclasses import replace

import pytest

from coeld.errors import BadModelFile, ModelError, UnknownModel
from coeld.ids import ModelHash
from coeld.model.manifest import parse_manifest
from tests.harness.importing import import_file


def test_an_update_becomes_the_next_version_and_the_one_before_stays(two_versions, tiny) -> None:
    first, second = two_versions.versions("tiny")
    assert (first, second.version) == (tiny, 2)
    assert first.release < second.release
    assert two_versions.manifest("tiny") == second
    assert two_versions.version("tiny", first.hash) == first
    assert two_versions.names() == ["tiny"]
    with pytest.raises(UnknownModel, match="not in"):
        two_versions.version("tiny", ModelHash("0" * 64))


def test_the_version_is_part_of_the_hash_and_a_first_one_is_as_it_always_was(tiny) -> None:
    assert replace(tiny, version=2).hash != tiny.hash
    assert '"version"' not in tiny.to_json()
    again = parse_manifest(replace(tiny, version=7).to_json())
    assert (again.version, again.demand().version) == (7, 7)
    for wrong in (0, -1, 2**31, "2", 2.0):
        with pytest.raises(BadModelFile, match="version"):
            parse_manifest(replace(tiny, version=wrong).to_json())


def test_what_is_there_already_is_no_update(two_versions, tiny_gguf, tiny_next_gguf) -> None:
    with pytest.raises(ModelError, match="--update"):
        import_file(two_versions, tiny_gguf, "tiny")
    with pytest.raises(ModelError, match="version 2"):
        import_file(two_versions, tiny_next_gguf, "tiny", update=True)
    back = import_file(two_versions, tiny_gguf, "tiny", update=True)
    assert back.version == 3
    assert [manifest.version for manifest in two_versions.versions("tiny")] == [1, 2, 3]


def test_an_older_version_does_not_replace_a_newer_one(two_versions, tiny) -> None:
    with pytest.raises(AssertionError, match="older"):
        two_versions.save(tiny)


def test_retired_versions_go_with_what_only_they_need(two_versions) -> None:
    first, second = two_versions.versions("tiny")
    shared = {ref.sha256 for ref in first.blobs()} & {ref.sha256 for ref in second.blobs()}
    assert shared, "the tokenizer at least"
    before = two_versions.changed("tiny")
    two_versions.retire("tiny")
    assert two_versions.versions("tiny") == [second]
    assert two_versions.changed("tiny") != before
    assert all(two_versions.has(ref) for ref in second.blobs())
    assert [
        ref for ref in first.blobs() if two_versions.has(ref) and ref.sha256 not in shared
    ] == []


def test_removing_a_model_removes_all_of_its_versions(two_versions) -> None:
    two_versions.remove("tiny")
    assert two_versions.names() == []
    assert two_versions.used_bytes() == 0
    assert list((two_versions.root / "models").iterdir()) == []


def test_an_older_manifest_that_is_damaged_is_as_good_as_gone(two_versions) -> None:
    (damaged,) = (two_versions.root / "models").glob("tiny@*")
    damaged.write_text("{}")
    assert [manifest.version for manifest in two_versions.versions("tiny")] == [2]
