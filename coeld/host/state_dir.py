"""The state directory: who this device is, and that only one daemon is this device.

`identity.json` holds the node id, made once, and the incarnation, raised and flushed to disk
before anything is said to the swarm: a device that came back always outranks its own past. If the
file is damaged, the device becomes a new one: the swarm then sees the old id die and a new one
arrive, which costs one re-plan, while a refusal to start would cost a person's evening.
"""

import fcntl
import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from coeld.errors import StartError
from coeld.ids import NodeId

IDENTITY_BYTES_MAX = 4096


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this device is, in this run."""

    node: NodeId
    incarnation: int
    renewed: bool
    """Whether a damaged file was replaced by a new identity."""


@contextmanager
def locked(state_dir: Path) -> Iterator[None]:
    """Own the directory while the block runs; creates it. Raises StartError."""
    try:
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (state_dir / "lock").open("a")
    except OSError as exc:
        raise StartError(
            f"the state directory {state_dir} cannot be used: {exc.strerror}. Choose another one "
            "with device.state_dir, or make it writable."
        ) from exc
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartError(
                f"another coeld daemon uses the state directory {state_dir}. Stop it, or give "
                "this one a directory of its own (device.state_dir)."
            ) from None
        yield


def next_identity(state_dir: Path) -> Identity:
    """Load or make the identity and raise its incarnation, on disk before it returns.

    Call it while holding `locked`. Raises StartError when the directory cannot be written.
    """
    path = state_dir / "identity.json"
    node, incarnation, damaged = _read(path)
    identity = Identity(node, incarnation + 1, damaged)
    try:
        _replace(path, json.dumps({"node": node, "incarnation": identity.incarnation}) + "\n")
    except OSError as exc:
        raise StartError(
            f"cannot write {path}: {exc.strerror}. Without it this device could not tell its new "
            "life from its last one. Make room or choose another device.state_dir."
        ) from exc
    return identity


def _read(path: Path) -> tuple[NodeId, int, bool]:
    """(node, last incarnation, whether the file was damaged); a new node if there is none."""
    fresh = NodeId(secrets.token_hex(8))
    try:
        with path.open("rb") as file:
            value = json.loads(file.read(IDENTITY_BYTES_MAX))
        node, incarnation = value["node"], value["incarnation"]
        if len(node) != 16 or set(node) - set("0123456789abcdef"):
            raise ValueError("not a node id")
        if type(incarnation) is not int or not 0 <= incarnation < 1 << 53:
            raise ValueError("not an incarnation")
    except FileNotFoundError:
        return fresh, 0, False
    except (ValueError, KeyError, TypeError):
        return fresh, 0, True
    except OSError as exc:
        raise StartError(
            f"cannot read {path}: {exc.strerror}. Fix its permissions, or choose another "
            "device.state_dir."
        ) from exc
    return NodeId(node), incarnation, False


def _replace(path: Path, text: str) -> None:
    """Write, flush, rename, flush: after a power cut either the old file is there or the new."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".identity")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
