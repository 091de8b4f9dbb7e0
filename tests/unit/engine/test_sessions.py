"""Sessions over weights that have to be copied: where the copies lie, and for how long."""

import errno
import os
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from coeld.compression.quantize import dequantize, quantize
from coeld.engine import sessions
from coeld.engine.graph import F32, Graph
from coeld.engine.sessions import make_session
from coeld.errors import DiskFull
from coeld.model.manifest import Form

FORM = Form(8, 32)
ROWS, COLUMNS = 128, 256


@pytest.fixture
def graph() -> tuple[Graph, np.ndarray]:
    """y = x @ W.T with W in two parts, which are joined by a copy; and W."""
    whole = np.random.default_rng(1).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    w, s = quantize(whole, FORM.bits, FORM.block)
    w = w.reshape(*s.shape, FORM.block)
    parts = [(w[: ROWS // 2], s[: ROWS // 2]), (w[ROWS // 2 :], s[ROWS // 2 :])]
    made = Graph()
    made.take("x", F32, ["n", COLUMNS])
    made.rows_matmul("x", "y", "W", parts, FORM)
    made.give("y", F32, ["n", ROWS])
    return made, dequantize(w.reshape(ROWS, -1), s, FORM.bits)


def computes(session: sessions.Session, weights: np.ndarray) -> bool:
    x = np.random.default_rng(2).standard_normal((3, COLUMNS)).astype(np.float32)
    found = session.ort.run(("y",), {"x": x})[0]
    return np.allclose(found, x @ weights.T, atol=0.02 * float(np.abs(found).max()))


def test_a_copy_that_is_repacked_is_let_go_and_scales_stay(graph, monkeypatch) -> None:
    sizes: dict[str, int] = {}

    def watched(model: bytes, options: ort.SessionOptions, **others):
        folder = Path(
            options.get_session_config_entry("session.model_external_initializers_file_folder_path")
        )
        mine = [path for path in folder.rglob("*") if f"-{os.getpid()}-" in str(path)]
        sizes.update({str(path): path.stat().st_size for path in mine if path.is_file()})
        return ort.InferenceSession(model, options, **others)

    monkeypatch.setattr(sessions, "ort", _With(ort, InferenceSession=watched))
    session = make_session(graph[0])
    maps = Path("/proc/self/maps").read_text()
    held = sum(size for path, size in sizes.items() if path in maps)
    scales = 4 * ROWS * COLUMNS // FORM.block
    assert sum(sizes.values()) >= ROWS * COLUMNS + scales
    assert held <= scales
    assert computes(session, graph[1])


class _With:
    """A module with some names replaced."""

    def __init__(self, module, **names) -> None:
        self._module = module
        self.__dict__.update(names)

    def __getattr__(self, name: str):
        return getattr(self._module, name)


def full(monkeypatch, *places: Path) -> None:
    """There is room for nothing large in these."""
    written = sessions._tensor

    def tensor(name: str, array: np.ndarray, path: Path):
        if array.nbytes > sessions.INLINE_BYTES_MAX and path.parent.parent in places:
            raise OSError(errno.ENOSPC, "No space left on device")
        return written(name, array, path)

    monkeypatch.setattr(sessions, "_tensor", tensor)


def test_what_does_not_fit_into_memory_lies_in_the_temporary_folder(
    graph, monkeypatch, tmp_path
) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    small.mkdir()
    large.mkdir()
    monkeypatch.setattr(sessions, "_places", lambda: [small, large])
    full(monkeypatch, small)
    assert computes(make_session(graph[0]), graph[1])
    assert not [*small.iterdir(), *large.iterdir()]


def test_where_there_is_room_nowhere_the_folders_are_named(graph, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(sessions, "_places", lambda: [tmp_path])
    full(monkeypatch, tmp_path)
    with pytest.raises(DiskFull, match=str(tmp_path)):
        make_session(graph[0])
    assert not list(tmp_path.iterdir())
