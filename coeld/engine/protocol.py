"""What agent and engine say to each other over the socket pair they share. Pure.

One JSON object per line (UTF-8, at most LINE_BYTES_MAX). The agent starts the engine with one end
of a socket pair as an inherited file descriptor; when that closes, the engine ends. So neither
outlives the other and there is no path to clean up.

Agent to engine (`op`):
    open        {model: name, hash}           open a version of a model of the store: its trunk, its
                tokenizer. The one that is open is let go first, with all requests and lots
    routes      {table: RouteTable.to_json()}
    load        {lots: [[layer, expert], …], narrow: bool}    narrow: to be held in fewer bits than
                                                              stored; what is here changes over
    drop        {lots}
    generate    {id, prompt: str | messages: [{role, content}], max_tokens: int | null,
                 temperature: float, top_p: float, top_k: int, seed: int | null, stop: [str],
                 kl_budget: float | null}
                temperature 0 is greedy; max_tokens null means "until the context is full"
    cancel      {id}
    stats       {}
    ping        {}              its main thread answers, whatever the others compute or load
    quit        {}

Engine to agent (`ev`):
    ready       {data_host, data_port, kernels: Kernels.to_json()}   first thing after start
    opened      {model: name, context_tokens, trunk_bytes, hash}
    failed      {model, type, message}                        could not open it
    loaded      {lots}          dropped {lots}
    load_failed {lots, why}     no lots: graphs could not be built, and the present ones go on
    token       {id, text}                                    text may hold several tokens or ""
    done        {id, finish_reason: "stop"|"length", prompt_tokens, completion_tokens,
                 prefill_s, decode_s, stalls, prefill_split, decode_split, wire, narrow}
                                                              stalls: [seconds] waited for owners;
                                                              splits: see coeld.datapath.split;
                wire: {kl_budget, kl_estimate, rows_bytes, float32_bytes, pruned_pairs}
                                                              of rows to and from peers
                narrow: {experts, of, bits}   the most experts held in fewer bits meanwhile
    error       {id, type, message, param?, code?, missing_bytes?}   ends that request
    call_failed {node, why}
    use         {requests, prompt_tokens, tokens, experts: {layer: [rows of each expert]}}
                                                              asked of this device since the last
                                                              time; layers at cuts only
    measured    {links: [[node, rtt_us, rtt_p99_us, mb_per_s], …]}   see coeld.datapath.links; when
                                                              it has changed, at most every 2 s
    stats       {rss_bytes, weights_bytes, kv_bytes, guest_kv_bytes, lots, requests, peers:
                 {node: {calls, failures, late, rtt_us_p50}}, steps: "…plan in one line…", token_us,
                 costs: [[kind, node or "", microseconds], …]}    see coeld.datapath.costs

    pong        {}

`type` is the class name from coeld.errors, so that the agent raises what the engine raised.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from coeld import errors
from coeld.errors import CoeldError, FrameError, RequestError
from coeld.ids import NodeId

LINE_BYTES_MAX: Final = 16 << 20
"""A prompt may be long, up to 1.5 times the body of an API request (that in UTF-16, this in UTF-8);
nothing else comes close."""


ENGINE_COMMAND: Final = (sys.executable, "-m", "coeld.engine")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """What the agent tells the engine on its command line: `--store-dir`, `--node`, …"""

    store_dir: Path
    node: NodeId
    swarm: str
    host: str
    port: int
    """Of the data path; 0 for any free one."""
    threads: int
    context_tokens: int
    requests_max: int
    call_deadline_ms: int
    patience_s: float
    kl_budget: float
    calibration: Path
    """The file where speeds that were measured are remembered."""

    def arguments(self, fd: int) -> list[str]:
        """The command line; `fd` is the engine's end of the socket pair."""
        values = {"fd": fd, **{field.name: getattr(self, field.name) for field in fields(self)}}
        named = ((f"--{name.replace('_', '-')}", str(value)) for name, value in values.items())
        return [word for pair in named for word in pair]

    @staticmethod
    def parse(arguments: Sequence[str] | None = None) -> "tuple[int, EngineOptions]":
        """The inverse of `arguments`: (fd, options). Exits with a usage message like argparse."""
        parser = argparse.ArgumentParser(prog="coeld.engine", description="Started by the agent.")
        parser.add_argument("--fd", type=int, required=True)
        for field in fields(EngineOptions):
            flag = f"--{field.name.replace('_', '-')}"
            parser.add_argument(flag, type=field.type, required=True)
        values = vars(parser.parse_args(arguments))
        return values.pop("fd"), EngineOptions(**values)


def encode(message: dict[str, Any]) -> bytes:
    """A message as a line, not longer than the same texts were in the body of an API request."""
    text = json.dumps(message, separators=(",", ":"), ensure_ascii=False)
    return text.encode("utf-8", "surrogatepass") + b"\n"  # names of files may hold any bytes


def decode(line: bytes) -> dict[str, Any]:
    """One line to a message. Raises FrameError."""
    try:
        value = json.loads(line)
    except ValueError as exc:
        raise FrameError(f"not JSON: {line[:80]!r}") from exc
    if not isinstance(value, dict):
        raise FrameError(f"not an object: {line[:80]!r}")
    return value


def error_to_json(exc: Exception) -> dict[str, Any]:
    """`type`, `message` and what else the error carries."""
    name = type(exc).__name__
    value: dict[str, Any] = {"type": name, "message": str(exc) or name}
    for extra in ("param", "code", "missing_bytes"):
        if getattr(exc, extra, None) is not None:
            value[extra] = getattr(exc, extra)
    return value


def error_from_json(value: dict[str, Any]) -> CoeldError:
    """The error that `error_to_json` was given; CoeldError for a type it does not know."""
    kind = getattr(errors, str(value.get("type")), CoeldError)
    message = str(value.get("message", ""))
    if kind is errors.NotCovered:
        return errors.NotCovered(message, int(value.get("missing_bytes", 0)))
    if kind is errors.ContextTooLong:
        return errors.ContextTooLong(message, value.get("param"))
    if isinstance(kind, type) and issubclass(kind, RequestError):
        return kind(message, value.get("param"), value.get("code"))
    if isinstance(kind, type) and issubclass(kind, CoeldError):
        return kind(message)
    return CoeldError(message)
