"""What each fault costs: real devices with the real model on an emulated wired network.

For each fault a long greedy answer is asked of device-1; in the middle of it the fault begins, and
ends LASTS_S later where it has an end. A row of the table says

    longest silence   between two pieces of that answer; where its own device dies, until it fails
    whole again       from the end of the fault until every device sees every other one, every
                      expert has an owner and all agree on the routes
    text              whether the answer is that of the undisturbed swarm
    afterwards        whether every device gives that answer again

Where lots are held twice ("replica") a device that dies leaves an owner behind, else some of its
lots have to be loaded from disk by the others. Where parts only move ("moved") the longest silence
may be twice the median and 200 ms. Exit status 1 if a row breaks a promise.
"""

import argparse
import math
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise, takewhile
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import demo

from coeld.model.store import Store, default_store
from tests.harness.disasters import Disaster, Havoc
from tests.harness.lab_swarm import (
    BROKER,
    Heard,
    LabDevice,
    Stalls,
    listen,
    start_mosquitto,
    swarm_in_lab,
)
from tests.netlab import missing

PROMPT = "Write a long story about a lighthouse keeper and a young engineer."
TOKENS, SHORT_TOKENS = 300, 40
AT_PIECE = 20
LASTS_S = 10.0
SETTLE_S_MAX = 60.0
SILENCE_S_MAX = {"replica": 1.5, "disk": 5.0, "decoder": 1.5}
"""By what is left when a device is gone."""


@dataclass
class Row:
    fault: str
    left: str
    heard: Heard
    whole_s: float
    same: bool
    same_chars: int
    """How much of the text is that of the undisturbed swarm."""
    afterwards: bool
    fault_s: float = 0.0

    @property
    def silence_s(self) -> float:
        """The longest one that reached beyond the beginning of the fault."""
        times = [*self.heard.at_s, self.heard.ended_s]
        return max(
            (b - a for a, b in pairwise(times) if b > self.fault_s),
            default=0.0,
        )

    @property
    def allowed_s(self) -> float:
        if self.left == "moved":
            return 2 * self.median_s + 0.2
        return SILENCE_S_MAX[self.left]

    @property
    def median_s(self) -> float:
        return median(self.heard.gaps_s or [0.0])

    @property
    def kept(self) -> bool:
        return self.same and self.afterwards and self.silence_s <= self.allowed_s

    def __str__(self) -> str:
        end = self.heard.reason or "broken: " + self.heard.error
        text = "same" if self.same else f"NOT THE SAME after {self.same_chars} characters ({end})"
        if self.left == "decoder" and self.same:
            text = f'same elsewhere; here an error: "{self.heard.error[:40]}"'
        return (
            f"| {self.fault} | {self.left} | {self.silence_s:.2f} s (median "
            f"{self.median_s * 1e3:.0f} ms) | {self.whole_s:.1f} s "
            f"| {text} | {'all answer the same' if self.afterwards else 'NOT ALL'} |"
        )


class Bench:
    """One swarm that meets one fault after the other."""

    def __init__(self, devices: Sequence[LabDevice], tokens: int = TOKENS) -> None:
        self.devices, self.tokens = list(devices), tokens
        self.asker = devices[0]
        self.havoc = Havoc(devices)
        self.names = [device.name for device in devices]
        demo.wait_settled(self.devices, len(devices), time.monotonic())
        self.text = listen(self.asker, PROMPT, tokens).text
        self.short = listen(self.asker, PROMPT, SHORT_TOKENS).text

    def owner(self) -> LabDevice:
        """Of the others, the one that the asked device can spare least: it alone holds most, or
        else it is called most."""
        names = self._nodes()
        before = self._calls()
        listen(self.asker, PROMPT, SHORT_TOKENS)
        after = self._calls()

        def dear(device: LabDevice) -> tuple[int, int]:
            me = names[device.name]
            return self.alone(device), after.get(me, 0) - before.get(me, 0)

        return max(self.devices[1:], key=dear)

    def alone(self, device: LabDevice) -> int:
        """How many lots this device alone serves."""
        node = self.asker.status()["node"]
        serving = {
            name: {(run[0], run[1] + n) for run in runs for n in range(run[2])}
            for name, runs in node["owners"].items()
        }
        me = self._nodes()[device.name]
        rest = set().union(*(lots for name, lots in serving.items() if name != me))
        return len(serving.get(me, set()) - rest)

    def once(self) -> None:
        """Restart all until some other device is alone with some lots: after a takeover, those
        that were left may hold everything."""
        for _ in range(5):
            if any(self.alone(device) for device in self.devices[1:]):
                return
            for device in self.devices:
                device.kill()
            for device in self.devices:
                device.start()
            demo.wait_settled(self.devices, len(self.devices), time.monotonic())
        raise demo.Failed("nobody is alone with any lot")

    def _nodes(self) -> dict[str, str]:
        return {m["name"]: m["node"] for m in self.asker.status()["node"]["members"]}

    def _calls(self) -> dict[str, int]:
        peers = self.asker.status()["engine"]["stats"]["peers"]
        return {name: stats["calls"] for name, stats in peers.items()}

    def twice(self) -> None:
        """Wait until every lot is served twice."""

        def served() -> bool:
            status = self.asker.status()
            if status is None:
                return False
            node = status["node"]
            return bool(
                sum(m["serving"] for m in node["members"]) >= 2 * node["routes"]["total"] > 0
            )

        wait(served)
        demo.wait_settled(self.devices, len(self.devices), time.monotonic())

    def row(
        self,
        fault: str,
        left: str,
        begin: Callable[[], None],
        end: Callable[[], None] | None = None,
    ) -> Row:
        """One answer with the fault in it. Prints the row."""
        began: list[float] = []
        whole_s: list[float] = []
        acts: list[threading.Thread] = []

        def act() -> None:
            began.append(time.monotonic())
            begin()
            if end is not None:
                time.sleep(max(0.0, began[0] + LASTS_S - time.monotonic()))
                end()
            present = [device for device in self.devices if device.up]
            whole_s.append(demo.wait_settled(present, len(present), time.monotonic()))

        def then(pieces: int) -> None:
            if pieces == AT_PIECE:
                acts.append(threading.Thread(target=act))
                acts[0].start()

        with Stalls() as stalls:
            heard = listen(self.asker, PROMPT, self.tokens, then)
        for thread in acts:
            thread.join()
        present = [device for device in self.devices if device.up]
        same = heard.text == self.text
        at = sum(
            1
            for _ in takewhile(
                lambda pair: pair[0] == pair[1], zip(heard.text, self.text, strict=False)
            )
        )
        if left == "decoder":
            retry = listen(self.devices[1], PROMPT, self.tokens)
            same = not heard.reason and retry.text == self.text
            if retry.error:
                print(f"asked again elsewhere: {retry.error}", file=sys.stderr, flush=True)
        afterwards = all(listen(d, PROMPT, SHORT_TOKENS).text == self.short for d in present)
        row = Row(fault, left, heard, whole_s[0], same, at, afterwards, began[0])
        if stalls.longest_s > 0.3:
            row.fault += f" (the machine stood still for {stalls.longest_s:.1f} s)"
        print(row, flush=True)
        return row

    def disaster(self, fault: str, left: str, kind: str, victim: str, other: str = "") -> Row:
        what = Disaster(kind, victim, other, 0.0, LASTS_S)
        return self.row(fault, left, lambda: self.havoc.begin(what), lambda: self.havoc.end(what))


def wait(check: Callable[[], object], timeout_s: float = SETTLE_S_MAX) -> None:
    end = time.monotonic() + timeout_s
    while not check():
        if time.monotonic() > end:
            raise demo.Failed("it did not happen in time")
        time.sleep(0.05)


def others(bench: Bench, left: str) -> Iterator[Row]:
    """Faults of devices that are not the asked one, and of links."""
    me, owner = bench.asker.name, bench.owner
    ready = bench.twice if left == "replica" else bench.once
    for fault, kind in (
        ("owner killed, back after 10 s", "kill"),
        ("owner frozen for 10 s", "freeze"),
        ("owner cut off from all for 10 s", "isolate"),
    ):
        ready()
        yield bench.disaster(fault, left, kind, owner().name)
    ready()
    victim = owner().name
    yield bench.disaster("link to the owner cut for 10 s", left, "cut", me, victim)
    ready()
    victim = owner().name
    yield bench.disaster("asked > owner: nothing passes, 10 s", left, "mute", me, victim)
    ready()
    victim = owner().name
    yield bench.disaster("owner > asked: nothing passes, 10 s", left, "mute", victim, me)


def with_replicas(folder: Path) -> Iterator[Row]:
    with swarm_in_lab(folder, [budget_mb(2 / 3)] * 3) as devices:
        bench = Bench(devices)
        bench.twice()
        me = bench.asker.name
        yield from others(bench, "replica")
        bench.twice()
        victim = bench.owner().name
        yield bench.disaster(
            "owner's agent killed, back after 10 s", "replica", "kill agent", victim
        )
        bench.twice()
        yield bench.disaster("owner's engine killed", "replica", "kill engine", bench.owner().name)
        bench.twice()
        yield bench.disaster("30 % of all packets lost for 10 s", "replica", "loss", me, me)


def from_disk(folder: Path) -> Iterator[Row]:
    with swarm_in_lab(folder, [demo.budget_mb(3)] * 3) as devices:
        yield from others(Bench(devices), "disk")


def partition(folder: Path) -> Iterator[Row]:
    """The asked device alone against the others; it has room for everything, but others serve."""
    with swarm_in_lab(folder, [budget_mb(1.0), *[budget_mb(2 / 3)] * 2]) as devices:
        bench = Bench(devices)
        name = bench.asker.name
        yield bench.disaster("partition 2, 1 (the asked one), 10 s", "disk", "isolate", name)


def asked(folder: Path) -> Iterator[Row]:
    with swarm_in_lab(folder, [demo.budget_mb(3)] * 3) as devices:
        bench = Bench(devices)
        yield bench.disaster("asked device killed", "decoder", "kill", bench.asker.name)
        yield bench.disaster(
            "asked device's engine killed", "decoder", "kill engine", bench.asker.name
        )
        yield bench.disaster(
            "all killed, all back after 10 s", "decoder", "restart all", bench.asker.name
        )
        bench.once()
        yield older_state(bench)


def older_state(bench: Bench) -> Row:
    """A device comes back with the state directory of three lives ago."""
    victim = bench.owner()
    kept = victim.folder / "state.old"
    shutil.copytree(victim.folder / "state", kept, ignore=shutil.ignore_patterns("lock"))
    for _ in range(2):
        victim.kill()
        victim.start()
        demo.wait_settled(bench.devices, 3, time.monotonic())

    def back() -> None:
        shutil.copytree(kept, victim.folder / "state", dirs_exist_ok=True)
        victim.start()

    return bench.row("owner killed, back with an older state", "disk", victim.kill, back)


def mosquitto(folder: Path) -> Iterator[Row]:
    with swarm_in_lab(folder, [budget_mb(2 / 3)] * 3, mosquitto=True) as devices:
        bench = Bench(devices)
        bench.twice()
        lab = bench.asker.lab

        def stop() -> None:
            for pid in lab.pids(BROKER):
                signal_(pid)

        def start() -> None:
            start_mosquitto(lab, folder)

        yield bench.row("external broker killed, back after 10 s", "replica", stop, start)
        victim = bench.owner()

        def both() -> None:
            stop()
            victim.kill()

        def both_back() -> None:
            start()
            victim.start()

        yield bench.row("external broker and an owner killed", "replica", both, both_back)


def during_load(folder: Path) -> Iterator[Row]:
    with swarm_in_lab(folder, [demo.budget_mb(3)] * 4) as devices:
        bench = Bench(devices)
        first = bench.owner()
        second = next(d for d in bench.devices[1:] if d is not first)

        def begin() -> None:
            first.kill()
            before = demo.lots_served(second)
            wait(
                lambda: demo.lots_served(second) > before
            )  # it takes over, one batch after the other
            second.kill()

        def end() -> None:
            first.start()
            second.start()

        yield bench.row("owner killed, and the one that loads for it", "disk", begin, end)


def during_transfer(folder: Path) -> Iterator[Row]:
    slow = "blob_mb_per_s = 5"
    with swarm_in_lab(folder, [budget_mb(2 / 3)] * 3, network=slow) as devices:
        bench = Bench(devices)
        bench.twice()
        new, holder = bench.devices[2], bench.devices[1]

        def begin() -> None:
            new.kill()
            path = new.folder / "agent.toml"
            store = f'store_dir = "{new.folder}/store"'
            path.write_text(path.read_text().replace(f'store_dir = "{default_store()}"', store))
            new.start()
            wait(lambda: (s := new.status()) and s["weights"]["fetched_bytes"] > 5e6)
            holder.kill()

        yield bench.row("holder killed while weights are fetched", "replica", begin, holder.start)
        assert Store(new.folder / "store").names()


def signal_(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def budget_mb(share: float) -> int:
    """Megabytes for the trunk and that share of all experts, rounded up to a layer."""
    manifest = Store(default_store()).manifest(demo.MODEL)
    layer_bytes = manifest.shape.experts * manifest.demand().lot_bytes
    layers = math.ceil(manifest.shape.layers * share)
    return math.ceil((manifest.trunk_bytes + layers * layer_bytes) / 1e6)


def moves(folder: Path) -> Iterator[Row]:
    """Nothing breaks: parts move while an answer streams."""
    with swarm_in_lab(folder, [demo.budget_mb(3)] * 3) as devices:
        bench = Bench(devices)
        mover = bench.devices[2]
        toml = mover.folder / "agent.toml"

        def leave() -> None:
            mover.stop()

        def come() -> None:
            mover.start()

        def come_larger() -> None:
            small, large = demo.budget_mb(3), budget_mb(1.0)
            text = toml.read_text()
            toml.write_text(text.replace(f"budget_mb = {small}", f"budget_mb = {large}"))
            mover.start()

        yield bench.row("a device leaves", "moved", leave)
        yield bench.row("a device joins", "moved", come)
        mover.stop()
        demo.wait_settled(bench.devices[:2], 2, time.monotonic())
        yield bench.row("it comes back with room for everything", "moved", come_larger)


SCENES = {
    "moves": moves,
    "replicas": with_replicas,
    "disk": from_disk,
    "partition": partition,
    "asked": asked,
    "mosquitto": mosquitto,
    "load": during_load,
    "transfer": during_transfer,
}


@contextmanager
def scratch(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="coeld-faults-") as folder:
        yield Path(folder)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/faults", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=SCENES, default=list(SCENES))
    parser.add_argument("--keep", type=Path, help="a folder for logs that stays")
    arguments = parser.parse_args()
    if reason := missing():
        print(f"{reason}.", file=sys.stderr)
        return 2
    demo.ORGANISE_S_MAX = SETTLE_S_MAX
    print("| fault | what is left | longest silence | whole again | text | afterwards |")
    print("|---|---|---|---|---|---|", flush=True)
    rows = []
    with scratch(arguments.keep) as folder:
        for name in arguments.only:
            rows += list(SCENES[name](folder / name))
    return int(not all(row.kept for row in rows))


if __name__ == "__main__":
    sys.exit(main())
