"""The store: a directory of content-addressed blobs, and manifests that say what they make up.

    blobs/<sha256>       read-only files, named by their content
    models/<name>.json   a model exists if, and only if, its manifest is here; written last
    models/<name>@<hash>.json   an older version, until no device answers with it any more
    partial/             downloads, journals, files being written; may be deleted at any time
    lock                 held (flock) by whoever changes the store

Every file appears under its final name by one rename of a complete, flushed temporary file, and the
blobs' folder is flushed before a manifest is written, so a crash or a power cut leaves at most
rubbish in `partial/`, which the next change of the store clears away. Reading needs no lock. The
agent uses this module too, so numpy is imported only by the one function that needs it.
"""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO

from coeld.errors import BadChecksum, BadModelFile, DiskFull, ModelError, UnknownModel
from coeld.ids import ModelHash
from coeld.model.manifest import BlobRef, Manifest, parse_manifest

if TYPE_CHECKING:
    import numpy as np

NAME_PATTERN: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
MANIFEST_BYTES_MAX: Final = 64 << 20
READ_AHEAD_BYTES: Final = 32 << 20
"""Asked for ahead of what is being hashed: some 30 ms of a fast disk."""


def default_store() -> Path:
    """$COELD_STORE; or the service's state directory; or the user's data directory."""
    if chosen := os.environ.get("COELD_STORE"):
        return Path(chosen)
    if state := os.environ.get("STATE_DIRECTORY"):  # set by systemd; may list several
        return Path(state.split(":")[0]) / "store"
    return Path.home() / ".local/share/coeld/store"


def check_name(name: str) -> str:
    """`name`, if it can name a model. Raises ModelError."""
    if not NAME_PATTERN.fullmatch(name):
        raise ModelError(
            f"{name!r} cannot be the name of a model. Use 1 to 64 of a-z, 0-9, '.', '_' and '-', "
            "beginning with a letter or digit."
        )
    return name


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns "no space left", "quota exceeded" and "file too large" into DiskFull."""
    try:
        yield
    except OSError as exc:
        if exc.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise DiskFull(
            f"the disk is full: {exc.strerror} at {path} ({free_bytes(path)} bytes are free). "
            "Nothing was installed. Make room and run the same command again; it continues."
        ) from exc


def free_bytes(path: Path) -> int:
    """Bytes an ordinary user can still write on the file system that `path` is, or will be, on."""
    while not path.exists():
        path = path.parent
    stat = os.statvfs(path)
    return stat.f_bavail * stat.f_frsize


class Store:
    """The models of one device. Making the object touches nothing on disk."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._blobs = root / "blobs"
        self._models = root / "models"
        self.partial = root / "partial"
        self._locked = False

    # Reading

    def names(self) -> list[str]:
        """Names of all installed models, sorted; their manifests may still be damaged."""
        found = [path.stem for path in self._models.glob("*.json")]
        return sorted(name for name in found if NAME_PATTERN.fullmatch(name))

    def manifest(self, name: str) -> Manifest:
        """The newest version. Raises UnknownModel, or BadModelFile when the manifest is damaged."""
        return self._read(self._models / f"{check_name(name)}.json", name)

    def versions(self, name: str) -> list[Manifest]:
        """All versions that are here, the newest last. Raises as `manifest` does."""
        older = []
        for path in self._models.glob(f"{check_name(name)}@*.json"):
            with suppress(BadModelFile, UnknownModel):  # or removed a moment ago
                older.append(self._read(path, name))
        return [*sorted(older, key=lambda manifest: manifest.release), self.manifest(name)]

    def version(self, name: str, model: ModelHash) -> Manifest:
        """The version with that hash. Raises as `manifest` does."""
        for manifest in reversed(self.versions(name)):
            if manifest.hash == model:
                return manifest
        raise UnknownModel(f"version {model} of {name!r} is not in {self.root} any more.")

    def _read(self, path: Path, name: str) -> Manifest:
        try:
            with path.open("rb") as file:
                data = file.read(MANIFEST_BYTES_MAX + 1)
        except FileNotFoundError:
            raise self._unknown(name) from None
        try:
            if len(data) > MANIFEST_BYTES_MAX:
                raise ValueError("it is too long")
            manifest = parse_manifest(data.decode())
            if manifest.name != name:
                raise ValueError(f"it is the manifest of {manifest.name!r}")
        except (ValueError, RecursionError, BadModelFile) as exc:
            raise BadModelFile(
                f"{path} is damaged: {exc}. Remove the model and add it again: "
                f"coeld model rm {name}"
            ) from exc
        return manifest

    def changed(self, name: str) -> tuple[int, ...]:
        """Something that is another after a version was added or removed; () without a model."""
        try:
            stat = (self._models / f"{check_name(name)}.json").stat()
            return stat.st_ino, stat.st_mtime_ns, self._models.stat().st_mtime_ns
        except FileNotFoundError:
            return ()

    def _unknown(self, name: str) -> UnknownModel:
        return UnknownModel(
            f"no model {name!r} is installed in {self.root} (installed: "
            f"{', '.join(self.names()) or 'none'}). `coeld model list` shows what can be added."
        )

    def models(self) -> list[Manifest]:
        """All installed models, sorted by name, older versions too. Raises BadModelFile when one is
        damaged."""
        return [manifest for name in self.names() for manifest in self.versions(name)]

    def blob_path(self, ref: BlobRef) -> Path:
        return self._blobs / ref.sha256

    def has(self, ref: BlobRef) -> bool:
        """Whether the blob is here with the right size; `verify` looks at the bytes."""
        try:
            return self.blob_path(ref).stat().st_size == ref.bytes
        except FileNotFoundError:
            return False

    def verify(self, refs: Iterable[BlobRef]) -> None:
        """Raises BadChecksum when one of these blobs is `damaged`."""
        if found := self.damaged(refs):
            raise BadChecksum(self.complaint(found))

    def complaint(self, refs: Sequence[BlobRef]) -> str:
        """What to tell people about damaged blobs."""
        more = f" and {len(refs) - 1} more" if len(refs) > 1 else ""
        return (
            f"blob {self.blob_path(refs[0])}{more} is missing or damaged. It is fetched from "
            "another device that has it. If there is none, remove the model it belongs to and add "
            "it again: coeld model rm, coeld model add."
        )

    def damaged(self, refs: Iterable[BlobRef]) -> list[BlobRef]:
        """Read blobs and compare their sha256: those that are missing or altered. The latter are
        removed, so that they are fetched or imported again.

        Memory cards rot, and nothing that is not what was imported may compute an answer. The
        disk is asked for the next blobs while one is hashed.
        """
        refs, found = list(refs), []
        asked, ahead_bytes = 0, 0
        for ref in refs:
            while asked < len(refs) and ahead_bytes < READ_AHEAD_BYTES:
                _ask_for(self.blob_path(refs[asked]))
                ahead_bytes += refs[asked].bytes
                asked += 1
            ahead_bytes -= ref.bytes
            if not self._is_sound(ref):
                found.append(ref)
                self._remove_damaged(ref)
        return found

    def _is_sound(self, ref: BlobRef) -> bool:
        try:
            return self.has(ref) and file_sha256(self.blob_path(ref)) == ref.sha256
        except OSError as exc:
            if exc.errno not in (errno.ENOENT, errno.EIO):
                raise
            return False

    def _remove_damaged(self, ref: BlobRef) -> None:
        """Unless somebody is changing the store, or this process may not."""
        with suppress(ModelError, OSError), self.lock():
            if not self._is_sound(ref):  # or it has come again meanwhile
                self.blob_path(ref).unlink(missing_ok=True)

    def tensors(self, ref: BlobRef) -> "dict[str, np.ndarray]":
        """Read-only views of a blob's weights, in place in the page cache. Raises BadChecksum."""
        import numpy as np

        if not self.has(ref):
            raise BadChecksum(
                f"blob {self.blob_path(ref)} is missing or has the wrong size. "
                "Remove the model and add it again: coeld model rm, coeld model add."
            )
        data = np.memmap(self.blob_path(ref), np.uint8, "r")
        kinds: dict[str, np.dtype[Any]] = {"uint8": np.dtype("u1"), "float32": np.dtype("<f4")}
        return {
            name: np.asarray(data[tensor.offset : tensor.offset + tensor.bytes])
            .view(kinds[tensor.dtype])
            .reshape(tensor.shape)
            for name, tensor in ref.tensors.items()
        }

    # Changing

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held while the store changes; clears what earlier, killed changes left half-written.

        May be nested. Raises ModelError when another process holds it, or when this one may not
        write here; DiskFull.
        """
        if self._locked:
            yield
            return
        with self._lock_file() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ModelError(
                    f"another coeld process is adding or removing a model in {self.root}. "
                    "Wait for it to finish, then run the command again."
                ) from None
            for path in self.partial.glob("*.tmp"):
                _discard(path)
            self._locked = True
            try:
                yield
            finally:
                self._locked = False

    def _lock_file(self) -> TextIO:
        try:
            with disk_errors(self.root):
                for directory in (self._blobs, self._models, self.partial):
                    directory.mkdir(parents=True, exist_ok=True)
                return (self.root / "lock").open("a")
        except OSError as exc:
            raise ModelError(
                f"cannot write to the store {self.root}: {exc.strerror}. Run the command as the "
                "user who owns it (sudo, for the service's), or choose another with --store."
            ) from exc

    def require_free(self, wanted_bytes: int) -> None:
        """Raises DiskFull unless that much can be written."""
        free = free_bytes(self.root)
        if free < wanted_bytes:
            raise DiskFull(
                f"not enough room in {self.root}: {wanted_bytes} bytes are needed, {free} are "
                f"free. Free {wanted_bytes - free} bytes, or choose another place with --store."
            )

    def put(self, *pieces: bytes | memoryview) -> str:
        """Store a blob, given in pieces; returns its sha256. One that is here is read, and written
        again when it is damaged. Raises DiskFull."""
        digest = hashlib.sha256()
        for piece in pieces:
            digest.update(piece)
        path = self._blobs / digest.hexdigest()
        if not self._is_sound(BlobRef(path.name, sum(map(len, pieces)), {})):
            self._write(path, pieces, 0o444)
        return path.name

    def save(self, manifest: Manifest, needed: Iterable[BlobRef] | None = None) -> None:
        """Make the model exist. Its blobs must be here, or at least those `needed` (the others are
        then fetched from other devices when they are wanted). What it replaces stays, as an older
        version. Raises DiskFull; BadModelFile when what it replaces is damaged.
        """
        refs = manifest.blobs() if needed is None else needed
        missing = [ref.sha256 for ref in refs if not self.has(ref)]
        assert not missing, f"blobs {missing} were not stored"
        path = self._models / f"{check_name(manifest.name)}.json"
        _flush_directory(self._blobs)
        if path.exists() and (before := self.manifest(manifest.name)).hash != manifest.hash:
            assert before.release < manifest.release, "an older version would replace a newer one"
            kept = self._models / f"{manifest.name}@{before.hash}.json"
            self._write(kept, [before.to_json().encode()], 0o644)
        self._write(path, [manifest.to_json().encode()], 0o644)
        _flush_directory(self._models)

    def remove(self, name: str) -> None:
        """Remove a model, and the blobs that no other model uses. Raises UnknownModel.

        Also forgets interrupted imports, since their blobs belong to no model.
        """
        path = self._models / f"{check_name(name)}.json"
        if not path.exists():
            raise self._unknown(name)
        with self.lock():
            for older in self._models.glob(f"{name}@*.json"):
                older.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            _flush_directory(self._models)
            self._collect(name)
            for left in self.partial.iterdir():
                _discard(left)

    def has_older(self, name: str) -> bool:
        """Is there any but the newest version?"""
        return any(self._models.glob(f"{name}@*.json"))

    def retire(self, name: str) -> None:
        """Remove all versions but the newest, with what only they need. Raises ModelError."""
        with self.lock():
            *older, _newest = self.versions(name)
            for manifest in older:
                (self._models / f"{name}@{manifest.hash}.json").unlink(missing_ok=True)
            _flush_directory(self._models)
            used = {ref.sha256 for manifest in self.models() for ref in manifest.blobs()}
            for ref in (ref for manifest in older for ref in manifest.blobs()):
                if ref.sha256 not in used:
                    (self._blobs / ref.sha256).unlink(missing_ok=True)

    def used_bytes(self) -> int:
        """What blobs and unfinished files take."""
        return sum(_size(path) for place in (self._blobs, self.partial) for path in _files(place))

    def delete(self, names: Iterable[str]) -> None:
        """Remove blobs, given by their sha256; their models stay, with parts to be fetched again.

        Who has a blob open or mapped keeps it until then. Raises ModelError when another process
        is changing the store.
        """
        with self.lock():
            for name in names:
                (self._blobs / name).unlink(missing_ok=True)

    def _collect(self, removed: str) -> None:
        try:
            used = {ref.sha256 for manifest in self.models() for ref in manifest.blobs()}
        except BadModelFile as exc:
            raise ModelError(
                f"{removed} is removed, but its files are kept because another model may use "
                f"them: {exc}"
            ) from exc
        for path in self._blobs.iterdir():
            if path.name not in used:
                path.unlink()

    def _write(self, path: Path, pieces: Iterable[bytes | memoryview], mode: int) -> None:
        with disk_errors(self.partial):
            handle, temporary = tempfile.mkstemp(suffix=".tmp", dir=self.partial)
            try:
                with os.fdopen(handle, "wb") as file:
                    for piece in pieces:
                        file.write(piece)
                    file.flush()
                    os.fchmod(file.fileno(), mode)
                    os.fsync(file.fileno())
                Path(temporary).replace(path)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise


def _ask_for(path: Path) -> None:
    """Have the kernel begin to read a file."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return  # who reads it will say so
    try:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(handle)


def _files(place: Path) -> list[Path]:
    try:
        return list(place.iterdir())
    except FileNotFoundError:
        return []


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # it has got its final name meanwhile
        return 0


def _discard(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _flush_directory(path: Path) -> None:
    """So that a rename or removal survives a power cut."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
