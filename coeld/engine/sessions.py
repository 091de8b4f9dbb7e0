"""ONNX Runtime: one thread pool per process, sessions over weights of the store.

Mapped weights are handed over where they lie, what only repacking kernels read without even the
copy that ONNX Runtime makes of other tensors first. What has to be joined by a copy reaches it
as external data in files in memory (tmpfs), a file for each tensor: it maps them, and lets go of
those that it repacks. Their names are removed as soon as the session exists, so what is repacked
is not in memory twice, and what is not, scales above all, stays as long as the session.
"""

import ctypes
import errno
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from coeld.engine.graph import Graph
from coeld.engine.weights import Mapped, Stored, Weight, giving_back
from coeld.errors import DiskFull

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

FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNREAD: Final = "mapped"
"""An empty file that stands for tensors handed over in memory."""

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
    for path in (found for place in _places() for found in place.glob("coeld-weights-*")):
        pid = path.name.split("-")[2]
        stale = not Path(f"/proc/{pid}").exists()
        if stale or (own and pid == str(os.getpid())):
            with suppress(OSError):  # another user's, or just removed
                gone = path.rename(f"{path}.gone")  # nothing more can be put into it
                shutil.rmtree(gone)


def make_session(graph: Graph) -> Session:
    """Compile a graph. Raises OSError when its weights cannot be mapped; DiskFull."""
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
    with _files(copied) as (folder, initialisers):
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(folder)
        )
        values = {name: ort.OrtValue.ortvalue_from_numpy(w.array) for name, w in mapped.items()}
        for name, whole in mapped.items():
            initialisers.append(_external(name, whole.array, UNREAD))
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
def _files(weights: Mapping[str, Weight]) -> Iterator[tuple[Path, list[TensorProto]]]:
    """A folder with a file for each large weight, while the body runs; small ones are inline.

    Raises DiskFull when there is room for them nowhere.
    """
    folder, tensors = _written(weights)
    try:
        yield folder, tensors
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _written(weights: Mapping[str, Weight]) -> tuple[Path, list[TensorProto]]:
    places = _places()
    for place in places:
        try:
            return _written_to(place, weights)
        except OSError as exc:
            if exc.errno not in FULL:
                raise
    raise DiskFull(
        "weights cannot be put together, for there is not enough room in "
        f"{' nor in '.join(map(str, places)) or 'any folder'}. Make one of them larger (/dev/shm "
        "of a container: --shm-size=512m, say), or name a folder with more room in TMPDIR."
    )


def _written_to(place: Path, weights: Mapping[str, Weight]) -> tuple[Path, list[TensorProto]]:
    folder = Path(tempfile.mkdtemp(prefix=f"coeld-weights-{os.getpid()}-", dir=place))
    try:
        (folder / UNREAD).touch()
        parts = enumerate(weights.items())
        return folder, [_tensor(name, w.copy(), folder / str(i)) for i, (name, w) in parts]
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _tensor(name: str, array: NDArray[Any], path: Path) -> TensorProto:
    if array.nbytes <= INLINE_BYTES_MAX:
        return numpy_helper.from_array(array, name)
    with path.open("xb") as file:
        file.write(array.data)
    return _external(name, array, path.name)


def _external(name: str, array: NDArray[Any], file: str) -> TensorProto:
    tensor = TensorProto(
        name=name,
        data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
        dims=array.shape,
        data_location=TensorProto.EXTERNAL,
    )
    for key, value in (("location", file), ("offset", 0), ("length", array.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def _places() -> list[Path]:
    """Where files may be put, in memory first: Docker gives /dev/shm no more than 64 MB."""
    shm = Path("/dev/shm")
    places = [shm] if os.access(shm, os.W_OK) else []
    with suppress(FileNotFoundError):  # there is none that can be written to
        places.append(Path(tempfile.gettempdir()))
    return places
