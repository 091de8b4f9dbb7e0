"""The store: what exists, what is refused, what is shared, what is left after trouble."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from coeld.errors import BadChecksum, BadModelFile, DiskFull, ModelError, UnknownModel
from coeld.model.manifest import BlobRef, Manifest
from coeld.model.store import Store, default_store, free_bytes

Imported = tuple[Store, Manifest]


@pytest.fixture
def copy(imported: Imported, tmp_path: Path) -> Imported:
    """A store that a test may change."""
    shutil.copytree(imported[0].root, tmp_path / "store")
    return Store(tmp_path / "store"), imported[1]


def test_a_manifest_comes_back_as_it_was_saved(imported: Imported) -> None:
    store, manifest = imported
    assert store.manifest("tiny") == manifest
    assert store.models() == [manifest]
    store.verify(manifest.blobs())


def test_nothing_is_installed_in_a_directory_that_does_not_exist(tmp_path: Path) -> None:
    store = Store(tmp_path / "none")
    assert store.models() == []
    with pytest.raises(UnknownModel, match="installed: none"):
        store.manifest("tiny")
    with pytest.raises(UnknownModel):
        store.remove("tiny")
    assert not store.root.exists()


def test_an_unknown_name_is_answered_with_the_known_ones(imported: Imported) -> None:
    with pytest.raises(UnknownModel, match=r"'huge'.*installed: tiny"):
        imported[0].manifest("huge")


@pytest.mark.parametrize("name", ["", "../tiny", "a/b", "Tiny", ".hidden", "a" * 65, "a\n", "ä"])
def test_a_name_cannot_leave_the_folder(imported: Imported, name: str) -> None:
    with pytest.raises(ModelError, match="cannot be the name"):
        imported[0].manifest(name)


def test_weights_are_views_of_the_file_and_cannot_be_written(imported: Imported) -> None:
    store, manifest = imported
    for ref in (manifest.head, manifest.trunk[0], manifest.experts[1][7]):
        for name, view in store.tensors(ref).items():
            assert view.shape == ref.tensors[name].shape
            assert not view.flags.owndata
            assert not view.flags.writeable
            assert view.ctypes.data % 64 == 0


def test_a_blob_of_the_wrong_size_is_not_here(copy: Imported) -> None:
    store, manifest = copy
    ref = manifest.experts[0][0]
    path = store.blob_path(ref)
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1])
    assert not store.has(ref)
    with pytest.raises(BadChecksum, match="wrong size"):
        store.tensors(ref)


@pytest.mark.parametrize("damage", ["altered", "missing"])
def test_verify_names_the_damaged_blob(copy: Imported, damage: str) -> None:
    store, manifest = copy
    path = store.blob_path(manifest.experts[0][3])
    data = bytearray(path.read_bytes())
    path.unlink()
    if damage == "altered":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    with pytest.raises(BadChecksum, match=path.name):
        store.verify(manifest.blobs())


def rot(store: Store, ref: BlobRef) -> Path:
    """One bit of a blob turns over."""
    path = store.blob_path(ref)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    return path


def test_a_damaged_blob_is_removed_so_that_it_can_come_again(copy: Imported) -> None:
    store, manifest = copy
    bad, good = manifest.experts[0][3], manifest.experts[0][4]
    data = store.blob_path(bad).read_bytes()
    rot(store, bad)
    assert store.damaged([good, bad]) == [bad]
    assert (store.has(good), store.has(bad)) == (True, False)
    store.put(data)
    store.verify(manifest.blobs())


def test_no_blob_is_removed_from_a_store_that_another_process_changes(copy: Imported) -> None:
    store, manifest = copy
    rot(store, manifest.head)
    with Store(store.root).lock():
        assert store.damaged([manifest.head]) == [manifest.head]
        assert store.has(manifest.head)
    assert store.damaged([manifest.head]) == [manifest.head]
    assert not store.has(manifest.head)


def test_storing_a_blob_again_mends_it(copy: Imported) -> None:
    store, manifest = copy
    data = store.blob_path(manifest.head).read_bytes()
    rot(store, manifest.head)
    assert store.put(data) == manifest.head.sha256
    store.verify([manifest.head])


def test_removing_a_model_keeps_what_another_one_shares(copy: Imported) -> None:
    store, manifest = copy
    own = BlobRef(store.put(b"{{ messages }}"), 14, {})
    store.save(replace(manifest, name="other", chat_template=own))
    store.remove("tiny")
    assert store.names() == ["other"]
    store.verify(store.manifest("other").blobs())
    assert manifest.chat_template is not None
    assert not store.has(manifest.chat_template)
    store.remove("other")
    assert list((store.root / "blobs").iterdir()) == []


def test_blobs_of_a_damaged_neighbour_are_not_collected(copy: Imported) -> None:
    store, manifest = copy
    (store.root / "models" / "damaged.json").write_text("{")
    with pytest.raises(ModelError, match="kept"):
        store.remove("tiny")
    assert store.has(manifest.head)
    store.remove("damaged")
    assert not store.has(manifest.head)


def test_blobs_are_read_only_and_stored_once(copy: Imported) -> None:
    store, _ = copy
    sha256 = store.put(b"hello")
    path = store.root / "blobs" / sha256
    before = path.stat()
    assert before.st_mode & 0o777 == 0o444
    assert store.put(b"hello") == sha256
    assert path.stat().st_ino == before.st_ino


def test_a_half_written_blob_is_replaced(copy: Imported) -> None:
    store, _ = copy
    path = store.root / "blobs" / store.put(b"hello")
    path.chmod(0o644)
    path.write_bytes(b"he")
    store.put(b"hello")
    assert path.read_bytes() == b"hello"


def test_two_changes_at_once_are_refused(copy: Imported) -> None:
    store, _ = copy
    with (
        store.lock(),
        pytest.raises(ModelError, match="another coeld process"),
        Store(store.root).lock(),
    ):
        pass
    with Store(store.root).lock():
        pass


def test_taking_the_lock_clears_what_a_killed_process_left(copy: Imported) -> None:
    store, _ = copy
    (store.partial / "file.tmp").write_text("half")
    (store.partial / "folder.tmp").mkdir()
    (store.partial / "folder.tmp" / "file").write_text("half")
    with store.lock():
        assert list(store.partial.iterdir()) == []


def test_too_little_room_is_said_in_bytes_before_anything_is_written(tmp_path: Path) -> None:
    store = Store(tmp_path / "not" / "there" / "yet")
    with pytest.raises(DiskFull, match=r"\d+ bytes are needed, \d+ are free"):
        store.require_free(free_bytes(tmp_path) + (1 << 40))


def test_a_store_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ModelError, match="cannot write to the store"),
        Store(tmp_path / "file").lock(),
    ):
        pass


def test_the_default_place_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("COELD_STORE", raising=False)
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    assert default_store() == Path("/home/somebody/.local/share/coeld/store")
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/coeld:/var/lib/other")
    assert default_store() == Path("/var/lib/coeld/store")
    monkeypatch.setenv("COELD_STORE", "/elsewhere")
    assert default_store() == Path("/elsewhere")


def test_the_agent_can_use_the_store_without_numpy() -> None:
    code = (
        "import sys, coeld.model.store, coeld.model.catalogue, coeld.ui.model_command\n"
        "heavy = {'numpy', 'onnx', 'onnxruntime', 'gguf', 'tokenizers'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], env=dict(os.environ), check=False)
    assert run.returncode == 0


def test_a_manifest_under_another_name_is_damaged(copy: Imported) -> None:
    store, _ = copy
    models = store.root / "models"
    (models / "stolen.json").write_text((models / "tiny.json").read_text())
    with pytest.raises(BadModelFile, match="manifest of 'tiny'"):
        store.manifest("stolen")


def test_views_hold_little_endian_numbers(imported: Imported) -> None:
    store, manifest = imported
    views = store.tensors(manifest.head)
    assert views["norm"].dtype == np.dtype("<f4")
    assert views["head.w"].dtype == np.uint8
