"""Gaps between the tokens of one answer while the plan of its device changes under it.

A real engine process answers without end; a second one holds a third of the lots. By orders such
as the agent gives: fused graphs are cut for the peer, a third of the lots is dropped here and then
runs there, is loaded again, and the graphs are fused once more. A phase lasts until the engine says
that nothing is left to do.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from statistics import median, quantiles

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import demo
from swarm_bench import with_words

from coeld.ids import Lot
from coeld.model.manifest import Manifest
from coeld.model.store import Store
from coeld.routes import RouteTable
from tests.harness.engine import Engine

HERE, THERE = "a" * 16, "b" * 16
CONTEXT_TOKENS, QUIET_S, PATIENCE_S = 2048, 4.0, 120.0


class Watched:
    """An engine that answers all the time, and when its tokens came."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.at_s, self.asked = engine, [], 0
        self.fresh = True
        """No token of the present answer has come: what precedes it is no gap."""
        self.stats: dict = {}
        self.gaps_ms: list[float] = []
        self.loaded = 0
        self._ask()

    def _ask(self) -> None:
        self.asked += 1
        self.fresh = True
        tokens = CONTEXT_TOKENS - 32
        self.engine.generate(f"r{self.asked}", prompt="the quick brown fox", max_tokens=tokens)

    def hear(self) -> None:
        """One message of the engine."""
        message = json.loads(self.engine.file.readline())
        now_s = time.monotonic()
        match message["ev"]:
            case "token":
                if not self.fresh:
                    self.gaps_ms.append(1000 * (now_s - self.at_s[-1]))
                self.at_s.append(now_s)
                self.fresh = False
            case "done":
                self._ask()
            case "stats":
                self.stats = message
            case "loaded" | "dropped":
                self.loaded += 1
            case "error":
                raise SystemExit(f"the answer failed: {message}")

    def until(self, words: str) -> None:
        """Answer until the engine's plan is as wanted."""
        deadline_s, asked_s = time.monotonic() + PATIENCE_S, 0.0
        self.stats = {}
        while words not in self.stats.get("steps", ""):
            now_s = time.monotonic()
            if now_s > deadline_s:
                raise SystemExit(f"no {words} after {PATIENCE_S:g} s: {self.stats.get('steps')}")
            if now_s > asked_s + 0.1:
                self.engine.say("stats")
                asked_s = now_s
            self.hear()

    def quiet(self) -> None:
        until_s = time.monotonic() + QUIET_S
        while time.monotonic() < until_s:
            self.hear()

    def row(self, name: str, began_s: float) -> str:
        gaps, self.gaps_ms = self.gaps_ms, []
        took_s = time.monotonic() - began_s
        return (
            f"| {name} | {took_s:.1f} | {len(gaps)} | {median(gaps):.0f} | "
            f"{quantiles(gaps, n=20)[-1]:.0f} | {max(gaps):.0f} |"
        )


def run(store: Store, manifest: Manifest, threads: int) -> None:
    lots = manifest.demand().lots()
    third = [lot for lot in lots if lot.layer % 3 == 2]
    options = {"context": CONTEXT_TOKENS, "threads": threads, "patience_s": 10.0}
    here, there = (Engine(store.root, node=node, **options) for node in (HERE, THERE))
    try:
        ports = [engine.hear("ready")["data_port"] for engine in (here, there)]
        for engine, held in ((here, lots), (there, third)):
            engine.sock.settimeout(PATIENCE_S)
            engine.say("open", model=manifest.name, hash=manifest.hash)
            engine.hear("opened")
            engine.say("load", lots=held, narrow=False)
            engine.hear("loaded")
        layers = manifest.shape.layers

        def follow(epoch: int, owners: dict[Lot, tuple[str, ...]], both: bool) -> None:
            addresses = {HERE: ("127.0.0.1", ports[0])}
            if both:
                addresses[THERE] = ("127.0.0.1", ports[1])
            table = RouteTable(manifest.hash, epoch, owners, addresses)
            for engine in (here, there):
                engine.say("routes", table=table.to_json())

        mine = dict.fromkeys(lots, (HERE,))
        shared = {lot: (HERE, THERE) if lot in set(third) else (HERE,) for lot in lots}
        theirs = {lot: (THERE,) if lot in set(third) else (HERE,) for lot in lots}
        follow(1, mine, both=False)
        here.stats_when(lambda stats: ", 0 cuts" in stats["steps"], PATIENCE_S)
        watched = Watched(here)
        watched.until(", 0 cuts")
        watched.gaps_ms.clear()
        print("| meanwhile | s | tokens | median gap, ms | p95 | longest |")
        print("|---|---|---|---|---|---|")

        def phase(name: str, words: str | None) -> None:
            began_s = time.monotonic()
            watched.quiet() if words is None else watched.until(words)
            print(watched.row(name, began_s), flush=True)

        phase("fused, nothing else", None)
        follow(2, shared, both=True)
        phase("fused to cut", f", {layers} cuts")
        phase("cut, nothing else", None)
        follow(3, theirs, both=True)
        done = watched.loaded
        here.say("drop", lots=third)
        began_s = time.monotonic()
        while watched.loaded == done:
            watched.hear()
        print(watched.row("a third of the lots dropped", began_s), flush=True)
        phase("these at the peer, nothing else", None)
        done = watched.loaded
        here.say("load", lots=third, narrow=False)
        began_s = time.monotonic()
        while watched.loaded == done:
            watched.hear()
        print(watched.row("these loaded", began_s), flush=True)
        follow(4, mine, both=False)
        phase("cut to fused", ", 0 cuts")
    finally:
        for engine in (here, there):
            engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=demo.MODEL, help="an installed model")
    parser.add_argument("--vocabulary", help="whose tokenizer to use for a model without one")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    store = Store(Path(os.environ["COELD_STORE"]))
    run(store, with_words(store, arguments.model, arguments.vocabulary), arguments.threads)


if __name__ == "__main__":
    main()
