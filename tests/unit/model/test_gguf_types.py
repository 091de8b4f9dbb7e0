"""GGUF tensors of every type against the spec written out, and files in several parts."""

import os
from pathlib import Path
from random import Random

import gguf
import numpy as np
import pytest

from coeld.errors import BadModelFile
from coeld.model.families import blueprint
from coeld.model.gguf_file import SUPPORTED_TYPES, GgufFile
from coeld.model.open_checkpoint import open_checkpoint
from tests.fakes.memory_checkpoint import gguf_spelling
from tests.harness.tiny_files import Type, write_gguf
from tests.reference.ggml_blocks import BLOCKS, random_block


def write(path: Path, kind: str, blocks: list[bytes], shape: tuple[int, ...]) -> None:
    writer = gguf.GGUFWriter(path, "test")
    weights, size, _ = BLOCKS[kind]
    raw = np.frombuffer(b"".join(blocks), np.uint8)
    raw = raw.reshape(*shape[:-1], shape[-1] // weights * size)
    writer.add_tensor("t", raw, raw_dtype=Type[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_every_supported_type_is_tested() -> None:
    assert {kind.name for kind in SUPPORTED_TYPES} == {*BLOCKS, "F32", "F16"}


@pytest.mark.parametrize("kind", sorted(BLOCKS))
def test_each_type_stands_for_what_the_spec_says(tmp_path: Path, kind: str) -> None:
    weights, size, decode = BLOCKS[kind]
    assert gguf.GGML_QUANT_SIZES[Type[kind]] == (weights, size)
    for seed in range(8):
        rng, shape = Random(f"{kind}/{seed}"), (3, 2, 256)
        blocks = [random_block(kind, rng) for _ in range(3 * 2 * 256 // weights)]
        slow = np.array([value for block in blocks for value in decode(block)]).reshape(shape)
        write(tmp_path / "m.gguf", kind, blocks, shape)
        with GgufFile(tmp_path / "m.gguf") as file:
            found = file.read("t")
            part = file.read("t", 1, 2)
        np.testing.assert_allclose(found, slow, rtol=2e-6, atol=1e-4, err_msg=f"seed={seed}")
        np.testing.assert_array_equal(part, found[1:2])


@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0", "BF16"])
def test_one_expert_of_many_is_read_without_the_rest(tmp_path: Path, kind: str) -> None:
    weights, _, decode = BLOCKS[kind]
    rng, shape, path = Random(kind), (4, 64, 256), tmp_path / "m.gguf"
    blocks = [random_block(kind, rng) for _ in range(4 * 64 * 256 // weights)]
    write(path, kind, blocks, shape)
    with GgufFile(path) as file:
        os.truncate(path, path.stat().st_size - 64)  # the last expert is cut
        mine = blocks[len(blocks) // 4 : len(blocks) // 2]
        slow = np.array([value for block in mine for value in decode(block)]).reshape(64, 256)
        np.testing.assert_allclose(file.read("t", 1, 2)[0], slow, rtol=2e-6, atol=1e-4)
        with pytest.raises(BadModelFile, match="became shorter"):
            file.read("t", 3)


@pytest.mark.parametrize("kind", [Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q5_1])
def test_a_whole_model_of_a_type_is_the_model_rounded(tmp_path: Path, kind: Type) -> None:
    checkpoint = gguf_spelling("qwen3_moe")
    path = write_gguf(tmp_path / "m.gguf", checkpoint, kind)
    with GgufFile(path) as file:
        blueprint(file)
        for name in file.names():
            wanted = checkpoint.read(name)
            error = np.abs(file.read(name) - wanted).max() / np.abs(wanted).max()
            assert error < (0.15 if kind in (Type.Q4_0, Type.Q5_1) else 0.01), name


# Several parts


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """The first of several parts, as the gguf package writes them."""
    return write_gguf(tmp_path / "m.gguf", gguf_spelling("mixtral"), split_tensors=8)


def test_parts_are_one_checkpoint_whichever_is_named(parts: Path, tmp_path: Path) -> None:
    whole, files = gguf_spelling("mixtral"), sorted(parts.parent.glob("*.gguf"))
    assert len(files) > 3
    fingerprints = set()
    for path in (files[0], files[2], files[-1]):
        with open_checkpoint(path) as found:
            assert set(found.names()) == set(whole.names())
            for name in found.names():
                np.testing.assert_array_equal(found.read(name), whole.read(name))
            assert found.source == files[0].name
            assert found.bytes == sum(file.stat().st_size for file in files)
            blueprint(found)
            fingerprints.add(found.fingerprint())
    assert len(fingerprints) == 1


def test_a_missing_part_is_named(parts: Path) -> None:
    victim = sorted(parts.parent.glob("*.gguf"))[1]
    victim.unlink()
    with pytest.raises(BadModelFile, match=f"{victim.name} is missing"):
        GgufFile(parts)


def test_parts_that_do_not_belong_together_are_refused(parts: Path) -> None:
    files = sorted(parts.parent.glob("*.gguf"))
    second, third = files[1].read_bytes(), files[2].read_bytes()
    files[1].write_bytes(third)
    with pytest.raises(BadModelFile, match=r"called part 2 of .*, and says \(2, "):
        GgufFile(parts)
    files[1].write_bytes(second)
    other = parts.parent / "part.gguf"
    files[0].rename(other)
    with pytest.raises(BadModelFile, match="is not called NAME-00001-of"):
        GgufFile(other)
    with pytest.raises(BadModelFile, match="is missing"):
        GgufFile(files[1])


@pytest.mark.parametrize("count", [0, 1])
def test_a_file_merged_from_parts_is_whole(tmp_path: Path, count: int) -> None:
    checkpoint = gguf_spelling("llama")
    checkpoint.config = {**checkpoint.config, "split.count": count, "split.no": 0}
    with GgufFile(write_gguf(tmp_path / "merged.gguf", checkpoint)) as found:
        assert set(found.names()) == set(checkpoint.names())
        blueprint(found)


@pytest.mark.parametrize("count", [-1, 1001, 70_000])
def test_an_absurd_number_of_parts_is_refused(tmp_path: Path, count: int) -> None:
    checkpoint = gguf_spelling("llama")
    checkpoint.config = {**checkpoint.config, "split.count": count, "split.no": 0}
    path = write_gguf(tmp_path / f"m-00001-of-{count:05}.gguf", checkpoint)
    with pytest.raises(BadModelFile, match=r"one of '-?[0-9]+' parts"):
        GgufFile(path)


def test_a_tensor_in_two_parts_is_refused(tmp_path: Path) -> None:
    checkpoint = gguf_spelling("llama")
    for number in range(2):
        checkpoint.config = {**checkpoint.config, "split.count": 2, "split.no": number}
        write_gguf(tmp_path / f"m-0000{number + 1}-of-00002.gguf", checkpoint)
    with pytest.raises(BadModelFile, match="occurs in two parts"):
        GgufFile(tmp_path / "m-00001-of-00002.gguf")
