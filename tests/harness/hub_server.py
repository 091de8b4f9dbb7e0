"""A Hugging Face hub on loopback: the part of its protocol that downloads speak.

Repositories are folders. Large files are answered with a redirect to a content address that takes
ranges, as the real hub does with LFS files. What a test wants to go wrong is said in `faults`.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = ".safetensors"


class Hub:
    """The server's state. `asked` lists the content requests: (file name, Range header)."""

    def __init__(self) -> None:
        self.repositories: dict[str, Path] = {}
        self.gated: set[str] = set()
        self.faults: dict[str, str] = {}
        """File name to "drop" (the connection breaks in the middle, once) or "down" (503)."""
        self.asked: list[tuple[str, str | None]] = []
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.elsewhere = f"http://localhost:{self.server.server_port}"
        """Another host, as the real hub's store of contents is."""

    def content(self) -> dict[str, Path]:
        files = [f for folder in self.repositories.values() for f in folder.iterdir()]
        return {hashlib.sha256(f.read_bytes()).hexdigest(): f for f in files}


class Handler(BaseHTTPRequestHandler):
    """Answers one request out of the hub's state."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        match self.path.split("?")[0].strip("/").split("/"):
            case ["api", "models", org, name, "revision", revision]:
                self.info(f"{org}/{name}", revision)
            case ["api", "models", org, name, "tree", _commit]:
                self.tree(self.hub.repositories[f"{org}/{name}"])
            case [org, name, "resolve", _commit, file]:
                self.resolve(self.hub.repositories[f"{org}/{name}"] / file, body)
            case ["content", digest]:
                self.send_content(self.hub.content()[digest])
            case _:
                self.reply(404, b"")

    def info(self, name: str, revision: str) -> None:
        if name in self.hub.gated:
            self.reply(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif name not in self.hub.repositories:
            self.reply(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", "v1", COMMIT):
            self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            files = [{"rfilename": f.name} for f in self.hub.repositories[name].iterdir()]
            found = {"id": name, "sha": COMMIT, "siblings": files, "private": False}
            self.reply(200, json.dumps(found).encode())

    def tree(self, folder: Path) -> None:
        found = []
        for file in sorted(folder.iterdir()):
            data = file.read_bytes()
            entry = {"type": "file", "path": file.name, "size": len(data)}
            entry["oid"] = hashlib.sha1(data).hexdigest()
            if file.suffix == LARGE:
                digest = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 134}
            found.append(entry)
        self.reply(200, json.dumps(found).encode())

    def resolve(self, file: Path, body: bool) -> None:
        if not file.exists():
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        data = file.read_bytes()
        head = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
        if file.suffix != LARGE:
            if body:
                self.hub.asked.append((file.name, self.headers["Range"]))
            self.reply(200, data, head, body)
            return
        digest = hashlib.sha256(data).hexdigest()
        head |= {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{digest}"'}
        self.reply(302, b"", {**head, "Location": f"{self.hub.elsewhere}/content/{digest}"})

    def send_content(self, file: Path) -> None:
        wanted, data = self.headers["Range"], file.read_bytes()
        self.hub.asked.append((file.name, wanted))
        fault = self.hub.faults.get(file.name)
        if fault == "down":
            self.reply(503, b"")
        elif fault == "drop":
            del self.hub.faults[file.name]
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        elif wanted:
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            place = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self.reply(206, data[start:], {"Content-Range": place})
        else:
            self.reply(200, data)

    def reply(
        self, status: int, data: bytes, head: dict[str, str] | None = None, body=True
    ) -> None:
        self.send_response(status)
        for key, value in (head or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.server.serve_forever, args=(0.02,), name="hub")
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        thread.join()
        hub.server.server_close()
