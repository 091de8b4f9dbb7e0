"""GGUF files: read as the `gguf` package reads them; anything broken is a typed error."""

import os
import random
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from coeld.errors import BadModelFile, ModelError, UnsupportedModel
from coeld.model.families import blueprint
from coeld.model.gguf_file import GgufFile
from tests.reference import gguf_numpy
from tests.reference.tiny_gguf import Type, write_tiny_llama

EMBEDDING = "token_embd.weight"


def read_all(path: Path) -> None:
    """Everything an import reads."""
    with GgufFile(path) as file:
        plan = blueprint(file)
        file.vocabulary(plan.shape.vocab)
        for layer in range(plan.shape.layers):
            plan.trunk(layer)
            plan.expert(layer, 0)
        for source in (plan.embedding, plan.head, plan.norm):
            source.read(file)


def header_bytes(path: Path) -> int:
    with GgufFile(path) as file:
        return min(tensor.offset for tensor in file.tensors.values())


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.Q8_0, Type.Q4_1])
def test_every_supported_type_is_read_as_the_reference_reads_it(tmp_path: Path, kind: Type) -> None:
    path = write_tiny_llama(tmp_path / "m.gguf", layers=1, kind=kind)
    reference = gguf_numpy.load(path)
    with GgufFile(path) as file:
        assert file.tensors.keys() == reference.tensors.keys()
        for name, wanted in reference.tensors.items():
            np.testing.assert_array_equal(file.read(name), wanted)
        part = file.read(EMBEDDING, 5, 9)
        np.testing.assert_array_equal(part, reference.tensors[EMBEDDING][5:9])


def test_metadata_and_places_are_those_the_gguf_package_finds(tiny_gguf: Path) -> None:
    reader = gguf.GGUFReader(tiny_gguf)
    with GgufFile(tiny_gguf) as file:
        fields = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
        assert file.config == fields
        assert {name: tensor.offset for name, tensor in file.tensors.items()} == {
            tensor.name: tensor.data_offset for tensor in reader.tensors
        }


def test_a_file_cut_anywhere_is_incomplete(tiny_gguf: Path, tmp_path: Path) -> None:
    data = tiny_gguf.read_bytes()
    path = tmp_path / "cut.gguf"
    in_header = range(0, header_bytes(tiny_gguf), 29)
    in_weights = range(header_bytes(tiny_gguf), len(data), 5003)
    for length in [*in_header, *in_weights, len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(BadModelFile):
            GgufFile(path)


def test_flipped_bytes_give_a_model_error_or_another_model_but_nothing_else(
    tiny_gguf: Path, tmp_path: Path
) -> None:
    data = tiny_gguf.read_bytes()
    header = header_bytes(tiny_gguf)
    path = tmp_path / "flipped.gguf"
    refused = 0
    for seed in range(400):
        rng = random.Random(seed)
        damaged = bytearray(data)
        for _ in range(rng.choice([1, 1, 4, 64])):
            damaged[rng.randrange(header if rng.random() < 0.9 else len(data))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            read_all(path)
        except ModelError:
            refused += 1
    assert refused > 100


def test_random_bytes_after_the_magic_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "random.gguf"
    for seed in range(200):
        rng = random.Random(seed)
        head = b"GGUF" + struct.pack("<IQQ", 3, rng.randrange(4), rng.randrange(1, 9))
        path.write_bytes(head + rng.randbytes(rng.randrange(4096)))
        with pytest.raises(BadModelFile):
            GgufFile(path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GGUF",
        b"\x7fELF" + bytes(100),
        b"PK\x03\x04" + bytes(100),
        b"GGML" + bytes(100),
        b"<!doctype html><title>not found</title>",
    ],
)
def test_a_foreign_file_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(BadModelFile, match="does not begin like one"):
        GgufFile(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("version", "says"), [(1, "version 1"), (4, "version 4"), (3 << 24, "big-endian")]
)
def test_another_version_is_unsupported(tmp_path: Path, version: int, says: str) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", version, 0, 0) + bytes(99))
    with pytest.raises(UnsupportedModel, match=says):
        GgufFile(tmp_path / "m.gguf")


HUGE = 1 << 62


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def tensor(
    name: bytes, shape: list[int], offset: int, kind: int = 0, dims: int | None = None
) -> bytes:
    count = len(shape) if dims is None else dims
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", count, *shape, kind, offset)


@pytest.mark.parametrize(
    ("tensors", "keys", "body", "says"),
    [
        (HUGE, 0, b"", "claims"),
        (0, HUGE, b"", "claims"),
        (1000, 0, b"", "0 dimensions"),
        (0, 1, text(b"key", HUGE), "name of"),
        (0, 1, text(b"k") + struct.pack("<IQ", 8, HUGE), "in the middle"),
        (0, 1, text(b"k") + struct.pack("<IIQ", 9, 4, HUGE), "array of"),
        (0, 1, text(b"k") + struct.pack("<IIQ", 9, 8, 200), "in the middle"),
        (0, 1, text(b"k") + struct.pack("<IIQ", 9, 9, 1), "unknown type 9"),
        (0, 1, text(b"k") + struct.pack("<I", 77), "unknown type 77"),
        (0, 1, text(b"\xff") + struct.pack("<IB", 0, 1), "not UTF-8"),
        (0, 2, (text(b"k") + struct.pack("<IB", 0, 1)) * 2, "occurs twice"),
        (1, 0, tensor(b"t", [4], 0, dims=0), "0 dimensions"),
        (1, 0, tensor(b"t", [4], 0, dims=HUGE >> 40), "dimensions"),
        (1, 0, tensor(b"t", [0], 0), "shape"),
        (1, 0, tensor(b"t", [33], 0, kind=8), "shape"),
        (1, 0, tensor(b"t", [HUGE, HUGE, HUGE], 0), "would end at"),
        (1, 0, tensor(b"t", [4], HUGE * 2), "would end at"),
        (1, 0, tensor(b"t", [4], 7), "misplaced"),
        (2, 0, tensor(b"a", [16], 0) + tensor(b"b", [16], 32), "misplaced"),
        (2, 0, tensor(b"a", [8], 0) + tensor(b"a", [8], 32), "occurs twice"),
        (0, 1, text(b"general.alignment") + struct.pack("<II", 4, 0), "alignment"),
        (0, 1, text(b"general.alignment") + struct.pack("<II", 4, 24), "alignment"),
        (0, 1, text(b"general.alignment") + struct.pack("<If", 6, 32.0), "alignment"),
    ],
)
def test_an_absurd_header_is_refused(
    tmp_path: Path, tensors: int, keys: int, body: bytes, says: str
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + body + bytes(256))
    with pytest.raises(BadModelFile, match=says):
        GgufFile(path)


@pytest.mark.parametrize("kind", [Type.Q2_K, Type.IQ4_XS, Type.I32])
def test_an_unknown_tensor_type_is_unsupported_and_the_known_are_listed(
    tmp_path: Path, kind: Type
) -> None:
    path = tmp_path / "m.gguf"
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 0)
    path.write_bytes(head + tensor(b"t", [256], 0, int(kind)) + bytes(2048))
    with pytest.raises(UnsupportedModel, match=f"type {kind.name}.*F32, F16, BF16, Q8_0, Q4_0"):
        GgufFile(path)


def test_a_tensor_type_that_does_not_exist_is_unsupported(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + tensor(b"t", [4], 0, 200) + bytes(64))
    with pytest.raises(UnsupportedModel, match="number 200"):
        GgufFile(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_no_number_is_named(tmp_path: Path, value: float) -> None:
    norm = "blk.0.ffn_norm.weight"
    path = write_tiny_llama(tmp_path / "m.gguf", layers=1)
    with GgufFile(path) as file:
        place = file.tensors[norm].offset
    data = bytearray(path.read_bytes())
    data[place : place + 4] = struct.pack("<f", value)
    path.write_bytes(data)
    with GgufFile(path) as file, pytest.raises(BadModelFile, match=norm):
        file.read(norm)


def test_an_infinite_scale_of_a_block_is_named(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "m.gguf", layers=1)
    with GgufFile(path) as file:
        place = file.tensors[EMBEDDING].offset
    data = bytearray(path.read_bytes())
    data[place : place + 2] = struct.pack("<H", 0x7C00)
    path.write_bytes(data)
    with GgufFile(path) as file, pytest.raises(BadModelFile, match=EMBEDDING):
        file.read(EMBEDDING)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "m.gguf", layers=1)
    with GgufFile(path) as file:
        os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(BadModelFile, match="became shorter"):
            file.read(max(file.tensors.values(), key=lambda tensor: tensor.offset).name)


def test_a_missing_tensor_is_named(tiny_gguf: Path) -> None:
    with GgufFile(tiny_gguf) as file, pytest.raises(BadModelFile, match="no tensor lost"):
        file.read("lost")
