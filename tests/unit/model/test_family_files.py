"""Real GGUF files of every family: imported like the same checkpoint in memory, NaN refused."""

import random
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from coeld.errors import BadModelFile
from coeld.model.gguf_file import GgufFile
from coeld.model.importer import import_checkpoint
from coeld.model.store import Store
from tests.fakes.memory_checkpoint import ARCHITECTURES, MemoryCheckpoint, gguf_spelling
from tests.harness.importing import import_file, quiet

NAMES = sorted(ARCHITECTURES)


def write(path: Path, checkpoint: MemoryCheckpoint) -> Path:
    writer = gguf.GGUFWriter(path, checkpoint.config["general.architecture"])
    for key, value in checkpoint.config.items():
        if key != "general.architecture":
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for name, tensor in checkpoint.tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(tensor, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", NAMES)
def test_a_file_gives_the_model_that_memory_gives(name: str, tmp_path: Path) -> None:
    checkpoint = gguf_spelling(name)
    path = write(tmp_path / "m.gguf", checkpoint)
    with GgufFile(path) as file:
        checkpoint.config = dict(file.config)  # its numbers are float32
    from_file = import_file(Store(tmp_path / "a"), path, "m")
    assert from_file.hash == import_checkpoint(Store(tmp_path / "b"), checkpoint, "m", quiet).hash
    assert from_file.tokenizer is None


@pytest.mark.parametrize("name", NAMES)
def test_one_number_that_is_none_is_found_wherever_it_is(name: str, tmp_path: Path) -> None:
    rng = random.Random(name)
    checkpoint = gguf_spelling(name)
    checkpoint.tensors.pop("rope_freqs.weight", None)
    path = write(tmp_path / "m.gguf", checkpoint)
    with GgufFile(path) as file:
        victim = file.tensors[rng.choice(sorted(file.tensors))]
    data = bytearray(path.read_bytes())
    at = victim.offset + 4 * rng.randrange(victim.bytes // 4)
    data[at : at + 4] = struct.pack("<f", rng.choice([float("nan"), float("inf")]))
    path.write_bytes(data)
    store = Store(tmp_path / "s")
    with pytest.raises(BadModelFile, match=victim.name):
        import_file(store, path, "m")
    assert store.names() == []
