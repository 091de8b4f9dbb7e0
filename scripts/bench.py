"""The figures of docs/benchmarks.md: one device, three daemons, engines side by side."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import bench_engines
import demo
import psutil
from demo import COELD, MODEL, Device

PROMPT = "Write a long story about a lighthouse keeper and a young engineer. " * 9
GEN_TOKENS = 128
ENGINE_BASE_BYTES = 150e6
ENGINE_FACTOR = 1.35


def coeld(*arguments: str | Path) -> dict[str, Any]:
    """What a coeld command prints with --json."""
    out = subprocess.run([COELD, *arguments, "--json"], check=True, stdout=subprocess.PIPE)
    value: dict[str, Any] = json.loads(out.stdout)
    return value


def row(what: str, value: str, command: str) -> None:
    print(f"| {what} | {value} | `{command}` |", flush=True)


def one_device(threads: int, repeats: int, text: Path | None) -> None:
    command = f"coeld bench {MODEL} --prompt-tokens 128 --gen-tokens 64 --threads {threads}"
    runs = [coeld(*command.split()[1:]) for _ in range(repeats)]
    for key, what in (("decode", "decode 64"), ("prefill", "prefill 128")):
        speeds = sorted(run[f"{key}_tokens_per_s"] for run in runs)
        value = f"{median(speeds):.0f} tok/s ({speeds[0]:.0f} to {speeds[-1]:.0f}, {repeats} runs)"
        row(f"one device, {what}", value, command)
    row("one device, load", f"{median(run['load_s'] for run in runs):.2f} s", command)
    last = runs[-1]
    memory = (
        f"{last['resident_bytes'] / 1e6:.0f} MB for {last['weights_bytes'] / 1e6:.0f} MB of weights"
    )
    row("one device, resident", memory, command)
    if text is not None:
        found = coeld("eval", "perplexity", MODEL, text, "--context", "512", "--chunks", "24")
        value = f"{found['perplexity']:.3f} ± {found['standard_error']:.2f}"
        row("perplexity", value, f"coeld eval perplexity {MODEL} FILE --context 512 --chunks 24")


def last_usage(device: Device, then: Any = None) -> tuple[dict[str, Any], float]:
    """Usage of one answer, and its longest silence; `then` is called in the middle."""
    usage: dict[str, Any] = {}
    silence_s, last = 0.0, None
    for pieces, chunk in enumerate(demo.stream(device.socket, PROMPT, GEN_TOKENS)):
        now = time.monotonic()
        silence_s, last = max(silence_s, now - (last or now)), now
        usage = chunk.get("usage") or usage
        if then is not None and pieces == GEN_TOKENS // 4:
            then()
    return usage, silence_s


def three_devices(folder: Path, repeats: int) -> None:
    command = "scripts/bench"
    devices = [Device(n + 1, folder / f"device-{n + 1}") for n in range(3)]
    ports = demo.free_ports(3)
    for device, port in zip(devices, ports, strict=True):
        device.configure(port, ports[0], demo.budget_mb(3), threads=1)
    started = time.monotonic()
    try:
        for device in devices:
            device.start()
        while not ((status := devices[0].status()) and demo.covered(status)):
            time.sleep(0.02)
        next(demo.stream(devices[0].socket, "Hello", 2))
        row(
            "three devices, cold start to first token",
            f"{time.monotonic() - started:.1f} s",
            command,
        )
        demo.wait_settled(devices, 3, time.monotonic())
        usages = [last_usage(devices[0])[0] for _ in range(repeats + 1)][1:]
        speeds = sorted(usage["x_coeld"]["decode_tokens_per_s"] for usage in usages)
        value = (
            f"{median(speeds):.0f} tok/s ({speeds[0]:.0f} to {speeds[-1]:.0f}, {repeats} answers)"
        )
        row("three devices, decode", value, command)
        prefills = [usage["prompt_tokens"] / usage["x_coeld"]["prefill_s"] for usage in usages]
        tokens = usages[0]["prompt_tokens"]
        row(f"three devices, prefill {tokens}", f"{median(prefills):.0f} tok/s", command)
        memory(devices, command)
        victim = max(devices, key=demo.lots_served)
        asker = next(device for device in devices if device is not victim)
        _usage, silence_s = last_usage(asker, victim.kill)
        row("longest silence when the largest owner is killed", f"{silence_s:.2f} s", command)
    finally:
        demo.stop(devices)


def memory(devices: list[Device], command: str) -> None:
    """Resident sizes after the answers."""
    for device in devices:
        status = device.status()
        assert status is not None
        stats = status["engine"]["stats"]
        rss, owned = (
            psutil.Process(status["engine"]["pid"]).memory_info().rss,
            stats["weights_bytes"],
        )
        limit = ENGINE_FACTOR * owned + ENGINE_BASE_BYTES
        value = f"{rss / 1e6:.0f} MB holding {owned / 1e6:.0f} MB (at most {limit / 1e6:.0f})"
        row(f"{device.name}, engine resident", value, command)
        agent = psutil.Process(status["agent"]["pid"]).memory_info().rss
        row(f"{device.name}, agent resident", f"{agent / 1e6:.0f} MB", command)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("--text", type=Path, help="a text of 12288 tokens or more, for perplexity")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of the single device")
    parser.add_argument(
        "--gguf",
        type=Path,
        action="append",
        help="only compare engines on this file; may be repeated",
    )
    parser.add_argument(
        "--bits", action="append", help="for --gguf: bits of experts, or EXPERTS/TRUNK"
    )
    arguments = parser.parse_args()
    if arguments.gguf:
        bench_engines.table(
            arguments.gguf, arguments.bits or ["8", "4/4"], arguments.threads, arguments.repeats
        )
        return 0
    subprocess.run([COELD, "model", "add", MODEL], check=True, stdout=subprocess.DEVNULL)
    load = os.getloadavg()[0]
    print(
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {os.cpu_count()} cores, load {load:.2f} before\n"
    )
    print("| what | figure | command |\n|---|---|---|")
    one_device(arguments.threads, arguments.repeats, arguments.text)
    with tempfile.TemporaryDirectory(prefix="coeld-bench-") as folder:
        three_devices(Path(folder), arguments.repeats)
    return 0


if __name__ == "__main__":
    sys.exit(main())
