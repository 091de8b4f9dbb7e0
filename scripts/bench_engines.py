"""One device, engine beside engine: coeld at several widths, and llama.cpp where it is built.

Every round runs each engine once, one after the other, so that a machine that slows down slows
down all of them; figures are medians over the rounds.
"""

import json
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from demo import COELD

PROMPT_TOKENS, GEN_TOKENS = 128, 64


@dataclass(frozen=True)
class Run:
    """One measurement. Memory is the process's peak for llama.cpp, which reports nothing itself."""

    decode: float
    prefill: float
    memory_mb: float
    load_s: float | None = None
    share: float | None = None


def llama_bench() -> str | None:
    """The program that LLAMA_BENCH names, if it does."""
    return os.environ.get("LLAMA_BENCH") or None


def run_llama(program: str, gguf: Path, threads: int) -> Run:
    command = [program, "-m", gguf, "-t", threads, "-p", PROMPT_TOKENS, "-n", GEN_TOKENS]
    words = [*map(str, command), "-r", "2", "-o", "json"]
    with (
        tempfile.TemporaryFile() as out,
        subprocess.Popen(words, stdout=out, stderr=subprocess.DEVNULL) as process,
    ):
        _pid, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{program} ended with {process.returncode}")
        out.seek(0)
        found = json.load(out)
    speed = {bool(row["n_gen"]): float(row["avg_ts"]) for row in found}
    return Run(speed[True], speed[False], usage.ru_maxrss * 1024 / 1e6)


def run_coeld(store: Path, model: str, threads: int) -> Run:
    command = ["bench", model, "--store", store, "--threads", threads, "--repeats", 2, "--json"]
    found = coeld(*command)
    return Run(
        found["decode_tokens_per_s"],
        found["prefill_tokens_per_s"],
        found["resident_bytes"] / 1e6,
        found["load_s"],
        found["bandwidth_share"],
    )


def coeld(*arguments: Any) -> dict[str, Any]:
    out = subprocess.run([COELD, *map(str, arguments)], check=True, stdout=subprocess.PIPE)
    value: dict[str, Any] = json.loads(out.stdout)
    return value


def side_by_side(store: Path, gguf: Path, widths: list[str], threads: int, rounds: int) -> None:
    """Prints the rows of one model; a width is "8", or "4/8": experts and trunk."""
    program, name = llama_bench(), gguf.stem.lower()
    models = {}
    for width in widths:
        bits, _, trunk = width.partition("/")
        model = f"bench-{bits}-{trunk or 8}"
        models[f"coeld, experts {bits} bits, trunk {trunk or 8}"] = model
        words = [
            "model",
            "add",
            gguf,
            "--name",
            model,
            "--bits",
            bits,
            "--trunk-bits",
            trunk or "8",
        ]
        subprocess.run([COELD, *words, "--store", store], check=True, capture_output=True)
    runs: dict[str, list[Run]] = {}
    for _ in range(rounds):
        if program:
            runs.setdefault("llama.cpp", []).append(run_llama(program, gguf, threads))
        for engine, model in models.items():
            runs.setdefault(engine, []).append(run_coeld(store, model, threads))
    base = runs.get("llama.cpp")
    for engine, some in runs.items():
        row(name, engine, some, base)
    for model in models.values():
        subprocess.run(
            [COELD, "model", "rm", model, "--store", store], check=True, stdout=subprocess.DEVNULL
        )


def row(name: str, engine: str, runs: list[Run], base: list[Run] | None) -> None:
    """Medians, and the median of the ratios to llama.cpp's run of the same round."""

    def speed(what: str) -> str:
        values = [getattr(run, what) for run in runs]
        text = f"{median(values):.0f} ({min(values):.0f} to {max(values):.0f})"
        if base is None or base is runs:
            return text
        ratios = [value / getattr(other, what) for value, other in zip(values, base, strict=True)]
        return f"{text}, x {median(ratios):.2f}"

    loads = [run.load_s for run in runs if run.load_s is not None]
    shares = [run.share for run in runs if run.share is not None]
    cells = [
        name,
        engine,
        speed("decode"),
        speed("prefill"),
        f"{median(run.memory_mb for run in runs):.0f} MB",
        f"{median(loads):.2f} s" if loads else "",
        f"{median(shares):.0%}" if shares else "",
    ]
    print(f"| {' | '.join(cells)} |", flush=True)


def table(gguf_files: list[Path], widths: list[str], threads: int, rounds: int) -> None:
    print(
        f"\n| model | engine | decode {GEN_TOKENS}, tok/s | prefill {PROMPT_TOKENS}, tok/s "
        "| resident | load | of memory bandwidth |\n|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory(prefix="coeld-bench-store-") as store:
        for gguf in gguf_files:
            side_by_side(Path(store), gguf, widths, threads, rounds)
