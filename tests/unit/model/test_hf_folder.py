"""Hugging Face folders: read as numpy reads them; what is broken or sly is a typed error."""

import json
import os
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coeld.errors import BadModelFile, ModelError, UnsupportedModel
from coeld.model.hf_folder import HfFolder
from coeld.model.open_checkpoint import open_checkpoint
from coeld.model.safetensors_file import HEADER_BYTES_MAX, SafetensorsFile
from tests.harness.tiny_checkpoints import (
    FAMILIES,
    encode,
    safetensors,
    tensors_of,
    write_folder,
    write_shards,
)

INDEX = "model.safetensors.index.json"
MATRIX = np.arange(12, dtype=np.float32).reshape(3, 4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """mixtral: three shards of BF16."""
    return write_folder(tmp_path / "m", "mixtral")


def small(folder: Path, **tensors: tuple[str, np.ndarray]) -> Path:
    """A folder of a few tensors in one file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    write_shards(folder, tensors or {"w": ("F32", MATRIX)})
    return folder


def header(folder: Path, value: Any, data: bytes = b"", length: int | None = None) -> None:
    """Replaces the weights by a file with this header."""
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    size = struct.pack("<Q", len(text) if length is None else length)
    (folder / "model.safetensors").write_bytes(size + text + data)


# Reading


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_all_rows_are_read_in_each_type_whole_and_in_parts(tmp_path: Path, name: str) -> None:
    family, matrices = FAMILIES[name], 0
    with HfFolder(write_folder(tmp_path / name, name)) as found:
        wanted = tensors_of(family)
        assert set(found.names()) == set(wanted)
        for tensor, value in wanted.items():
            kind = family.dtypes[matrices % len(family.dtypes) if value.ndim > 1 else 0]
            matrices += value.ndim > 1
            rounded = encode(value, kind)
            if kind == "BF16":
                rounded = (rounded.astype(np.uint32) << 16).view(np.float32)
            assert found.shape(tensor) == value.shape
            np.testing.assert_array_equal(found.read(tensor), rounded.astype(np.float32))
            part = found.read(tensor, 1, 7)
            np.testing.assert_array_equal(part, rounded.astype(np.float32)[1:7])
            part += 1  # a new array, not a view of anything
        assert found.bytes == sum(f.stat().st_size for f in found.folder.glob("*.safetensors"))


@pytest.mark.parametrize("seed", range(20))
def test_every_finite_bfloat16_and_float16_is_what_it_stands_for(tmp_path: Path, seed: int) -> None:
    bits = np.random.default_rng(seed).integers(0, 1 << 16, 4096, np.uint16)
    sign, exponent, fraction = bits >> 15, (bits >> 7) & 0xFF, bits & 0x7F
    finite = exponent != 0xFF
    power = np.where(exponent == 0, -126, exponent.astype(int) - 127)
    slow = (-1.0) ** sign * ((exponent != 0) + fraction / 128) * 2.0**power
    half = bits.view(np.float16)
    stored = {"b": ("BF16", bits[finite]), "h": ("F16", half[np.isfinite(half)])}
    with HfFolder(small(tmp_path / "m", **stored)) as found:
        np.testing.assert_array_equal(found.read("b"), slow[finite].astype(np.float32))
        np.testing.assert_array_equal(found.read("h"), half[np.isfinite(half)].astype(np.float32))


def test_one_expert_of_many_is_read_without_the_rest(tmp_path: Path) -> None:
    experts = np.random.default_rng(0).standard_normal((6, 64, 64)).astype(np.float32)
    folder = small(tmp_path / "m", e=("F32", experts))
    with HfFolder(folder) as found:
        os.truncate(folder / "model.safetensors", found.bytes - 4)  # the last expert is cut
        np.testing.assert_array_equal(found.read("e", 2, 3), experts[2:3])
        with pytest.raises(BadModelFile, match="became shorter while tensor e"):
            found.read("e", 5)


def test_bytes_are_read_as_the_numbers_they_are(tmp_path: Path) -> None:
    """For families that pack their weights."""
    packed = np.arange(256, dtype=np.uint8).reshape(2, 128)
    with HfFolder(small(tmp_path / "m", b=("U8", packed))) as found:
        np.testing.assert_array_equal(found.read("b"), packed.astype(np.float32))


def test_a_scalar_is_a_vector_of_one(tmp_path: Path) -> None:
    with HfFolder(small(tmp_path / "m", s=("F32", np.array(2.5, np.float32)))) as found:
        assert found.shape("s") == (1,)
        assert found.read("s").tolist() == [2.5]


@pytest.mark.parametrize(("kind", "bits"), [("F32", "f4"), ("F16", "f2"), ("BF16", "u2")])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_no_number_is_named(
    tmp_path: Path, kind: str, bits: str, value: float
) -> None:
    raw = MATRIX.copy()
    raw[1, 2] = value
    stored = (raw.view(np.uint32) >> 16).astype("u2") if kind == "BF16" else raw.astype(bits)
    with HfFolder(small(tmp_path / "m", w=(kind, stored))) as found:
        found.read("w", 2)
        with pytest.raises(BadModelFile, match=r"tensor w of .* holds infinities or NaN"):
            found.read("w")


def test_the_fingerprint_is_of_everything_an_import_depends_on(folder: Path) -> None:
    seen = set()
    for name in (None, "config.json", "tokenizer.json", "model-00002-of-00003.safetensors"):
        if name:
            data = bytearray((folder / name).read_bytes())
            data[-2:] = b" \n" if name.endswith("json") else b"\x01\x01"
            (folder / name).write_bytes(data if name.endswith("rs") else data.rstrip() + b"}")
            if name.endswith("json"):
                (folder / name).write_bytes((folder / name).read_bytes() + b"\n")
        with HfFolder(folder) as found:
            seen.add(found.fingerprint())
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\n", "apache-2.0"),
        ("---\ntags: x\nlicense: 'mit'\n---\n", "mit"),
        ("---\ntags: x\n---\nlicense: mit\n", "unknown"),
        ("license: mit\n", "unknown"),
        ("\xff\x00", "unknown"),
    ],
)
def test_the_licence_is_that_of_the_card(tmp_path: Path, card: str, licence: str) -> None:
    folder = small(tmp_path / "m")
    (folder / "README.md").write_bytes(card.encode("latin-1"))
    with HfFolder(folder) as found:
        assert found.licence == licence


# Folders that are not what they seem


def bad(folder: Path, says: str, kind: type[ModelError] = BadModelFile) -> None:
    with pytest.raises(ModelError, match=says) as caught:
        HfFolder(folder)
    assert type(caught.value) is kind


def reindex(folder: Path, **changes: Any) -> None:
    """Changes the index: a tensor's place, or None to drop it."""
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= changes
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v is not None}
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "place", ["../o.safetensors", "/etc/passwd", "sub/o.safetensors", "", ".."]
)
def test_an_index_that_points_elsewhere_is_refused(folder: Path, place: str) -> None:
    (folder / "sub").mkdir()
    for other in (folder / "sub", folder.parent):
        (other / "o.safetensors").write_bytes(safetensors({"w": ("F32", MATRIX)}))
    reindex(folder, w=place)
    bad(folder, "points out of the folder")


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00003.safetensors", INDEX])
def test_a_link_out_of_the_folder_is_refused(folder: Path, name: str) -> None:
    (folder / name).rename(folder.parent / "elsewhere")
    (folder / name).symlink_to(folder.parent / "elsewhere")
    bad(folder, "points out of the folder")


def test_a_tokenizer_that_is_a_link_out_of_the_folder_is_refused(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.jinja").symlink_to("/etc/hostname")
    with HfFolder(folder) as found, pytest.raises(BadModelFile, match="points out"):
        found.vocabulary(272)


def test_the_links_of_the_hubs_cache_are_followed_into_its_blobs_alone(folder: Path) -> None:
    root = folder.parent / "models--o--n"
    blobs, snapshot = root / "blobs", root / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        file.rename(blobs / f"{file.name}-blob")
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}-blob")
    with HfFolder(snapshot) as found:
        assert found.read("model.norm.weight").shape == (128,)
    (root / "refs").mkdir()
    (blobs / "config.json-blob").rename(root / "refs" / "config")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../refs/config")
    bad(snapshot, "points out of the folder")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_never_opened(folder: Path, name: str) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    os.mkfifo(folder / name)  # who opened it would wait for ever
    bad(folder, f"{name}, a pickle.*use a checkpoint in safetensors", UnsupportedModel)


def test_an_index_that_names_a_pickle_is_refused(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    reindex(folder, w="pytorch_model.bin")
    bad(folder, "not a safetensors file")


def test_what_is_missing_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    bad(tmp_path / "empty", "has no config.json.*Of GGUF files, name the file", ModelError)
    (folder / "model-00002-of-00003.safetensors").unlink()
    bad(folder, "model-00002-of-00003.safetensors, which .* names, is missing")
    (folder / INDEX).unlink()
    bad(folder, f"neither model.safetensors nor {INDEX}")


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00003.safetensors", INDEX])
def test_what_is_no_file_is_not_waited_for(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    bad(folder, f"{name} is not a file")
    with pytest.raises(ModelError, match="neither a file nor a folder"):
        open_checkpoint(folder / name)


def test_an_index_that_contradicts_the_shards_is_refused(folder: Path) -> None:
    good = (folder / INDEX).read_text()
    norm, shard = "model.norm.weight", "model-00001-of-00003.safetensors"
    other = next(p for p in json.loads(good)["weight_map"].values() if p != shard)
    for changes, says in (
        ({"extra": shard}, f"says that 'extra' is in {shard}, and it is not"),
        ({norm: None}, f"does not list '{norm}'"),
        ({norm: 7}, "has no weight_map"),
    ):
        (folder / INDEX).write_text(good)
        reindex(folder, **changes)
        bad(folder, says)
    (folder / INDEX).write_text(good)
    place = json.loads(good)["weight_map"][norm]
    reindex(folder, **{norm: other if other != place else shard})
    bad(folder, "and it is not")


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    data = safetensors({"model.norm.weight": ("F32", MATRIX)})
    (folder / "again.safetensors").write_bytes(data)
    reindex(folder, other="again.safetensors")
    bad(folder, "'model.norm.weight' occurs twice")


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b"\xff", b'{"a": 1, "a": 2}', b"[" * 100_000, b"9" * 5000]
)
def test_a_configuration_or_index_that_is_no_object_is_refused(folder: Path, text: bytes) -> None:
    for name in (INDEX, "config.json"):
        (folder / name).write_bytes(text)
        bad(folder, rf"{name} (is not|has the key)")


def test_an_index_of_too_many_files_is_refused(folder: Path) -> None:
    reindex(folder, **{f"t{n}": f"f{n}.safetensors" for n in range(1001)})
    bad(folder, "names 100[0-9] files")


# Headers


F32 = {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]}


@pytest.mark.parametrize(
    ("value", "data", "says"),
    [
        ({"w": F32}, 47, "would end at byte 48, the data ends at 47"),
        ({"w": F32}, 49, "its tensors end at 48, its data at 49"),
        ({}, 4, "its tensors end at 0, its data at 4"),
        ({"w": {**F32, "shape": [3, 5]}}, 48, "shape .3, 5. has 48 bytes"),
        ({"w": {**F32, "shape": [0, 4], "data_offsets": [0, 0]}}, 0, "has 0 bytes"),
        ({"w": {**F32, "shape": [-3, -4]}}, 48, "is described as"),
        ({"w": {**F32, "shape": [3.0, 4]}}, 48, "is described as"),
        ({"w": {**F32, "shape": [True, 12]}}, 48, "is described as"),
        ({"w": {**F32, "shape": [1 << 62, 1 << 62]}}, 48, "has 48 bytes"),
        ({"w": {**F32, "shape": [1] * 9 + [12]}}, 48, "is described as"),
        ({"w": {**F32, "data_offsets": [48, 0]}}, 48, "has -48 bytes"),
        ({"w": {**F32, "data_offsets": [0, 48, 96]}}, 48, "is described as"),
        ({"w": {**F32, "dtype": "F99"}}, 48, "the unknown type 'F99'"),
        ({"w": [1, 2]}, 48, "is described as"),
        ({"n" * 2000: F32}, 48, "a name of 2000 characters"),
        ({"w": F32, "v": F32}, 48, "begins at 0, the one before ends at 48"),
        ({"w": {**F32, "data_offsets": [8, 56]}}, 56, "begins at 8, the one before ends at 0"),
        (b'{"w": 1, "w": 2}', 0, "has the key 'w' twice"),
        (b"[" * 100_000, 0, "is not JSON"),
        (b"[]", 0, "is not a JSON object"),
        (b"\xff\xfe", 0, "is not JSON"),
    ],
)
def test_an_absurd_header_is_refused(tmp_path: Path, value: Any, data: int, says: str) -> None:
    folder = small(tmp_path / "m")
    header(folder, value, bytes(data))
    bad(folder, says)


@pytest.mark.parametrize("length", [3, 1 << 40, HEADER_BYTES_MAX + 1, (1 << 64) - 1])
def test_a_header_of_an_absurd_length_is_refused(tmp_path: Path, length: int) -> None:
    folder = small(tmp_path / "m")
    header(folder, {"w": F32}, bytes(48), length)
    bad(folder, "claims a header|is not JSON")


@pytest.mark.parametrize("kind", ["I8", "F8_E4M3", "I64", "F64", "BOOL"])
def test_another_type_is_unsupported_and_the_known_are_listed(tmp_path: Path, kind: str) -> None:
    folder = small(tmp_path / "m")
    header(folder, {"w": {**F32, "dtype": kind}}, bytes(48))
    bad(folder, f"type {kind}.*F32, F16, BF16", UnsupportedModel)


def test_a_file_cut_anywhere_is_incomplete(tmp_path: Path) -> None:
    folder = small(tmp_path / "m")
    data = (folder / "model.safetensors").read_bytes()
    for length in range(len(data)):
        (folder / "model.safetensors").write_bytes(data[:length])
        with pytest.raises(BadModelFile):
            HfFolder(folder)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8)
    | st.sampled_from(["F32", "dtype", "shape", "data_offsets"]),
    lambda x: st.lists(x, max_size=4)
    | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "a"]), x, max_size=4),
    max_leaves=12,
))  # fmt: skip
def test_no_header_at_all_makes_anything_but_a_model_error(tmp_path_factory, value: Any) -> None:
    folder = tmp_path_factory.mktemp("h")
    header(folder, {"w": value, "v": F32}, bytes(48))
    with pytest.raises(ModelError):
        SafetensorsFile(folder / "model.safetensors")


def test_flipped_bytes_give_a_model_error_or_another_model_but_nothing_else(tmp_path: Path) -> None:
    folder = small(tmp_path / "m", a=("F32", MATRIX), b=("BF16", encode(MATRIX, "BF16")))
    data, refused = (folder / "model.safetensors").read_bytes(), 0
    for seed in range(400):
        rng = random.Random(seed)
        damaged = bytearray(data)
        for _ in range(rng.choice([1, 1, 4, 16])):
            damaged[rng.randrange(len(data))] = rng.randrange(256)
        (folder / "model.safetensors").write_bytes(damaged)
        try:
            with HfFolder(folder) as found:
                for name in found.names():
                    found.read(name)
        except ModelError:
            refused += 1
    assert refused > 200
