"""Importing: the right experts, the same hash every time, and nothing half-finished ever."""

import contextlib
import errno
import resource
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from coeld.compression.quantize import dequantize
from coeld.errors import BadModelFile, DiskFull, ModelError, UnsupportedModel
from coeld.model import onnx_blobs
from coeld.model.checkpoint import Vocabulary
from coeld.model.families import blueprint
from coeld.model.importer import Origin, Precision, import_checkpoint
from coeld.model.manifest import Manifest, expert_matrices, matrix_form
from coeld.model.store import Store
from tests.fakes.memory_checkpoint import ARCHITECTURES, huggingface
from tests.harness.importing import import_file, quiet
from tests.harness.tiny_checkpoints import FAMILIES, write_folder
from tests.reference import gguf_numpy
from tests.reference.tiny_gguf import write_tiny_llama

Imported = tuple[Store, Manifest]
FC = ("fc1", "fc2")
ROOT = Path(__file__).parents[3]


def weights(store: Store, manifest: Manifest, layer: int, expert: int) -> list[np.ndarray]:
    """gate, up, down."""
    views = store.tensors(manifest.experts[layer][expert])
    fc1, fc2 = (dequantize(views[f"{name}.w"][0], views[f"{name}.s"][0], 8) for name in FC)
    return [fc1[0::2], fc1[1::2], fc2]


def vocabulary(views: dict[str, np.ndarray], name: str) -> np.ndarray:
    w = views[f"{name}.w"]
    return dequantize(w.reshape(len(w), -1), views[f"{name}.s"], 8)


def files_in(store: Store) -> set[str]:
    return {str(path.relative_to(store.root)) for path in store.root.rglob("*") if path.is_file()}


def test_three_bits_in_blocks_that_the_kernel_refuses_are_unsupported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES["mixtral"].config, "intermediate_size", 48)  # blocks of 16
    write_folder(tmp_path / "moe", "mixtral")
    store = Store(tmp_path / "store")
    with pytest.raises(UnsupportedModel, match="--bits 8, 4 or 2"):
        import_file(store, tmp_path / "moe", "moe", precision=Precision(3))
    assert store.names() == []
    import_file(store, tmp_path / "moe", "moe", precision=Precision(2))


def test_each_expert_holds_its_neurons_of_the_feed_forward_block(
    imported: Imported, tiny_gguf: Path
) -> None:
    """Up to smoothing, which scales input channels: of x by 1/a and of the neurons by 1/b."""
    store, manifest = imported
    tensors = gguf_numpy.load(tiny_gguf).tensors
    width = manifest.shape.expert_width
    for layer in range(3):
        norm = store.tensors(manifest.trunk[layer])["ffn_norm"]
        a = tensors[f"blk.{layer}.ffn_norm.weight"] / norm
        for expert in range(8):
            own = slice(expert * width, (expert + 1) * width)
            gate, up, down = weights(store, manifest, layer, expert)
            wanted = tensors[f"blk.{layer}.ffn_down.weight"][:, own]
            b = np.exp2(
                np.round(
                    4 * np.log2(np.linalg.norm(down, axis=0))
                    - 4 * np.log2(np.linalg.norm(wanted, axis=0))
                )
                / 4
            )
            for found, scaled in {
                "gate": (gate, tensors[f"blk.{layer}.ffn_gate.weight"][own] * a),
                "up": (up, tensors[f"blk.{layer}.ffn_up.weight"][own] * a / b[:, None]),
                "down": (down, wanted * b),
            }.values():
                assert np.abs(found - scaled).max() <= np.abs(scaled).max() / 254 * 1.001


def test_the_manifest_says_where_the_model_came_from(imported: Imported) -> None:
    assert (imported[1].source, imported[1].licence) == ("tiny.gguf", "apache-2.0")


def test_the_same_file_gives_the_same_hash(
    imported: Imported, tiny_gguf: Path, tmp_path: Path
) -> None:
    origin = Origin("somewhere else", "another spelling")
    again = import_file(Store(tmp_path / "s"), tiny_gguf, "twin", origin=origin)
    assert again.hash == imported[1].hash
    assert (again.source, again.licence) == ("somewhere else", "another spelling")


def test_an_untied_model_gets_an_embedding_of_its_own(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "m.gguf", layers=1, tied=False)
    store = Store(tmp_path / "s")
    manifest = import_file(store, path, "untied")
    tensors = gguf_numpy.load(path).tensors
    views = store.tensors(manifest.embedding)
    rows = vocabulary(views, "embedding")
    assert not manifest.tied
    assert np.abs(rows - tensors["token_embd.weight"]).max() < 0.01
    head = store.tensors(manifest.head)
    found = vocabulary(head, "head")
    assert np.abs(found - tensors["output.weight"]).max() < 0.01


def test_progress_rises_from_nothing_to_everything(tiny_gguf: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    import_file(Store(tmp_path / "s"), tiny_gguf, "x", lambda *progress: seen.append(progress))
    done = [step[0] for step in seen]
    assert done == sorted(done)
    assert done[0] == 0
    assert done[-1] == seen[-1][1] == tiny_gguf.stat().st_size


def test_nothing_but_model_and_lock_is_left(imported: Imported) -> None:
    store, manifest = imported
    blobs = {f"blobs/{ref.sha256}" for ref in manifest.blobs()}
    assert files_in(store) == blobs | {"lock", "models/tiny.json"}


def test_a_name_that_is_taken_is_refused(imported: Imported, tiny_gguf: Path) -> None:
    with pytest.raises(ModelError, match="installed already"):
        import_file(imported[0], tiny_gguf, "tiny")


def test_a_file_that_is_not_there_is_said_plainly(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(ModelError, match=r"cannot open|has no config"):
            import_file(Store(tmp_path / "s"), path, "x")


def test_another_architecture_is_unsupported(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "m.gguf", layers=1, architecture="mamba")
    with pytest.raises(UnsupportedModel, match=r"'mamba'.*coeld runs .*llama.*qwen3moe"):
        import_file(Store(tmp_path / "s"), path, "x")


def test_a_bad_weight_in_the_last_layer_leaves_no_model(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "m.gguf", layers=3)
    data = bytearray(path.read_bytes())
    data[len(data) - 340 : len(data) - 338] = b"\x00\x7c"  # an infinite scale
    path.write_bytes(data)
    store = Store(tmp_path / "s")
    with pytest.raises(BadModelFile, match=r"blk\.2\.ffn_down"):
        import_file(store, path, "x")
    assert store.names() == []


# Interruption

CHILD = """
import signal, sys
from pathlib import Path
from coeld.model.store import Store
from tests.harness.importing import import_file

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it

def stop_at_layer_3(done, total, what):
    if what == "layer 3":
        print(what, flush=True)
        signal.pause()

import_file(Store(Path(sys.argv[1])), Path(sys.argv[2]), "x", stop_at_layer_3)
"""


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_import_goes_on_and_ends_with_the_same_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: signal.Signals
) -> None:
    path = write_tiny_llama(tmp_path / "m.gguf", layers=6)
    store = Store(tmp_path / "s")
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(store.root), str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"layer 3\n"
        child.send_signal(stop)
        assert child.wait() != 0
    assert store.names() == []
    assert list(store.partial.glob("*.tmp")) == []

    redone: list[int] = []
    build = onnx_blobs.linear_blob
    monkeypatch.setattr(onnx_blobs, "linear_blob", lambda *w: redone.append(1) or build(*w))
    resumed = import_file(store, path, "x")
    assert len(redone) == 3
    store.verify(resumed.blobs())
    fresh = import_file(Store(tmp_path / "fresh"), path, "x")
    assert resumed.hash == fresh.hash
    assert files_in(store) == files_in(Store(tmp_path / "fresh"))


def test_a_damaged_journal_only_costs_time(
    imported: Imported, tiny_gguf: Path, tmp_path: Path
) -> None:
    store = Store(tmp_path / "s")

    def stop(done: int, total: int, what: str) -> None:
        if what == "layer 1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_file(store, tiny_gguf, "tiny", stop)
    (journal,) = store.partial.iterdir()
    journal.write_bytes(journal.read_bytes()[:-20] + b'\n\xff\n[]\n{"part": 1, "refs": 2}\n')
    assert import_file(store, tiny_gguf, "tiny").hash == imported[1].hash


def test_finished_parts_whose_blobs_vanished_are_made_again(
    imported: Imported, tiny_gguf: Path, tmp_path: Path
) -> None:
    store = Store(tmp_path / "s")

    def stop(done: int, total: int, what: str) -> None:
        if what == "layer 1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_file(store, tiny_gguf, "tiny", stop)
    for blob in (store.root / "blobs").iterdir():
        blob.unlink()
    again = import_file(store, tiny_gguf, "tiny")
    store.verify(again.blobs())
    assert again.hash == imported[1].hash


# Full disk

MOUNT_BYTES = 1 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={MOUNT_BYTES}", "tmpfs", str(mount)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs root, to mount a small file system")
    yield mount
    subprocess.run(["umount", "--lazy", str(mount)], check=True)


def test_a_disk_that_is_too_small_is_known_before_the_start(
    tmp_path: Path, small_disk: Path
) -> None:
    path = write_tiny_llama(tmp_path / "m.gguf", layers=20)
    with pytest.raises(DiskFull, match=r"\d+ bytes are needed, \d+ are free"):
        import_file(Store(small_disk / "s"), path, "x")


def test_a_disk_that_fills_up_during_the_import_leaves_no_model_and_can_go_on(
    tmp_path: Path, small_disk: Path, imported: Imported, tiny_gguf: Path
) -> None:
    store = Store(small_disk / "s")
    ballast = small_disk / "ballast"

    def fill(done: int, total: int, what: str) -> None:
        if what == "layer 1" and not ballast.exists():
            with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while file.write(bytes(4096)):
                    pass

    with pytest.raises(DiskFull, match=r"the disk is full.*bytes are free"):
        import_file(store, tiny_gguf, "tiny", fill)
    assert store.names() == []
    assert list(store.partial.glob("*.tmp")) == []
    ballast.write_bytes(b"")
    ballast.unlink()
    assert import_file(store, tiny_gguf, "tiny").hash == imported[1].hash


def test_a_file_size_limit_is_a_full_disk_too(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "m.gguf", layers=1)
    store = Store(tmp_path / "s")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(DiskFull):
            import_file(store, path, "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert store.names() == []
    assert list(store.partial.glob("*.tmp")) == []


def test_other_trouble_with_the_disk_is_not_called_full(tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    with store.lock():
        store.partial.rmdir()
        with pytest.raises(OSError, match="No such file") as caught:
            store.put(b"x")
        assert caught.value.errno == errno.ENOENT
        store.partial.mkdir()


# Families and precisions


@pytest.mark.parametrize("precision", [Precision(5), Precision(8, trunk_bits=2)])
def test_a_width_that_does_not_exist_is_refused(imported: Imported, precision: Precision) -> None:
    with pytest.raises(ModelError, match=r"bits for .*: use one of .*4, 8, 32"):
        precision.table(imported[1].shape)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_every_family_is_imported_as_it_is_at_32_bits(name: str, tmp_path: Path) -> None:
    store, checkpoint = Store(tmp_path / "s"), huggingface(name)
    precision = Precision(bits=32, trunk_bits=32)
    manifest = import_checkpoint(store, checkpoint, "m", quiet, precision=precision)
    assert store.manifest("m") == manifest
    plan = blueprint(checkpoint)
    for layer in range(plan.shape.layers):
        trunk = store.tensors(manifest.trunk[layer])
        for key, wanted in plan.trunk(layer).items():
            stored = key if key in trunk else f"{key}.w"
            np.testing.assert_array_equal(trunk[stored], wanted)
        parts = [store.tensors(ref) for ref in manifest.experts[layer]]
        for index in range(len(plan.layers[layer].experts)):
            wanted = plan.expert(layer, index)
            own = parts if manifest.shape.routing is None else parts[index : index + 1]
            for offset, part in enumerate(("gate", "up")):
                found = np.concatenate([views["fc1.w"][0, offset::2] for views in own])
                np.testing.assert_array_equal(found, wanted[part])
            found = np.concatenate([views["fc2.w"][0] for views in own], 1)
            np.testing.assert_array_equal(found, wanted["down"])
            if "down.b" in wanted:
                np.testing.assert_array_equal(own[0]["fc2.b"][0], wanted["down.b"])
                np.testing.assert_array_equal(own[0]["fc1.b"][0, 0::2], wanted["gate.b"])
                np.testing.assert_array_equal(own[0]["fc1.b"][0, 1::2], wanted["up.b"])


@pytest.mark.parametrize("name", ["llama", "qwen2_moe"])
def test_each_expert_may_have_a_width_of_its_own(name: str, tmp_path: Path) -> None:
    widths = [8, 4, 3, 2, 32, 8, 2, 4]
    precision = Precision(lambda layer, expert: widths[(layer + expert) % 8], trunk_bits=4)
    manifest = import_checkpoint(
        Store(tmp_path / "s"), huggingface(name), "m", quiet, precision=precision
    )
    shape = manifest.shape
    for layer, experts in enumerate(manifest.experts):
        found = [matrix_form(ref, *expert_matrices(shape)[0]).bits for ref in experts]
        assert found == [widths[(layer + expert) % 8] for expert in range(shape.experts)]
        assert matrix_form(manifest.trunk[layer], "o", 128, 128).bits == 4


def test_another_precision_is_another_model_and_continues_no_import_of_this(
    imported: Imported, tiny_gguf: Path, tmp_path: Path
) -> None:
    store = Store(tmp_path / "s")

    def stop(done: int, total: int, what: str) -> None:
        if what == "layer 1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_file(store, tiny_gguf, "tiny", stop, precision=Precision(4))
    assert import_file(store, tiny_gguf, "tiny").hash == imported[1].hash
    assert import_file(store, tiny_gguf, "four", precision=Precision(4)).hash != imported[1].hash


def test_smoothing_reads_the_vocabularys_text_and_changes_routed_models_too(
    imported: Imported, tmp_path: Path
) -> None:
    store, tiny = imported
    words = Vocabulary(store.blob_path(tiny.tokenizer).read_bytes(), None, (), False, None)
    checkpoint = huggingface("qwen2_moe")
    rough = import_checkpoint(Store(tmp_path / "a"), checkpoint, "m", quiet)
    checkpoint.words = words
    smooth = import_checkpoint(Store(tmp_path / "b"), checkpoint, "m", quiet)
    assert (rough.tokenizer, smooth.tokenizer) == (None, tiny.tokenizer)
    for before, after in zip(rough.experts[0], smooth.experts[0], strict=True):
        assert before.sha256 != after.sha256


def test_experts_stream_through_memory_one_by_one(tmp_path: Path) -> None:
    """64 experts of 0.75 MB as float32 in each layer; never more than a few are there."""
    checkpoint = huggingface("mixtral", num_local_experts=64, intermediate_size=512)
    one, other = np.zeros((512, 128), np.float32), np.zeros((128, 512), np.float32)
    for layer in range(3):
        at = f"model.layers.{layer}.block_sparse_moe."
        checkpoint.tensors[at + "gate.weight"] = np.zeros((64, 128), np.float32)
        for expert in range(64):
            for part, value in (("w1", one), ("w3", one), ("w2", other)):
                checkpoint.tensors[f"{at}experts.{expert}.{part}.weight"] = value
    tracemalloc.start()
    try:
        import_checkpoint(Store(tmp_path / "s"), checkpoint, "m", quiet)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8e6
