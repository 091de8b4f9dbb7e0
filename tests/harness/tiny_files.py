"""Writes a checkpoint that is in memory as a GGUF file, in one part or several, or any type."""

from pathlib import Path

import gguf
import numpy as np

from tests.fakes.memory_checkpoint import MemoryCheckpoint

Type = gguf.GGMLQuantizationType


def write_gguf(path: Path, checkpoint: MemoryCheckpoint, kind: Type = Type.F32) -> Path:
    """`kind`: of the matrices. Returns `path`."""
    writer = gguf.GGUFWriter(path, checkpoint.config["general.architecture"])
    for key, value in checkpoint.config.items():
        if key != "general.architecture":
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for name, tensor in checkpoint.tensors.items():
        value = np.ascontiguousarray(tensor, np.float32)
        if value.ndim > 1 and kind is not Type.F32:
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
