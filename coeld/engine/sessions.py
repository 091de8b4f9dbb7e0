"""ONNX Runtime: one thread pool per process, sessions over weights of the store.

Mapped weights are handed over where they lie, what only repacking kernels read without even the
copy that ONNX Runtime makes of other tensors first. What has to be joined by a copy reaches it
as external data in a file in memory (tmpfs), which it maps, repacks and lets go; the file's name
is removed as soon as the session exists.
"""

import ctypes
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from coeld.engine.graph import Graph
from coeld.engine.weights import Mapped, Stored, Weight, giving_back

INLINE_BYTES_MAX: Final = 1024
"""Smaller initialisers travel inside the graph: external data must be worth a mapping."""

ARENA: Final = {
    "max_mem": 0,  # no limit of its own
    "arena_extend_strategy": 1,  # as much as is asked for, not the next power of two
    "initial_chunk_size_bytes": -1,  # default
    "max_dead_bytes_per_chunk": -1,  # default
}
MMAP_THRESHOLD_BYTES: Final = 1 << 20
"""Blocks from this size on get a mapping of their own, which goes back to the system when freed.

Left to itself glibc raises it up to 32 MB, and repacking then leaves holes behind: 160 MB after
a load of moe1b."""

M_MMAP_THRESHOLD: Final = -3
REST_S: Final = 0.05
"""Between two sessions that are freed while answers stream: more than a token takes."""
REPACKING: Final = ("MatMulNBits", "QMoE")
"""Kernels that read a weight once, to repack it. No optimiser of graphs looks at their weights."""

PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
OPSETS: Final = (helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1))
IR_VERSION: Final = 10


class Session:
    """A compiled graph, and the mapped weights that its kernels may still read."""

    def __init__(self, ort_session: ort.InferenceSession, weights: Sequence[object]) -> None:
        self.ort = ort_session
        self._weights = weights


def use_threads(count: int) -> None:
    """Give all sessions one pool of `count` threads and one arena. Once, before the first session.

    With an arena each, 46 sessions keep 46 times the activations of the longest prompt: 760 MB
    instead of 320 for SmolLM2 after prompts of 600 tokens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc only
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)
    ort.set_default_logger_severity(3)
    ort.set_global_thread_pool_sizes(count, 1)
    memory = ort.OrtMemoryInfo(
        "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
    )
    ort.create_and_register_allocator(memory, ort.OrtArenaCfg(ARENA))


def sweep_files(*, own: bool = False) -> None:
    """Remove what engines that were killed while loading left behind; with `own`, as the last
    thing that this one does, also what its own loader is just making."""
    for path in _memory_dir().glob("coeld-weights-*"):
        pid = path.name.split("-")[2]
        stale = not Path(f"/proc/{pid}").exists()
        if stale or (own and pid == str(os.getpid())):
            path.unlink(missing_ok=True)


def make_session(graph: Graph) -> Session:
    """Compile a graph. Raises OSError when its weights cannot be mapped."""
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    options.log_severity_level = 3
    options.add_session_config_entry("session.use_env_allocators", "1")
    mapped: dict[str, Mapped] = {}
    copied: dict[str, Weight] = {}
    for name, weight in graph.weights.items():
        whole = weight.mapped if isinstance(weight, Stored) else None
        if whole is not None and whole.bytes > INLINE_BYTES_MAX:
            mapped[name] = whole
        else:
            copied[name] = weight
    with _packed(copied) as (file, initialisers):
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(file.parent)
        )
        values = {name: ort.OrtValue.ortvalue_from_numpy(w.array) for name, w in mapped.items()}
        for name, whole in mapped.items():  # the file has to exist; it is not looked into
            initialisers.append(_external(name, whole.array, file.name, 0))
        repacked = values.keys() & _repacked(graph)
        for name in repacked:
            options.add_initializer(name, values[name])
        others = values.keys() - repacked
        options.add_external_initializers(list(others), [values[name] for name in others])
        proto = helper.make_graph(graph.nodes, "coeld", graph.inputs, graph.outputs, initialisers)
        model = helper.make_model(proto, opset_imports=OPSETS, ir_version=IR_VERSION)
        with giving_back(list(mapped.values())):
            session = ort.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
    return Session(session, [mapped, values])


def _repacked(graph: Graph) -> set[str]:
    """Weights that only repacking kernels read."""
    readers: dict[str, set[str]] = {}
    for node in graph.nodes:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    return {name for name in graph.weights if readers.get(name, set()).issubset(REPACKING)}


def let_go(held: list[Any], gently: Callable[[], bool]) -> None:
    """Empty a list of sessions, or of what holds them, one after the other.

    Freeing a session holds Python's lock for as long as the kernel takes for its pages: 17 ms for
    four layers of moe1b. Where somebody answers meanwhile, a pause follows each.
    """
    while held:
        held.pop()
        if gently():
            time.sleep(REST_S)


def give_memory_back() -> None:
    """Return freed heap to the system: loading leaves arenas full of holes behind (glibc only)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def _packed(weights: Mapping[str, Weight]) -> Iterator[tuple[Path, list[TensorProto]]]:
    """Write the large weights one after the other into a file in memory, aligned to 64 bytes."""
    folder = _memory_dir()
    handle, name = tempfile.mkstemp(prefix=f"coeld-weights-{os.getpid()}-", dir=folder)
    path = Path(name)
    try:
        tensors = []
        with open(handle, "wb") as file:  # noqa: PTH123 - a descriptor, not a path
            for tensor, weight in weights.items():
                array = weight.copy()
                if array.nbytes <= INLINE_BYTES_MAX:
                    tensors.append(numpy_helper.from_array(array, tensor))
                    continue
                file.write(bytes(-file.tell() % 64))
                tensors.append(_external(tensor, array, path.name, file.tell()))
                file.write(array.data)
        yield path, tensors
    finally:
        path.unlink(missing_ok=True)


def _external(name: str, array: NDArray[Any], file: str, offset: int) -> TensorProto:
    tensor = TensorProto(
        name=name,
        data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
        dims=array.shape,
        data_location=TensorProto.EXTERNAL,
    )
    for key, value in (("location", file), ("offset", offset), ("length", array.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def _memory_dir() -> Path:
    shm = Path("/dev/shm")
    return shm if os.access(shm, os.W_OK) else Path(tempfile.gettempdir())
