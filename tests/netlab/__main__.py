"""Run a command on every device of an emulated network.

    python -m tests.netlab --devices 4 --profile wifi -- COMMAND ...

COMMAND runs on every device at once. In its words {ip} is the device's address, {name} its name
(d1, d2, ...), {index} its number from 1, {ips} all addresses and {others} those of the others, with
commas; {{ and }} are braces. What it prints is prefixed with the device's name. The exit status is
the first of d1, d2, ... that is not 0. Ctrl-C ends everything.

While it runs, from another terminal (one direction at a time; times in seconds):

    python -m tests.netlab --tell link d1 d2 loss=0.3 delay_s=0.05 rate_bps=1e6
    python -m tests.netlab --tell cut d1 d2              nothing from d1 reaches d2
    python -m tests.netlab --tell partition d1,d2 d3     only devices of one set reach each other
    python -m tests.netlab --tell heal                   undo cuts and partitions
    python -m tests.netlab --tell reset                  every link as the profile says
    python -m tests.netlab --tell show                   settings and counts
"""

import argparse
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

from tests.netlab.lab import Lab, missing, running, tell
from tests.netlab.links import PROFILES

END_S = 3.0


def command_of(words: Sequence[str]) -> dict[str, Any]:
    """`--tell` in words to a command of the switch. Raises ValueError."""
    match list(words):
        case ["heal" | "reset" | "show" as verb]:
            return {"do": verb}
        case ["cut", a, b]:
            return {"do": "cut", "from": a, "to": b}
        case ["partition", *sets] if sets:
            return {"do": "partition", "sets": [names.split(",") for names in sets]}
        case ["link", a, b, *settings] if settings and all("=" in item for item in settings):
            values = dict(item.split("=", 1) for item in settings)
            numbers = {name: float(value) for name, value in values.items()}
            return {"do": "link", "from": a, "to": b, **numbers}
    raise ValueError(f"{' '.join(words)!r}: see python -m tests.netlab --help")


def tell_running(words: Sequence[str], lab: str | None) -> int:
    labs = [lab] if lab else running()
    if len(labs) != 1:
        print(f"{len(labs)} labs are running; name one with --lab: {labs}", file=sys.stderr)
        return 2
    try:
        reply = tell(labs[0], command_of(words))
    except (OSError, ValueError) as exc:
        print(exc, file=sys.stderr)
        return 2
    for name, values in reply.items():
        print(name, json.dumps(values))
    return 0


def filled_in(command: Sequence[str], lab: Lab, name: str) -> list[str]:
    """The command with its placeholders replaced for one device."""
    addresses = lab.addresses
    values = {
        "ip": addresses[name],
        "name": name,
        "index": str(list(addresses).index(name) + 1),
        "ips": ",".join(addresses.values()),
        "others": ",".join(ip for other, ip in addresses.items() if other != name),
    }
    return [word.format(**values) for word in command]


def copy_lines(name: str, process: subprocess.Popen[bytes], lock: threading.Lock) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        with lock:
            sys.stdout.buffer.write(f"{name}| ".encode() + line.rstrip(b"\n") + b"\n")
            sys.stdout.buffer.flush()


def run(arguments: argparse.Namespace) -> int:
    names = [f"d{n}" for n in range(1, arguments.devices + 1)]
    lock = threading.Lock()
    with Lab(names, PROFILES[arguments.profile], arguments.seed) as lab:
        processes: dict[str, subprocess.Popen[bytes]] = {}
        copiers = []
        for name in names:
            lab.limit(name, arguments.cpu, arguments.memory_mb * 1_000_000)
            processes[name] = process = lab.start(
                name,
                filled_in(arguments.command, lab, name),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            copiers.append(threading.Thread(target=copy_lines, args=(name, process, lock)))
            copiers[-1].start()
        if arguments.until:
            processes[arguments.until].wait()
            stop([process for name, process in processes.items() if name != arguments.until])
        statuses = {name: process.wait() for name, process in processes.items()}
    for copier in copiers:  # the lab has ended, so every pipe has
        copier.join()
    print(*(f"{name}: status {status}" for name, status in statuses.items()), sep=", ")
    if arguments.until:
        return abs(statuses[arguments.until])
    return next((abs(status) for status in statuses.values() if status), 0)


def stop(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.netlab",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--devices", type=int, default=3, metavar="N")
    parser.add_argument("--profile", choices=sorted(PROFILES), default="lan")
    parser.add_argument("--cpu", type=float, default=0, help="cores per device (0 = no limit)")
    parser.add_argument("--memory-mb", type=int, default=0, help="per device (0 = no limit)")
    parser.add_argument("--seed", type=int, default=0, help="which packets are lost")
    parser.add_argument("--until", metavar="NAME", help="end when this device's command ends")
    parser.add_argument("--tell", nargs="+", metavar="WORD", help="change a running lab")
    parser.add_argument("--lab", help="which one, when several run")
    parser.add_argument("command", nargs="*", metavar="COMMAND")
    arguments = parser.parse_args()
    if arguments.tell:
        return tell_running(arguments.tell, arguments.lab)
    if not arguments.command:
        parser.error("no command for the devices; write it after --")
    if reason := missing():
        print(f"{reason}.", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return run(arguments)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
