"""Weights between stores: from several holders, through every kind of fault, never a wrong byte."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager

import pytest

from coeld.api import serve as api_serve
from coeld.api.serve import serve
from coeld.errors import FetchFailed
from coeld.model.manifest import BlobRef, Manifest
from coeld.model.store import Store, file_sha256
from coeld.net import blobs
from coeld.net.blobs import BlobServer, Holder, Rate, _Connection, fetch, fetch_manifest

NO_LIMIT = Rate(0)


@asynccontextmanager
async def holding(store: Store, rate: Rate = NO_LIMIT) -> AsyncIterator[tuple[Holder, BlobServer]]:
    """A real server on loopback."""
    server = BlobServer(store, rate)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        task = asyncio.create_task(serve(server.app, [sock]), name="holder")
        try:
            yield Holder(*sock.getsockname()), server
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def misbehaving(
    how: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[Holder]:
    """A server that does with every connection what it is told."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await how(reader, writer)
        except (OSError, EOFError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield Holder(*server.sockets[0].getsockname())
    finally:
        server.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch) -> None:
    monkeypatch.setattr(blobs, "PAUSE_S", 0.001)
    monkeypatch.setattr(blobs, "IDLE_S", 0.3)


@pytest.fixture
def empty(tmp_path) -> Store:
    return Store(tmp_path / "empty")


def right(store: Store, refs: Iterable[BlobRef]) -> bool:
    return all(file_sha256(store.blob_path(ref)) == ref.sha256 for ref in refs)


def complete(store: Store, model: Manifest) -> bool:
    return right(store, model.blobs()) and not list(store.partial.glob("*.part"))


def test_a_whole_model_comes_from_two_holders(tiny_store, tiny, empty) -> None:
    async def main() -> list[int]:
        async with holding(tiny_store) as (a, first), holding(tiny_store) as (b, second):
            manifest = await fetch_manifest(tiny.hash, [a, b])
            await fetch(empty, manifest.blobs(), [a, b], NO_LIMIT)
            empty.save(manifest)
            return [first.sent_bytes, second.sent_bytes]

    sent = asyncio.run(main())
    assert complete(empty, tiny)
    assert empty.manifest("tiny").hash == tiny.hash
    assert min(sent) > 0
    assert sum(sent) == sum(ref.bytes for ref in tiny.blobs())


def test_only_what_is_wanted_and_missing_is_fetched(tiny_store, tiny, empty) -> None:
    async def main() -> int:
        async with holding(tiny_store) as (holder, server):
            await fetch(empty, tiny.experts[0], [holder], NO_LIMIT)
            before = server.sent_bytes
            await fetch(empty, tiny.experts[0], [holder], NO_LIMIT)
            assert server.sent_bytes == before
            return before

    assert asyncio.run(main()) == sum(ref.bytes for ref in set_of(tiny.experts[0]))
    assert not empty.has(tiny.experts[1][0])


def set_of(refs):
    return {ref.sha256: ref for ref in refs}.values()


def test_a_connection_that_breaks_in_the_middle_is_continued_elsewhere(
    tiny_store, tiny, empty
) -> None:
    """The first holder sends a third of each blob and hangs up."""
    asked = []

    async def third(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = (await reader.readuntil(b"\r\n\r\n")).decode()
        sha256 = request.split()[1].rpartition("/")[2]
        start = start_of(request)
        data = (tiny_store.root / "blobs" / sha256).read_bytes()[start:]
        asked.append(start)
        writer.write(status_line(start) + b"Content-Length: %d\r\n\r\n" % len(data))
        writer.write(data[: len(data) // 3 + 1])
        await writer.drain()

    async def main() -> tuple[int, int]:
        got = 0

        def count(size: int) -> None:
            nonlocal got
            got += size

        async with misbehaving(third) as bad, holding(tiny_store) as (good, server):
            await fetch(empty, tiny.blobs(), [bad, good], NO_LIMIT, count)
            return got, server.sent_bytes

    got, sent = asyncio.run(main())
    assert complete(empty, tiny)
    assert asked
    assert got == sum(ref.bytes for ref in tiny.blobs())  # nothing came twice
    assert sent < got


def start_of(request: str) -> int:
    return int(request.partition("bytes=")[2].partition("-")[0] or 0)


def status_line(start: int) -> bytes:
    return b"HTTP/1.1 %d x\r\n" % (206 if start else 200)


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def rubbish(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"\xff\x00SSH-2.0\r\n" * 100)
    await writer.drain()


async def lying(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """The right size and wrong bytes."""
    while request := (await reader.readuntil(b"\r\n\r\n")).decode():
        size = SIZES.get(request.split()[1].rpartition("/")[2], 3)
        start = start_of(request)
        body = b"\x01" * (size - start)
        writer.write(status_line(start) + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        await writer.drain()


async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(status_line(0) + b"Transfer-Encoding: chunked\r\n\r\n")
    while True:
        writer.write(b"10000\r\n" + bytes(65536) + b"\r\n")
        await writer.drain()


async def dripping(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Never silent for long, and never done."""
    request = (await reader.readuntil(b"\r\n\r\n")).decode()
    writer.write(status_line(start_of(request)) + b"Content-Length: 100000\r\n\r\n")
    while True:
        writer.write(b"\0")
        await writer.drain()
        await asyncio.sleep(0.05)


async def refusing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 404 x\r\nContent-Length: 0\r\n\r\n")


SIZES: dict[str, int] = {}
BAD = [silent, rubbish, lying, endless, dripping, refusing]


@pytest.mark.parametrize("how", BAD)
def test_a_bad_holder_beside_a_good_one_does_no_harm(how, tiny_store, tiny, empty) -> None:
    SIZES.update({ref.sha256: ref.bytes for ref in tiny.blobs()})

    async def main() -> None:
        async with misbehaving(how) as bad, holding(tiny_store) as (good, _server):
            assert (await fetch_manifest(tiny.hash, [bad, good])).hash == tiny.hash
            await fetch(empty, tiny.blobs(), [bad, good], NO_LIMIT)

    asyncio.run(main())
    assert complete(empty, tiny)


@pytest.mark.parametrize("how", BAD)
def test_a_bad_holder_alone_gives_a_typed_error_and_nothing_wrong(how, tiny, empty) -> None:
    SIZES.update({ref.sha256: ref.bytes for ref in tiny.blobs()})
    wanted = list(tiny.experts[0][:2])

    async def main() -> None:
        async with misbehaving(how) as bad:
            with pytest.raises(FetchFailed, match="no device sent"):
                await fetch_manifest(tiny.hash, [bad])
            with pytest.raises(FetchFailed, match=r"could not be fetched \("):
                await fetch(empty, wanted, [bad], NO_LIMIT)

    asyncio.run(main())
    assert not any(empty.has(ref) for ref in wanted)


def test_a_connection_that_was_idle_for_too_long_is_opened_anew(tiny_store, tiny, empty) -> None:
    async def main() -> None:
        async with holding(tiny_store) as (holder, _server):
            connection, target = _Connection(holder), f"/manifests/{tiny.hash}"
            assert [piece async for piece in connection.get(target, 0, 1 << 20)]
            reader, writer = await connection._ready()
            assert connection._streams == (reader, writer)
            reader.feed_eof()
            assert [piece async for piece in connection.get(target, 0, 1 << 20)]
            connection.close()

    asyncio.run(main())


@pytest.mark.parametrize("host", ["a..b", "x" * 64])
def test_a_host_that_no_name_service_would_take_is_passed_over(host, tiny_store, tiny) -> None:
    async def main() -> None:
        async with holding(tiny_store) as (holder, _server):
            found = await fetch_manifest(tiny.hash, [Holder(host, 9), holder])
            assert found.hash == tiny.hash

    asyncio.run(main())


def test_strangers_who_say_nothing_do_not_keep_others_out(tiny_store, tiny, monkeypatch) -> None:
    monkeypatch.setattr(api_serve, "CONNECTIONS_MAX", 3)
    monkeypatch.setattr(api_serve, "REQUEST_S", 0.2)

    async def main() -> None:
        async with holding(tiny_store) as (holder, _server):
            opened = [await asyncio.open_connection(holder.host, holder.port) for _ in range(3)]
            opened[0][1].write(b"GET / HT")
            with pytest.raises(FetchFailed, match="503"):
                await fetch_manifest(tiny.hash, [holder])
            for reader, writer in opened:
                assert await asyncio.wait_for(reader.read(), 5) == b""
                writer.close()
            assert (await fetch_manifest(tiny.hash, [holder])).hash == tiny.hash

    asyncio.run(main())


def test_nobody_to_ask_is_an_error_and_what_came_is_kept(tiny_store, tiny, empty) -> None:
    async def main() -> None:
        with pytest.raises(FetchFailed, match="no device is known"):
            await fetch(empty, tiny.blobs(), [], NO_LIMIT)

    asyncio.run(main())
    ref = tiny.experts[0][0]
    whole = tiny_store.blob_path(ref).read_bytes()
    (empty.partial / f"{ref.sha256}.part").write_bytes(whole[:100])

    async def again() -> int:
        async with holding(tiny_store) as (holder, server):
            await fetch(empty, [ref], [holder], NO_LIMIT)
            return server.sent_bytes

    assert asyncio.run(again()) == len(whole) - 100


@pytest.mark.parametrize("left", [b"", b"\x01" * 50, None], ids=["nothing", "wrong", "too long"])
def test_what_lies_in_partial_is_not_believed(left, tiny_store, tiny, empty) -> None:
    """Nothing, wrong bytes at the beginning, or more than the blob has."""
    ref = tiny.experts[0][0]
    with empty.lock():
        pass
    path = empty.partial / f"{ref.sha256}.part"
    path.write_bytes(left if left is not None else bytes(ref.bytes + 10))

    async def main() -> None:
        async with holding(tiny_store) as (a, _), holding(tiny_store) as (b, _):
            await fetch(empty, [ref], [a, b], NO_LIMIT)

    asyncio.run(main())
    assert right(empty, [ref])


def test_names_that_are_no_blobs_are_not_served(tiny_store, tiny) -> None:
    async def status(holder: Holder, target: str, more: str = "") -> int:
        reader, writer = await asyncio.open_connection(holder.host, holder.port)
        writer.write(f"GET {target} HTTP/1.1\r\nHost: x\r\n{more}\r\n".encode())
        line = await reader.readline()
        writer.close()
        return int(line.split()[1])

    async def main() -> None:
        async with holding(tiny_store) as (holder, _server):
            name = tiny.experts[0][0].sha256
            assert await status(holder, f"/blobs/{name}") == 200
            assert await status(holder, f"/blobs/{name}", "Range: bytes=5-\r\n") == 206
            assert await status(holder, f"/blobs/{name}", "Range: bytes=99999999-\r\n") == 416
            for target in (
                "/blobs/..%2Fmodels%2Ftiny.json",
                "/blobs/" + "0" * 64,
                "/",
                "/manifests/x",
            ):
                assert await status(holder, target) == 404

    asyncio.run(main())


def test_a_rate_is_kept_by_all_transfers_together() -> None:
    async def main() -> float:
        rate, clock = Rate(1e6), asyncio.get_running_loop().time
        started = clock()
        async with asyncio.TaskGroup() as group:
            for number in range(4):
                group.create_task(take(rate, 50_000), name=f"taker {number}")
        return clock() - started

    async def take(rate: Rate, size: int) -> None:
        for _ in range(5):
            await rate.take(size // 5)

    assert asyncio.run(main()) >= 0.19 - 0.05  # the last piece may leave at once


def test_json_of_the_manifest_is_what_the_store_has(tiny_store, tiny) -> None:
    async def main() -> Manifest:
        async with holding(tiny_store) as (holder, _server):
            return await fetch_manifest(tiny.hash, [holder])

    assert json.loads(asyncio.run(main()).to_json()) == json.loads(tiny.to_json())
