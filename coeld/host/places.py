"""Where this daemon's files lie, and where a client looks for a daemon's socket.

A path in the configuration wins. Otherwise systemd says (StateDirectory=, RuntimeDirectory=), or
the user's own directories are used, so that `coeld up` needs no privileges.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from coeld.config import Config
from coeld.model.store import default_store

SERVICE_SOCKET: Final = Path("/run/coeld/coeld.sock")
"""Where systemd/coeld.socket listens."""


@dataclass(frozen=True, slots=True)
class Places:
    """Every default filled in."""

    state_dir: Path
    store_dir: Path
    socket: Path


def places(config: Config, environ: Mapping[str, str] = os.environ) -> Places:
    """Resolve the empty paths of `config`."""
    if config.device.state_dir:
        state_dir = Path(config.device.state_dir).expanduser()
    elif "STATE_DIRECTORY" in environ:
        state_dir = Path(environ["STATE_DIRECTORY"].split(":")[0])
    else:
        state_home = environ.get("XDG_STATE_HOME")
        state_dir = Path(state_home) if state_home else Path.home() / ".local/state"
        state_dir /= "coeld"
    if config.api.socket:
        socket = Path(config.api.socket).expanduser()
    elif "RUNTIME_DIRECTORY" in environ:
        socket = Path(environ["RUNTIME_DIRECTORY"].split(":")[0]) / "coeld.sock"
    elif "XDG_RUNTIME_DIR" in environ:
        socket = Path(environ["XDG_RUNTIME_DIR"]) / "coeld" / "coeld.sock"
    else:
        socket = state_dir / "coeld.sock"
    configured_store = config.device.store_dir
    store_dir = Path(configured_store).expanduser() if configured_store else default_store()
    return Places(state_dir.absolute(), store_dir.absolute(), socket.absolute())


def socket_to_ask(config: Config, environ: Mapping[str, str] = os.environ) -> Path:
    """The configured or usual socket, or the service's when only that one is there."""
    own = places(config, environ).socket
    if not config.api.socket and not own.exists() and SERVICE_SOCKET.exists():
        return SERVICE_SOCKET
    return own
