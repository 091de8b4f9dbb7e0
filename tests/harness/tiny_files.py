"""Writes a checkpoint that is in memory as a GGUF file, in one part or several, or any type."""

from pathlib import Path

import gguf
import numpy as np

from tests.fakes.memory_checkpoint import MemoryCheckpoint

Type = gguf.GGMLQuantizationType


def write_gguf(
    path: Path, checkpoint: MemoryCheckpoint, kind: Type = Type.F32, split_tensors: int = 0
) -> Path:
    """`kind`: of the matrices; `split_tensors`: at most so many a part. Returns the first file."""
    architecture = checkpoint.config["general.architecture"]
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split_tensors)
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
    return min(path.parent.glob(f"{path.stem}-00001-of-*")) if split_tensors else path
