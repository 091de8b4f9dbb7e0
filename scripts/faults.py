"""What each fault costs: real devices with the real model on an emulated wired network.

For each fault a long greedy answer is asked of device-1; in the middle of it the fault begins, and
ends 10 s later where it has an end. A row of the table says

    longest silence   between two pieces of that answer; where its own device dies, until it fails
    whole again       from the end of the fault until every device sees every other one, every
                      expert has an owner and all agree on the routes
    text              whether the answer is that of the undisturbed swarm
    afterwards        whether every device gives that answer again

Where lots are held twice ("replica") a device that dies leaves an owner behind, else some of its
lots have to be loaded from disk by the others. Where parts only move ("moved") the longest silence
may be twice the median and 200 ms. Each scene is a swarm of its own. Exit status 1 if a row breaks
a promise, or if a scene does not come to its end.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import demo
from fault_bench import SETTLE_S_MAX
from fault_scenes import SCENES

from tests.harness.lab_swarm import ALWAYS
from tests.netlab import missing


@contextmanager
def scratch(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="coeld-faults-") as folder:
        yield Path(folder)


def play(name: str, folder: Path) -> bool:
    """Whether all promises of a scene were kept."""
    try:
        broken = [row for row in SCENES[name](folder) if not row.kept]
    except demo.Failed as exc:
        print(f"{name}: {exc}", file=sys.stderr, flush=True)
        return False
    return not broken


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/faults", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=SCENES, default=list(SCENES))
    parser.add_argument("--keep", type=Path, help="a folder for logs that stays")
    parser.add_argument("--cuts", action="store_true", help="with swarm.spans = false")
    arguments = parser.parse_args()
    if reason := missing():
        print(f"{reason}.", file=sys.stderr)
        return 2
    demo.ORGANISE_S_MAX = SETTLE_S_MAX
    if arguments.cuts:
        ALWAYS["swarm"] = "spans = false"
    print("| fault | what is left | longest silence | whole again | text | afterwards |")
    print("|---|---|---|---|---|---|", flush=True)
    with scratch(arguments.keep) as folder:
        kept = [play(name, folder / name) for name in arguments.only]
    return int(not all(kept))


if __name__ == "__main__":
    sys.exit(main())
