"""What a cut costs: the experts of every layer at a peer, against the same layers cut but local.

Two real engines with one thread each over loopback, one request at a time, rounds in turn:

    local   the asked device holds every expert; each layer is cut, nothing leaves the process
    peer    it holds none; the other runs each layer's experts, for one row per token

The difference per layer is one call: packing, two wake-ups, checking, and whatever changing
processes does to caches. A bare round trip of as many bytes between two processes, with as much
to do in between, is what a link of no length costs here; the rest is the data path's own.
"""

import argparse
import os
import socket
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import demo

from coeld.ids import Lot
from coeld.model.manifest import Manifest
from coeld.model.store import Store
from tests.harness.engine import swarm_of

ASKED, OTHER = "a" * 16, "b" * 16
PROMPT = "The capital of France is a city that "
TOKENS = 64
ECHOES = 2000
THINK_S = 300e-6
"""Between two round trips: about what a layer computes."""


def ms_per_token(store: Store, manifest: Manifest, shares: dict[str, list[Lot]]) -> float:
    """Median over the answers after the first."""
    engines = swarm_of(store.root, manifest, shares)
    try:
        asked = engines[ASKED]
        asked.sock.settimeout(300)
        cuts = f", {manifest.shape.layers} cuts"
        steps = asked.stats_when(lambda stats: cuts in stats["steps"], 300)["steps"]
        assert cuts in steps, steps
        found = []
        for at in range(5):
            _text, done = asked.answer(f"r{at}", prompt=PROMPT, max_tokens=TOKENS)
            assert done["ev"] == "done", done
            found.append(1000 * done["decode_s"] / (done["completion_tokens"] - 1))
        return median(found[1:])
    finally:
        for engine in engines.values():
            engine.close()


def round_trip_us(size: int) -> float:
    """The median of `size` bytes there and back over loopback, between two processes that sleep."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        child = os.fork()
        if child == 0:
            echo(listener, size)
            os._exit(0)
        with socket.create_connection(listener.getsockname()) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            buffer, took_s = bytearray(size), []
            for _ in range(ECHOES):
                until_s = time.perf_counter() + THINK_S
                while time.perf_counter() < until_s:
                    pass
                began_s = time.perf_counter()
                sock.sendall(buffer)
                fill(sock, buffer)
                took_s.append(time.perf_counter() - began_s)
        os.waitpid(child, 0)
    return median(took_s) * 1e6


def echo(listener: socket.socket, size: int) -> None:
    sock, _address = listener.accept()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    buffer = bytearray(size)
    while fill(sock, buffer):
        sock.sendall(buffer)


def fill(sock: socket.socket, buffer: bytearray) -> bool:
    view = memoryview(buffer)
    while view:
        got = sock.recv_into(view)
        if not got:
            return False
        view = view[got:]
    return True


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=demo.MODEL, help="an installed model with a tokenizer")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    store = Store(Path(os.environ["COELD_STORE"]))
    manifest = store.manifest(arguments.model)
    demand = manifest.demand()
    lots, layers = demand.lots(), demand.layers
    settings = {
        "local": {ASKED: lots, OTHER: demand.lots_of(0)},
        "peer": {ASKED: [], OTHER: lots},
    }
    found: dict[str, list[float]] = {name: [] for name in settings}
    trips: list[float] = []
    print("| round | local, ms a token | peer | a cut, µs | a bare round trip, µs | beyond it |")
    print("|---|---|---|---|---|---|")
    for number in range(arguments.rounds):
        for name, shares in settings.items():
            found[name].append(ms_per_token(store, manifest, shares))
        trips.append(round_trip_us(4 * demand.hidden))
        local, peer, trip = found["local"][-1], found["peer"][-1], trips[-1]
        cut = 1000 * (peer - local) / layers
        speeds, costs = f"{local:.1f} | {peer:.1f}", f"{cut:.0f} | {trip:.0f} | {cut - trip:.0f}"
        print(f"| {number + 1} | {speeds} | {costs} |", flush=True)


if __name__ == "__main__":
    main()
