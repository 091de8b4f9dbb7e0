"""An engine without a model: a real process that speaks coeld/engine/protocol.py.

It answers a prompt with its words, "you said: …", one token each. The last word of a prompt may ask
for something else: see `op_generate` and `Job`.
"""

import itertools
import json
import os
import select
import signal
import socket
import sys
import time

from coeld.engine.kernels import KINDS, Kernels, Timing
from coeld.engine.protocol import EngineOptions, decode, encode, error_to_json
from coeld.errors import CoeldError
from coeld.model.store import Store

KERNELS = Kernels({kind: (Timing(1, 1000, 1_000_000, 1_000_000),) for kind in KINDS}).to_json()


class FakeEngine:
    def __init__(self, fd: int, options: EngineOptions) -> None:
        self.options = options
        self.sock = socket.socket(fileno=fd)
        family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
        self.listener = socket.create_server((options.host, options.port), family=family)
        self.buffer = b""
        self.requests: dict[str, Job] = {}
        self.lots: set[tuple[int, int]] = set()
        self.cancelled: list[str] = []
        self.store = Store(options.store_dir)

    def say(self, ev: str, **fields: object) -> None:
        self.sock.sendall(encode({"ev": ev, **fields}))

    def run(self) -> None:
        host, port = self.listener.getsockname()[:2]
        self.say("ready", data_host=host, data_port=port, kernels=KERNELS)
        while True:
            readable, _, _ = select.select([self.sock], [], [], 0.001 if self.requests else None)
            if readable:
                data = self.sock.recv(1 << 16)
                if not data:
                    return
                self.buffer += data
                *lines, self.buffer = self.buffer.split(b"\n")
                for line in lines:
                    message = decode(line)
                    if message["op"] == "quit":
                        return
                    getattr(self, "op_" + message["op"])(message)
            for ident in list(self.requests):
                self.step(ident)

    def op_open(self, message: dict) -> None:
        try:
            name, model = message["model"], message["hash"]
            manifest = self.store.version(name, model) if model else self.store.manifest(name)
        except CoeldError as exc:
            self.say("failed", model=message["model"], **error_to_json(exc))
            return
        self.requests.clear()
        self.lots.clear()
        self.say(
            "opened",
            model=manifest.name,
            context_tokens=self.options.context_tokens,
            trunk_bytes=manifest.trunk_bytes,
            hash=manifest.hash,
        )

    def op_routes(self, message: dict) -> None:
        assert message["table"]["model"]

    def op_load(self, message: dict) -> None:
        self.lots |= {tuple(lot) for lot in message["lots"]}
        self.say("loaded", lots=message["lots"])

    def op_drop(self, message: dict) -> None:
        self.lots -= {tuple(lot) for lot in message["lots"]}
        self.say("dropped", lots=message["lots"])

    def op_cancel(self, message: dict) -> None:
        self.cancelled.append(message["id"])
        self.requests.pop(message["id"], None)

    def op_ping(self, _: dict) -> None:
        self.say("pong")

    def op_stats(self, _: dict) -> None:
        self.say(
            "stats",
            rss_bytes=0,
            weights_bytes=len(self.lots),
            kv_bytes=0,
            lots=len(self.lots),
            requests=len(self.requests),
            cancelled=len(self.cancelled),
            peers={},
            steps="fake",
        )

    def op_generate(self, message: dict) -> None:
        text = message.get("prompt")
        if text is None:
            text = message["messages"][-1]["content"]
        words = text.split() or [""]
        ident, mode = message["id"], words[-1]
        if mode == "uncovered":
            text = "12345 bytes of experts have no owner."
            self.say("error", id=ident, type="NotCovered", message=text, missing_bytes=12345)
        elif mode == "toolong" or (mode == "recall" and len(message["messages"]) > 4):
            text = "The prompt does not fit."
            self.say("error", id=ident, type="ContextTooLong", message=text, param="messages")
        elif mode == "babble":
            self.sock.sendall(b"this is not JSON\n")
        elif mode == "flood":
            for _ in range(5000):
                self.say("token", id=ident, text="x" * 200)
            self.requests[ident] = Job(mode, message, [])
        else:
            self.requests[ident] = Job(mode, message, words)

    def step(self, ident: str) -> None:
        """One token of one request."""
        job = self.requests[ident]
        if job.mode == "silent":
            return
        if job.mode == "slowly":
            time.sleep(0.02)
        if job.mode == "crash" and job.sent == 3:
            os._exit(9)
        if job.mode == "fail" and job.sent == 3:
            self.say("error", id=ident, type="Unavailable", message="It broke half way.")
            del self.requests[ident]
            return
        word = next(job.words, None)
        if word is None or job.sent == job.most:
            del self.requests[ident]
            reason = "stop" if word is None and job.mode != "full" else "length"
            numbers = {
                "prompt_tokens": 7,
                "prefill_s": 0.5,
                "decode_s": 2.0,
                "decode_split": {},
                "stalls": [],
                "wire": {},
                "narrow": {},
            }
            self.say("use", requests=1, prompt_tokens=7, tokens=job.sent, experts={})
            self.say("done", id=ident, finish_reason=reason, completion_tokens=job.sent, **numbers)
            return
        job.sent += 1
        self.say("token", id=ident, text=word)


class Job:
    """One request: what it will say, and how far it is."""

    def __init__(self, mode: str, order: dict, words: list[str]) -> None:
        self.mode = mode
        self.sent = 0
        self.most = order["max_tokens"]
        if mode in ("echo", "recall"):
            self.words = iter([json.dumps(order, sort_keys=True)])
        elif mode in ("forever", "slowly", "crash", "fail"):
            self.words = itertools.repeat("word ")
        else:
            self.words = iter(["you ", "said: ", *(f"{word} " for word in words)])


def main() -> int:
    fd, options = EngineOptions.parse()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        engine = FakeEngine(fd, options)
    except OSError as exc:
        text = f"The data port {options.host}:{options.port} cannot be opened ({exc.strerror})."
        message = {"ev": "failed", "model": "", "type": "StartError", "message": text}
        socket.socket(fileno=fd).sendall(encode(message))
        return 1
    engine.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
