"""Weights between peers: every device serves the blobs it has, and fetches those it needs.

HTTP/1.1, because range requests, libraries and curl exist for it: `GET /blobs/<sha256>` with an
optional `Range: bytes=N-`, `GET /manifests/<model hash>`. On connections of its own, so that a long
transfer never stands before rows of tokens; sent in small pieces at a limited rate, so that it does
not fill the queues of the link either.

A fetch asks all holders at once, one blob at a time from each. What has arrived lies in the
store's `partial/<sha256>.part` and is continued by whoever comes next: after a lost connection,
from another holder, or by the next run. A blob gets its name in the store only after its sha256 was
checked; a holder whose bytes were wrong is not asked for that blob again. Refused: anything but the
names of blobs, answers longer than the manifest says, and holders that send nothing for IDLE_S.
"""

import asyncio
import contextlib
import fcntl
import logging
import os
import re
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import h11
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from coeld.errors import BadModelFile, DiskFull, FetchFailed, StartError, UnknownModel
from coeld.ids import ModelHash
from coeld.model.manifest import BlobRef, Manifest, parse_manifest
from coeld.model.store import MANIFEST_BYTES_MAX, Store, disk_errors, file_sha256

PIECE_BYTES: Final = 64 << 10
"""Sent at once: 0.5 ms of a gigabit, 2 ms of fast Wi-Fi."""
BACKLOG: Final = 64
CONNECT_S: Final = 3.0
IDLE_S: Final = 10.0
"""Without a byte; then the next holder continues."""
BYTES_PER_S_MIN: Final = 4096
"""Of a holder, over IDLE_S or so: who sends less holds a blob up that others could send."""
ATTEMPTS_MAX: Final = 5
"""Failed attempts in a row after which a holder is given up, with a growing pause between them."""
PAUSE_S: Final = 0.1
NAME: Final = re.compile(r"[0-9a-f]{64}")
RANGE: Final = re.compile(r"bytes=(\d{1,15})-")

log = logging.getLogger(__name__)


class Rate:
    """At most so many bytes per second, shared by everybody who takes from it. 0 = no limit."""

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self._free_s = 0.0

    async def take(self, count: int) -> None:
        """Returns when `count` more bytes may pass."""
        if self.bytes_per_s:
            now_s = asyncio.get_running_loop().time()
            start_s = max(now_s, self._free_s)
            self._free_s = start_s + count / self.bytes_per_s
            if start_s > now_s:
                await asyncio.sleep(start_s - now_s)


def listening(host: str, port: int) -> socket.socket:
    """A socket for a BlobServer. Raises StartError when the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as exc:
        raise StartError(
            f"blobs cannot be served on {host}:{port}: {exc.strerror or exc}. Check network.host, "
            "and choose another network.blob_port, or 0 for any."
        ) from exc


class BlobServer:
    """The blobs and manifests of a store, as an application for coeld.api.serve."""

    def __init__(self, store: Store, rate: Rate) -> None:
        self._store, self._rate = store, rate
        self.sent_bytes = 0
        self.app = Starlette(
            routes=[
                Route("/blobs/{name}", self._blob, methods=["GET"]),
                Route("/manifests/{name}", self._manifest, methods=["GET"]),
            ]
        )

    async def _manifest(self, request: Request) -> Response:
        wanted = ModelHash(request.path_params["name"])
        for name in self._store.names():
            with contextlib.suppress(BadModelFile, UnknownModel):
                manifest = self._store.version(name, wanted)
                return Response(manifest.to_json(), media_type="application/json")
        return PlainTextResponse("no such model here", 404)

    async def _blob(self, request: Request) -> Response:
        name = request.path_params["name"]
        if not NAME.fullmatch(name):
            return PlainTextResponse("not the name of a blob", 404)
        path = self._store.blob_path(BlobRef(name, 0, {}))
        try:
            size = path.stat().st_size
        except OSError:
            return PlainTextResponse("no such blob here", 404)
        asked = RANGE.fullmatch(request.headers.get("range", ""))
        start = int(asked[1]) if asked else 0
        if start > size:
            return PlainTextResponse("beyond the end of the blob", 416)
        headers = {"Content-Length": str(size - start)}
        if asked:
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        return StreamingResponse(
            self._pieces(path, start), 206 if asked else 200, headers, "application/octet-stream"
        )

    async def _pieces(self, path: Path, start: int) -> AsyncIterator[bytes]:
        """The rest of a blob. Reading may wait for a slow disk: in a thread."""
        with path.open("rb") as file:
            file.seek(start)
            while piece := await asyncio.to_thread(file.read, PIECE_BYTES):
                await self._rate.take(len(piece))
                self.sent_bytes += len(piece)
                yield piece


@dataclass(frozen=True, slots=True)
class Holder:
    """A device that may have blobs."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


class _Unusable(Exception):
    """This holder does not have it, or sends nonsense: ask another."""


class _Connection:
    """One HTTP connection to a holder, for one request after the other."""

    def __init__(self, holder: Holder) -> None:
        self.holder = holder
        self._http = h11.Connection(h11.CLIENT)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._patience_s = IDLE_S
        """For how long it may keep us waiting: waiting takes of it, and each byte gives."""

    async def get(self, target: str, start: int, size_max: int) -> AsyncIterator[bytes]:
        """The body from byte `start`, at most `size_max` bytes of it.

        Raises OSError (TimeoutError among them) when the connection fails, _Unusable otherwise.
        """
        try:
            reader, writer = await self._ready()
            headers = [("Host", str(self.holder))]
            if start:
                headers.append(("Range", f"bytes={start}-"))
            request = h11.Request(method="GET", target=target, headers=headers)
            writer.write(self._http.send(request) or b"")
            writer.write(self._http.send(h11.EndOfMessage()) or b"")
            response = await self._event(reader)
            if not isinstance(response, h11.Response):
                raise ConnectionError("the holder closed the connection")
            if response.status_code != (206 if start else 200):
                raise _Unusable(f"{self.holder} answers {response.status_code} for {target}")
            got = 0
            while isinstance(event := await self._event(reader), h11.Data):
                got += len(event.data)
                if got > size_max:
                    raise _Unusable(f"{self.holder} sends more than {size_max} bytes")
                yield bytes(event.data)
            if not isinstance(event, h11.EndOfMessage):
                raise ConnectionError("the holder closed the connection")
            self._http.start_next_cycle()
        except h11.ProtocolError as exc:
            raise _Unusable(f"{self.holder} does not speak HTTP: {exc}") from exc

    async def _ready(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._streams is None or self._streams[0].at_eof():  # it was idle for too long
            self.close()
            try:
                async with asyncio.timeout(CONNECT_S):
                    self._streams = await asyncio.open_connection(
                        self.holder.host, self.holder.port, limit=4 * PIECE_BYTES
                    )
            except ValueError as exc:  # a label of the name is empty or endless
                raise OSError(f"{self.holder}: not a host name: {exc}") from exc
            self._http, self._patience_s = h11.Connection(h11.CLIENT), IDLE_S
        return self._streams

    async def _event(self, reader: asyncio.StreamReader) -> object:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            began_s = time.monotonic()
            async with asyncio.timeout(self._patience_s):
                data = await reader.read(PIECE_BYTES)
            if not data:
                raise ConnectionError("the holder closed the connection")
            gained_s = len(data) / BYTES_PER_S_MIN - (time.monotonic() - began_s)
            self._patience_s = min(IDLE_S, self._patience_s + gained_s)
            self._http.receive_data(data)
        return event

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


@dataclass(slots=True)
class _Work:
    """What a fetch still has to do, shared by its workers."""

    waiting: list[BlobRef]
    busy: int = 0
    refused: dict[str, set[Holder]] = field(default_factory=dict)
    """By blob: who does not have it."""
    reasons: dict[str, str] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def next_for(self, holder: Holder) -> BlobRef | None:
        for ref in self.waiting:
            if holder not in self.refused.get(ref.sha256, ()):
                self.waiting.remove(ref)
                self.busy += 1
                return ref
        return None

    def done(self, ref: BlobRef | None = None, back: bool = False) -> None:
        self.busy -= 1
        if back and ref:
            self.waiting.append(ref)
        self.changed.set()
        self.changed = asyncio.Event()


async def fetch_manifest(model: str, holders: Sequence[Holder]) -> Manifest:
    """The manifest with that hash from the first holder that has it. Raises FetchFailed."""
    reasons = []
    for holder in holders:
        connection, data = _Connection(holder), bytearray()
        try:
            async for piece in connection.get(f"/manifests/{model}", 0, MANIFEST_BYTES_MAX):
                data += piece
            manifest = parse_manifest(data.decode())
            if manifest.hash == model:
                return manifest
            reasons.append(f"{holder} sent another model")
        except (OSError, _Unusable, BadModelFile, UnicodeDecodeError, RecursionError) as exc:
            reasons.append(f"{holder}: {exc or type(exc).__name__}")
        finally:
            connection.close()
    raise FetchFailed(f"no device sent the manifest of model {model}: {'; '.join(reasons)}")


async def fetch(
    store: Store,
    refs: Iterable[BlobRef],
    holders: Sequence[Holder],
    rate: Rate,
    progress: Callable[[int], None] = lambda _bytes: None,
) -> None:
    """Bring blobs into the store, from all holders at once; those that are here are skipped.

    `progress` is called with bytes as they arrive. Raises FetchFailed when some blob cannot be had
    from anybody (what has arrived is kept, and continued by the next call); DiskFull.
    """
    wanted = {ref.sha256: ref for ref in refs if not store.has(ref)}
    if bad := [name for name in wanted if not NAME.fullmatch(name)]:
        raise FetchFailed(f"{bad[0]!r} is not the name of a blob: the manifest is damaged")
    work = _Work(list(wanted.values()))
    with store.lock():  # makes the directories
        pass
    try:
        async with asyncio.TaskGroup() as group:
            for holder in dict.fromkeys(holders):
                task = _ask(holder, work, store, rate, progress)
                group.create_task(task, name=f"fetch from {holder}")
    except* DiskFull as full:
        raise full.exceptions[0] from None
    if missing := [ref for ref in wanted.values() if not store.has(ref)]:
        reasons = "; ".join(work.reasons.values()) or "no device is known that has them"
        raise FetchFailed(
            f"{len(missing)} of {len(wanted)} blobs could not be fetched ({reasons}). What has "
            "arrived is kept; it is tried again when a device that has them is there. If there is "
            "none any more, remove the model and add it again: coeld model rm, coeld model add."
        )


async def _ask(
    holder: Holder, work: _Work, store: Store, rate: Rate, progress: Callable[[int], None]
) -> None:
    """One holder's worker: until nothing is left that it could send."""
    connection, failures = _Connection(holder), 0
    try:
        while failures < ATTEMPTS_MAX:
            ref = work.next_for(holder)
            if ref is None:
                if not work.busy:
                    return
                await work.changed.wait()  # another worker may give a blob back
                continue
            back = True
            try:
                await _fetch_one(connection, ref, store, rate, progress)
                back, failures = False, 0
            except OSError as exc:
                connection.close()
                failures += 1
                work.reasons[str(holder)] = f"{holder}: {exc or type(exc).__name__}"
            except _Unusable as exc:
                connection.close()
                work.refused.setdefault(ref.sha256, set()).add(holder)
                work.reasons[str(holder)] = str(exc)
            finally:
                work.done(ref, back)
            if failures:
                await asyncio.sleep(PAUSE_S * 2**failures)
    finally:
        connection.close()


async def _fetch_one(
    connection: _Connection,
    ref: BlobRef,
    store: Store,
    rate: Rate,
    progress: Callable[[int], None],
) -> None:
    """Continue or begin one blob, check it, and give it its name."""
    if store.has(ref):
        return
    part = store.partial / f"{ref.sha256}.part"
    with disk_errors(part), part.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # another daemon may share this store
        if not part.exists() or part.stat().st_ino != os.fstat(file.fileno()).st_ino:
            raise BlockingIOError("another daemon has just finished this blob")
        have = file.tell()
        if have > ref.bytes:
            file.truncate(have := 0)
        if have < ref.bytes:
            async for piece in connection.get(f"/blobs/{ref.sha256}", have, ref.bytes - have):
                await rate.take(len(piece))
                file.write(piece)
                progress(len(piece))
        file.flush()
        if file.tell() < ref.bytes:
            raise ConnectionError("the holder's blob is shorter than it should be")
        if await asyncio.to_thread(file_sha256, part) != ref.sha256:
            file.truncate(0)
            if have:  # perhaps what lay there was wrong, not what has come now
                raise ConnectionError(f"blob {ref.sha256} was continued, and is damaged")
            raise _Unusable(f"{connection.holder} sent a damaged blob {ref.sha256}")
        os.fchmod(file.fileno(), 0o444)
        await asyncio.to_thread(os.fsync, file.fileno())
        part.replace(store.blob_path(ref))
