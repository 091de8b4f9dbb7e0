"""The faults of scripts/faults: each scene is a swarm of its own and the rows that it gives."""

import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import demo
from fault_bench import PROMPT, Bench, Row, budget_mb, wait

from coeld.model.store import Store, default_store
from tests.harness.lab_swarm import BROKER, Heard, LabDevice, listen, start_mosquitto, swarm_in_lab

Ready = Callable[[Bench], None]


def devices_fail(bench: Bench, left: str, ready: Ready) -> Iterator[Row]:
    """Faults of devices that are not the asked one."""
    for fault, kind in (
        ("owner killed, back after 10 s", "kill"),
        ("owner frozen for 10 s", "freeze"),
        ("owner cut off from all for 10 s", "isolate"),
    ):
        ready(bench)
        yield bench.disaster(fault, left, kind, bench.owner().name)


def links_fail(bench: Bench, left: str, ready: Ready) -> Iterator[Row]:
    """Faults of the link between the asked device and an owner."""
    me = bench.asker.name
    ready(bench)
    victim = bench.owner().name
    yield bench.disaster("link to the owner cut for 10 s", left, "cut", me, victim)
    ready(bench)
    victim = bench.owner().name
    yield bench.disaster("asked > owner: nothing passes, 10 s", left, "mute", me, victim)
    ready(bench)
    victim = bench.owner().name
    yield bench.disaster("owner > asked: nothing passes, 10 s", left, "mute", victim, me)


def replicas(folder: Path) -> Iterator[Row]:
    with swarm_in_lab(folder, [budget_mb(2 / 3)] * 3) as devices:
        yield from devices_fail(Bench(devices), "replica", Bench.twice)


def replicas_links(folder: Path) -> Iterator[Row]:
    with swarm_in_lab(folder, [budget_mb(2 / 3)] * 3) as devices:
        yield from links_fail(Bench(devices), "replica", Bench.twice)


def replicas_parts(folder: Path) -> Iterator[Row]:
    """Half of a device dies."""
    with swarm_in_lab(folder, [budget_mb(2 / 3)] * 3) as devices:
        bench = Bench(devices)
        for fault, kind in (
            ("owner's agent killed, back after 10 s", "kill agent"),
            ("owner's engine killed", "kill engine"),
        ):
            bench.twice()
            yield bench.disaster(fault, "replica", kind, bench.owner().name)


def loss(folder: Path) -> Iterator[Row]:
    with swarm_in_lab(folder, [budget_mb(2 / 3)] * 3) as devices:
        bench = Bench(devices, tokens=300)
        bench.twice()
        me = bench.asker.name
        yield bench.disaster("30 % of all packets lost for 10 s", "replica", "loss", me, me)


def disk(folder: Path) -> Iterator[Row]:
    with swarm_in_lab(folder, [demo.budget_mb(3)] * 3) as devices:
        yield from devices_fail(Bench(devices), "disk", Bench.once)


def disk_links(folder: Path) -> Iterator[Row]:
    with swarm_in_lab(folder, [demo.budget_mb(3)] * 3) as devices:
        yield from links_fail(Bench(devices), "disk", Bench.once)


def partition(folder: Path) -> Iterator[Row]:
    """The asked device, which has room for everything, alone against two others that hold
    everything between them. Both sides are asked meanwhile."""
    with swarm_in_lab(folder, [budget_mb(1.0), *[budget_mb(2 / 3)] * 2]) as devices:
        bench = Bench(devices)
        bench.twice()
        me, other = bench.asker.name, bench.devices[1]
        there: list[Heard] = []

        def begin() -> None:
            bench.havoc.begin(apart)
            asking.start()

        def end() -> None:
            bench.havoc.end(apart)
            asking.join()

        apart = bench.lasting("isolate", me)
        asking = threading.Thread(
            target=lambda: there.append(listen(other, PROMPT, bench.tokens)), name="asking"
        )
        row = bench.row("partition 2, 1 (the asked one), 10 s", "replica", begin, end)
        if there[0].text != bench.text or not there[0].reason:
            raise demo.Failed(f"the side of two answers {there[0].text!r} {there[0].error}")
        yield row


def asked(folder: Path) -> Iterator[Row]:
    with swarm_in_lab(folder, [demo.budget_mb(3)] * 3) as devices:
        bench = Bench(devices)
        for fault, kind in (
            ("asked device killed", "kill"),
            ("asked device's engine killed", "kill engine"),
            ("all killed, all back after 10 s", "restart all"),
        ):
            yield bench.disaster(fault, "decoder", kind, bench.asker.name)


def older_state(folder: Path) -> Iterator[Row]:
    """A device comes back with the state directory of three lives ago."""
    with swarm_in_lab(folder, [demo.budget_mb(3)] * 3) as devices:
        bench = Bench(devices)
        bench.once()
        victim = bench.owner()
        kept = victim.folder / "state.old"
        shutil.copytree(victim.folder / "state", kept, ignore=shutil.ignore_patterns("lock"))
        for _ in range(2):
            victim.kill()
            victim.start()
            bench.settle()

        def back() -> None:
            shutil.copytree(kept, victim.folder / "state", dirs_exist_ok=True)
            victim.start()

        yield bench.row("owner killed, back with an older state", "disk", victim.kill, back)


def broker(folder: Path) -> Iterator[Row]:
    """All devices meet at a broker of the user's own, on a device of its own."""
    with swarm_in_lab(folder, [budget_mb(2 / 3)] * 3, mosquitto=True) as devices:
        bench = Bench(devices)
        bench.twice()
        lab = bench.asker.lab

        def stop() -> None:
            for pid in lab.pids(BROKER):
                os.kill(pid, signal.SIGKILL)

        def start() -> None:
            start_mosquitto(lab, folder)

        yield bench.row("external broker killed, back after 10 s", "replica", stop, start)
        bench.twice()
        victim = bench.owner()

        def both() -> None:
            stop()
            victim.kill()

        def both_back() -> None:
            start()
            victim.start()

        yield bench.row("external broker and an owner killed", "replica", both, both_back)


def during_load(folder: Path) -> Iterator[Row]:
    """Five devices, any three of which have room for everything: not all lots are served twice.
    The sole owner of some dies, and then whoever loads for it, which is not the asked one: that has
    least room."""
    with swarm_in_lab(folder, [budget_mb(8 / 30), *[budget_mb(11 / 30)] * 4]) as devices:
        bench = Bench(devices, tokens=120)
        bench.once()
        first = bench.owner()
        dead = [first]

        def begin() -> None:
            first.kill()
            rest = [device for device in bench.devices[1:] if device is not first]
            wait(lambda: any(map(loads, rest)), "another than the asked device loads", 10.0)
            dead.append(next(device for device in rest if loads(device)))
            dead[1].kill()

        def end() -> None:
            for device in dead:
                device.start()

        yield bench.row("owner killed, and the one that loads for it", "disk", begin, end)


def loads(device: LabDevice) -> bool:
    """Does it load what it has claimed, by its own account?"""
    node = (device.status() or {"node": {"me": "", "members": []}})["node"]
    return any(m["claimed"] > m["serving"] for m in node["members"] if m["node"] == node["me"])


def during_transfer(folder: Path) -> Iterator[Row]:
    """A device without weights joins and fetches them from three others; one of these dies."""
    rate = "blob_mb_per_s = 5"
    with swarm_in_lab(folder, [budget_mb(2 / 3)] * 4, network=rate) as devices:
        bench = Bench(devices, tokens=100)
        new = bench.devices[3]
        new.kill()
        path = new.folder / "agent.toml"
        store = f'store_dir = "{new.folder}/store"'
        path.write_text(path.read_text().replace(f'store_dir = "{default_store()}"', store))
        bench.twice()
        holder = bench.owner()
        new.start()
        wait(lambda: fetched_bytes(new) > 1e6, "weights are fetched")

        def begin() -> None:
            if not weights(new)["fetching"]:
                raise demo.Failed("the transfer was over too soon")
            holder.kill()

        yield bench.row("holder killed while weights are fetched", "replica", begin, holder.start)
        wait(lambda: weights(new)["missing_blobs"] == 0, "all weights are fetched", 120.0)
        there = Store(new.folder / "store")
        manifest = there.manifest(demo.MODEL)
        there.verify(manifest.blobs())
        size = sum(ref.bytes for ref in manifest.blobs())
        if fetched_bytes(new) != size:
            raise demo.Failed(f"{fetched_bytes(new)} bytes were fetched for {size}")


def weights(device: LabDevice) -> dict[str, int | str]:
    status = device.status()
    return status["weights"] if status else {"fetched_bytes": 0, "fetching": ""}


def fetched_bytes(device: LabDevice) -> int:
    return int(weights(device)["fetched_bytes"])


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
        bench.settle()
        yield bench.row("it comes back with room for everything", "moved", come_larger)


SCENES = {
    "moves": moves,
    "replicas": replicas,
    "replicas-links": replicas_links,
    "replicas-parts": replicas_parts,
    "loss": loss,
    "disk": disk,
    "disk-links": disk_links,
    "partition": partition,
    "asked": asked,
    "older-state": older_state,
    "broker": broker,
    "load": during_load,
    "transfer": during_transfer,
}
