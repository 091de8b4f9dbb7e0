"""A model over several devices in the network lab: tokens per second, and where the time goes.

Each device is a real engine process with one thread in a network namespace of its own; the first
is asked. Modes:

    cuts    each layer's experts dealt out to all devices; attention at the device that is asked
    spans   consecutive layers at each device, one leg each
    market  whole daemons, whose memory budgets allow each only its share and a layer more: the
            auction places, and routes go by what the cost model predicts

llama.cpp's RPC, where LLAMA_BENCH names a llama-bench built with it, runs in the same lab: a
server with one thread on each device, llama-bench on the first. Rounds alternate over everything
that is measured, so that a machine that slows down slows down all of it; figures are medians.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import demo

from coeld.ids import Lot, NodeId
from coeld.model.manifest import Manifest
from coeld.model.store import Store
from coeld.routes import Leg, RouteTable
from tests.harness.engine import Engine
from tests.harness.lab_swarm import LabDevice, swarm_in_lab
from tests.netlab import PROFILES, Lab

GEN_TOKENS, CONTEXT_TOKENS = 64, 2048
QUIET_S = 5.0
"""Without news of routes: the swarm has organised itself."""
LOOK_S = 0.5
"""Between two looks at that: to tell its state is work for a device with a third of a core."""
RPC_PORT = 50052
READY_S = 240.0
WORDS = "the quick brown fox jumps over a lazy dog while seven wizards quietly boil green soup "


@dataclass
class Runs:
    """What several rounds of one setting measured."""

    decode: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    splits: list[dict[str, float]] = field(default_factory=list)
    """Of each answer: seconds and bytes per token, by name."""

    def row(self, *cells: str) -> str:
        speeds = [
            f"{median(values):.1f} ({min(values):.1f} to {max(values):.1f})"
            for values in (self.decode, self.prefill)
        ]
        return "| " + " | ".join([*cells, *speeds, self.split()]) + " |"

    def split(self) -> str:
        if not self.splits:
            return ""
        found = {name: median(split[name] for split in self.splits) for name in self.splits[0]}
        return ", ".join(f"{name} {value:.1f}" for name, value in found.items())


def nodes(count: int) -> list[NodeId]:
    return [NodeId(letter * 16) for letter in "abcdefgh"[:count]]


def legs_of(manifest: Manifest, count: int) -> tuple[Leg, ...]:
    layers = manifest.shape.layers
    return tuple(
        Leg(node, index * layers // count, (index + 1) * layers // count)
        for index, node in enumerate(nodes(count))
    )


def shares_of(manifest: Manifest, count: int, mode: str) -> dict[NodeId, list[Lot]]:
    lots = manifest.demand().lots()
    if mode == "cuts":
        devices = enumerate(nodes(count))
        return {n: [lot for lot in lots if lot.expert % count == index] for index, n in devices}
    return {
        leg.node: [lot for lot in lots if leg.first <= lot.layer < leg.stop]
        for leg in legs_of(manifest, count)
    }


@contextmanager
def engines(lab: Lab, store: Store, manifest: Manifest, mode: str) -> Iterator[Engine]:
    """One engine per device of the lab, placed by hand; the first one."""
    names = list(lab.addresses)
    shares = shares_of(manifest, len(names), mode)
    made: dict[NodeId, Engine] = {}
    try:
        for node, name in zip(shares, names, strict=True):
            start = partial(lab.start, name)
            made[node] = Engine(
                store.root,
                node=node,
                context=CONTEXT_TOKENS,
                start=start,
                host=lab.addresses[name],
                call_deadline_ms=5000,
                patience_s=10.0,
            )
            made[node].sock.settimeout(READY_S)
        ports = {node: engine.hear("ready")["data_port"] for node, engine in made.items()}
        owners = {lot: (node,) for node, lots in shares.items() for lot in lots}
        places = dict(zip(shares, lab.addresses.values(), strict=True))
        addresses = {node: (places[node], port) for node, port in ports.items()}
        table = RouteTable(manifest.hash, 1, owners, addresses)
        if mode == "spans" and len(names) > 1:
            legs = legs_of(manifest, len(names))
            table = replace(table, legs=legs, spans=legs)
        for node, engine in made.items():
            engine.say("open", model=manifest.name, hash=manifest.hash)
            engine.hear("opened")
            engine.say("load", lots=shares[node], narrow=False)
            engine.hear("loaded")
            engine.say("routes", table=table.to_json())
        fused = mode == "spans" or len(names) == 1
        cuts = 0 if fused and len(names) == 1 else manifest.shape.layers
        for node, engine in made.items():
            here = len({lot.layer for lot in shares[node]}) if fused and cuts else 0
            words = f", {cuts - here} cut"
            steps = engine.stats_when(lambda stats, w=words: w in stats["steps"], READY_S)["steps"]
            assert words in steps, steps
        yield made[nodes(1)[0]]
    finally:
        for engine in made.values():
            engine.close()


def ask(engine: Engine, ident: str, text: str, tokens: int) -> dict:
    _text, done = engine.answer(ident, prompt=text, max_tokens=tokens)
    assert done["ev"] == "done", done
    return done


def measure(engine: Engine, runs: Runs, repeats: int, prompt: int) -> None:
    text = WORDS * (prompt // 16)
    count = ask(engine, "length", text, 1)["prompt_tokens"]
    text = (text * 2)[: len(text) * prompt // count]
    for repeat in range(repeats + 1):
        done = ask(engine, f"r{repeat}", text, GEN_TOKENS)
        if repeat == 0:
            continue  # it opened connections and warmed caches
        tokens = done["completion_tokens"]
        assert tokens > GEN_TOKENS // 2, done
        runs.decode.append((tokens - 1) / done["decode_s"])
        runs.prefill.append(done["prompt_tokens"] / done["prefill_s"])
        note_split(runs, done)


def note_split(runs: Runs, done: dict) -> None:
    """Milliseconds and kilobytes per decoded token."""
    split = done.get("decode_split")
    if split:
        steps = done["completion_tokens"] - 1
        found = {name[:-2]: 1000 * split[name] / steps for name in split if name.endswith("_s")}
        sent = split["sent_bytes"] + split["received_bytes"]
        runs.splits.append({**found, "KB": sent / steps / 1000})


def run_market(
    store: Store,
    manifest: Manifest,
    profile: str,
    count: int,
    arguments: argparse.Namespace,
    runs: Runs,
) -> None:
    """Daemons that organise themselves; the first one is asked."""
    demand = manifest.demand()
    share = min(demand.layers, demand.layers // count + 1) * demand.experts * demand.lot_bytes
    budget_mb = math.ceil((demand.trunk_bytes + share) / 1e6)
    sizes, context = [budget_mb] * count, f"context_tokens = {CONTEXT_TOKENS}"
    with (
        tempfile.TemporaryDirectory() as folder,
        swarm_in_lab(
            Path(folder), sizes, profile, manifest.name, cpu=arguments.cpu, engine=context
        ) as devices,
    ):
        wait_quiet(devices)
        text = WORDS * (arguments.prompt // 16)
        tokens = complete(devices[0], text, 1)["prompt_tokens"]
        text = (text * 2)[: len(text) * arguments.prompt // tokens]
        for repeat in range(arguments.repeats + 1):
            usage = complete(devices[0], text, GEN_TOKENS)
            if repeat == 0:
                wait_quiet(devices)  # links have been measured now: routes may follow
                continue
            times = usage["x_coeld"]
            runs.decode.append(times["decode_tokens_per_s"])
            runs.prefill.append(usage["prompt_tokens"] / times["prefill_s"])


def complete(device: LabDevice, prompt: str, tokens: int) -> dict:
    """The usage of a greedy completion."""
    body = {"model": device.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    with closing(demo.UnixConnection(device.socket)) as connection:
        connection.timeout = READY_S
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        answer = json.loads(connection.getresponse().read())
    if "usage" not in answer:
        raise SystemExit(f"the answer failed: {answer}")
    return answer["usage"]


def wait_quiet(devices: list[LabDevice]) -> None:
    """Everything is served, links are known, all agree, and that has been so for QUIET_S."""
    deadline_s, since_s, before = time.monotonic() + READY_S, time.monotonic(), None
    while time.monotonic() - since_s < QUIET_S:
        if time.monotonic() > deadline_s:
            raise SystemExit(f"the swarm does not come to rest: {before}")
        nodes = [(device.status() or {}).get("node", {}) for device in devices]
        alive = [m for m in nodes[0].get("members", ()) if m["status"] == "alive"]
        probed = len(alive) == 1 or all(member["probed"] for member in alive)
        now = [node.get("routes") for node in nodes]
        whole = demo.settled(devices, len(devices))  # type: ignore[arg-type]
        if not whole or not probed or now != before:
            since_s, before = time.monotonic(), now
        time.sleep(LOOK_S)


def run_llama(lab: Lab, program: Path, arguments: argparse.Namespace, runs: Runs) -> None:
    """llama-bench on the first device, rpc servers on all."""
    folder = program.parent
    server = next(p for name in ("rpc-server", "ggml-rpc-server") if (p := folder / name).exists())
    servers = [
        lab.start(name, [server, "-H", ip, "-p", str(RPC_PORT), "-t", "1"],
                  stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for name, ip in lab.addresses.items()
    ]  # fmt: skip
    time.sleep(1)
    where = ",".join(f"{ip}:{RPC_PORT}" for ip in lab.addresses.values())
    command = [program, "-m", arguments.gguf, "-t", "1", "-p", arguments.prompt]
    command += ["-n", GEN_TOKENS, "-r", "2", "-ngl", "99", "--rpc", where, "-o", "json"]
    name = next(iter(lab.addresses))
    process = lab.start(name, command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    out, _ = process.communicate()
    for each in servers:
        each.kill()
        each.wait()
    if process.returncode:
        raise SystemExit(f"{program} ended with {process.returncode}")
    for row in json.loads(out):
        (runs.decode if row["n_gen"] else runs.prefill).append(float(row["avg_ts"]))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=demo.MODEL, help="an installed model")
    parser.add_argument("--vocabulary", help="whose tokenizer to use for a model without one")
    parser.add_argument("--gguf", type=Path, help="the same for llama.cpp")
    parser.add_argument("--devices", default="1,2,3")
    parser.add_argument("--profiles", default="lan,wifi")
    parser.add_argument("--modes", default="cuts,spans")
    parser.add_argument("--prompt", type=int, default=128, help="tokens; at least 16")
    parser.add_argument("--cpu", type=float, default=0, help="cores per device (0 = no limit)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2, help="answers per round")
    return parser.parse_args()


def tell(key: tuple[str, ...], runs: Runs) -> None:
    """How far it is."""
    words = [*key, f"decode {runs.decode[-1]:.1f}, prefill {runs.prefill[-1]:.1f}", runs.split()]
    print(*words, file=sys.stderr, flush=True)


def with_words(store: Store, model: str, vocabulary: str | None) -> Manifest:
    """An installed model, under another name with the tokenizer of another one if that is named."""
    manifest = store.manifest(model)
    if vocabulary:
        words = store.manifest(vocabulary).tokenizer
        manifest = replace(manifest, name=f"{manifest.name}-words", tokenizer=words)
        store.save(manifest)
    return manifest


def settings(arguments: argparse.Namespace) -> Iterator[tuple[str, int, str]]:
    """Profile, number of devices, mode; for one device the modes are the same, and one will do."""
    modes = arguments.modes.split(",")
    llama = ["llama"] if arguments.gguf and os.environ.get("LLAMA_BENCH") else []
    for profile in arguments.profiles.split(","):
        for count in map(int, arguments.devices.split(",")):
            for mode in [*(modes if count > 1 else modes[:1]), *llama]:
                yield profile, count, mode


def run(
    mode: str,
    profile: str,
    count: int,
    store: Store,
    manifest: Manifest,
    arguments: argparse.Namespace,
    runs: Runs,
) -> None:
    """One setting, once."""
    if mode == "market":
        run_market(store, manifest, profile, count, arguments, runs)
        return
    names = [f"d{n}" for n in range(1, count + 1)]
    with Lab(names, PROFILES[profile]) as lab:
        for name in names:
            lab.limit(name, arguments.cpu)
        if mode == "llama":
            run_llama(lab, Path(os.environ["LLAMA_BENCH"]), arguments, runs)
            return
        with engines(lab, store, manifest, mode) as engine:
            measure(engine, runs, arguments.repeats, arguments.prompt)


def main() -> None:
    arguments = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that labs are taken down
    store = Store(Path(os.environ["COELD_STORE"]))
    manifest = with_words(store, arguments.model, arguments.vocabulary)
    found: dict[tuple[str, ...], Runs] = {}
    for _ in range(arguments.rounds):
        for profile, count, mode in settings(arguments):
            key = profile, str(count), "one device" if count == 1 and mode != "llama" else mode
            runs = found.setdefault(key, Runs())
            run(mode, profile, count, store, manifest, arguments, runs)
            tell(key, runs)
    print("| model | network | devices | mode | decode tok/s | prefill tok/s | ms, KB per token |")
    print("|---|---|---|---|---|---|---|")
    for key in sorted(found):
        print(found[key].row(arguments.model, *key))


if __name__ == "__main__":
    main()
