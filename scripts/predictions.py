"""How well the cost model predicts: a token's time as /status expects it beside the measured one.

Real daemons on an emulated wired network organise themselves, some with spans and some without.
Device-1 is asked; then the last device is killed, the others take over, and before anybody asks
again /status says what a token should take along the new routes, from what was learned of the
parts on the old ones. A row says

    predicted   before anybody asked along these routes (nothing is learned before the first)
    measured    mean over the tokens of some answers
    error       of the prediction, and of the one that has learned from these answers as well
"""

import argparse
import math
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import demo
from swarm_bench import WORDS, complete, wait_quiet, with_words

from coeld.model.manifest import Manifest
from coeld.model.store import Store
from tests.harness.lab_swarm import LabDevice, swarm_in_lab

ROOM = 0.15
"""Of the model's lots, that each device's budget allows beside its share when one is gone."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=demo.MODEL, help="an installed model")
    parser.add_argument("--vocabulary", help="whose tokenizer to use for a model without one")
    parser.add_argument("--devices", default="2,3,4")
    parser.add_argument("--spans", default="false,true")
    parser.add_argument("--profile", default="lan")
    parser.add_argument("--answers", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64, help="per answer")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that labs are taken down
    store = Store(Path(os.environ["COELD_STORE"]))
    manifest = with_words(store, arguments.model, arguments.vocabulary)
    print("| model | devices | spans | layers at device-1 | predicted ms | measured ms | error |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for count in map(int, arguments.devices.split(",")):
        for spans in arguments.spans.split(","):
            rows(manifest, count, spans, arguments)


def rows(manifest: Manifest, count: int, spans: str, arguments: argparse.Namespace) -> None:
    """Two rows: all devices, and all but the last."""
    demand = manifest.demand()
    lots_bytes = demand.layers * demand.experts * demand.lot_bytes
    share = lots_bytes * (1 / max(1, count - 1) + ROOM)
    budget_mb = math.ceil((demand.trunk_bytes + share) / 1e6)
    with (
        tempfile.TemporaryDirectory() as folder,
        swarm_in_lab(
            Path(folder),
            [budget_mb] * count,
            arguments.profile,
            manifest.name,
            swarm=f"spans = {spans}",
            engine="context_tokens = 512",
        ) as devices,
    ):
        for gone in (0, 1):
            if gone:
                devices.pop().kill()
            wait_quiet(devices)
            print(row(devices, demand.layers, spans, arguments), flush=True)


def row(devices: list[LabDevice], layers: int, spans: str, arguments: argparse.Namespace) -> str:
    before = token_of(devices[0])["predicted_us"]
    for _ in range(arguments.answers):
        complete(devices[0], WORDS, arguments.tokens)
    status = devices[0].status()
    assert status is not None
    after = token_of(devices[0])
    measured_us = after["measured_us"]
    owned = status["node"]["owners"].get(status["node"]["me"], [])
    mine = len({layer for layer, _, _ in owned})
    if not before or not measured_us:
        return (
            f"| {arguments.model} | {len(devices)} | {spans} | the routes changed meanwhile |||||"
        )
    early = f"{100 * (before / measured_us - 1):+.1f}"
    return (
        f"| {arguments.model} | {len(devices)} | {spans} | {mine} of {layers} |"
        f" {before / 1000:.1f} | {measured_us / 1000:.1f} |"
        f" {early} %, then {after['error_percent']:+.1f} % |"
    )


def token_of(device: LabDevice) -> dict[str, Any]:
    status = device.status()
    assert status is not None
    found: dict[str, Any] = status["engine"]["token"]
    return found


if __name__ == "__main__":
    main()
