"""The engine process: it does what the agent says, and tells what came of it.

Four kinds of threads: the main one reads the agent's orders; the *decoder* owns the trunk and
every request; the *loader* reads experts from disk while answers stream; one per peer connection
runs experts for that peer. The decoder starts others for a while: for a way that catches up beside
an answer, and for calls of a prompt that is at several devices at once. A bug in one of the first
three ends the process: the agent restarts it, and a half-working engine is worse than none.
"""

import gc
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

from coeld.datapath.costs import costs_to_json
from coeld.datapath.dispatch import not_covered
from coeld.datapath.ports import Rows
from coeld.datapath.quality import Quality
from coeld.datapath.request import Request
from coeld.datapath.sampling import Sampling
from coeld.engine.answer import Answer
from coeld.engine.calibrate import calibrate
from coeld.engine.experts import LotsDamaged
from coeld.engine.link import Link
from coeld.engine.measure import resident_bytes
from coeld.engine.open_model import OpenModel
from coeld.engine.protocol import EngineOptions, error_to_json
from coeld.engine.sessions import give_memory_back, sweep_files, use_threads
from coeld.engine.usage import Usage
from coeld.engine.watch import Watch, Watched
from coeld.errors import BadRequest, CoeldError, NoModel, Overloaded, PeerError, PeerRefused
from coeld.ids import Lot, ModelHash, NodeId
from coeld.model.narrow import narrow_experts
from coeld.model.store import Store
from coeld.net.peers import Introduction, PeerPool, PeerServer
from coeld.routes import RouteTable

EXIT_BUG: Final = 70
YIELD_SHARE: Final = 0.4
"""While the loader works a turn lasts this much longer, the decoder resting for what is left of it:
the loader's threads are nicer than the decoder's, and would hardly come to work beside an answer.
Turns that were slow anyway are followed by the next one."""
YIELD_S_MAX: Final = 0.05
TURN_SMOOTHING: Final = 0.1
"""Weight of the latest turn."""
END_S: Final = 0.5
"""For all threads to end what they do; the agent is harsh after twice that."""
SETTLE_S: Final = 0.02
"""Between two looks whether the last part on a former plan has ended."""
REFIT_S: Final = 5.0
"""After graphs could not be built, until it is tried again."""
FAILURES: Final = (CoeldError, OSError, MemoryError)
"""Of opening and loading, on a device that is sound: disks and memories are full, or rot."""


class Engine:
    """Everything the process holds."""

    def __init__(self, options: EngineOptions, link: Link) -> None:
        """Raises OSError when the data port is taken."""
        self._options = options
        self._link = link
        self._store = Store(options.store_dir)
        self._server = PeerServer(options.host, options.port)
        self._model: OpenModel | None = None
        self.narrow = 0
        """Experts of the model that the swarm holds in fewer bits than they are stored in."""
        self._loading = False
        """Whether the loader works; it alone says so."""
        self._unfit = ""
        """Why the last graphs could not be built; the loader's."""
        self._turn_s = 0.0
        """What a turn takes while it does not, smoothed; the decoder's."""
        self.usage = Usage()
        """The decoder's."""
        self._pool: PeerPool | None = None
        self._requests: dict[str, threading.Event] = {}
        """Of those that are not over: what is set when they are cancelled."""
        self._decoder_jobs: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._loader_jobs: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._watch = Watch(self._watched, link.say)

    def run(self) -> None:
        """Serve the agent until it goes away or says quit."""
        use_threads(self._options.threads)
        sweep_files()
        threads = [
            threading.Thread(target=_fatal(loop), name=name, daemon=True)
            for name, loop in (
                ("decoder", self._decode),
                ("loader", self._load),
                ("watch", self._watch.run),
            )
        ]
        for thread in threads:
            thread.start()
        self._link.say(
            "ready",
            data_host=self._server.host,
            data_port=self._server.port,
            kernels=calibrate(self._options.calibration, self._options.threads).to_json(),
        )
        for message in self._link.messages():
            if message.get("op") == "quit":
                break
            self._obey(message)
        self._decoder_jobs.put(None)
        self._loader_jobs.put(None)
        self._watch.stop()
        self._server.close()
        until_s = time.monotonic() + END_S
        for thread in threads:
            thread.join(max(0.0, until_s - time.monotonic()))
        self._link.close()

    def _obey(self, message: dict[str, Any]) -> None:
        match message:
            case {"op": "open", "model": str(name), "hash": str(model)}:
                self._decoder_jobs.put(lambda: self._open(name, ModelHash(model)))
            case {"op": "routes", "table": dict(table)}:
                self._route(RouteTable.from_json(table))
            case {"op": "load", "lots": list(lots), "narrow": bool(narrow)}:
                self._loader_jobs.put(lambda: self._load_lots(_lots(lots), narrow))
            case {"op": "drop", "lots": list(lots)}:
                self._loader_jobs.put(lambda: self._drop_lots(_lots(lots)))
            case {"op": "generate", "id": str(ident)}:
                self._requests[ident] = cancelled = threading.Event()
                self._decoder_jobs.put(lambda: self._generate(ident, message, cancelled))
            case {"op": "cancel", "id": str(ident)}:
                self._cancel(ident)
            case {"op": "stats"}:
                self._link.say("stats", **self._stats())
            case {"op": "ping"}:
                self._link.say("pong")
            case _:
                raise AssertionError(f"the agent said {message}")

    # The decoder's thread

    def _decode(self) -> None:
        while True:
            busy = self._model is not None and bool(self._model.scheduler.active)
            wait_s = self.usage.wait_s()
            try:
                job = self._decoder_jobs.get(block=not busy, timeout=wait_s)
            except queue.Empty:
                assert self._model is not None
                if wait_s == 0:
                    self._tell_use(self._model)
                if not busy:
                    continue
                self._turn(self._model)
                if not self._model.scheduler.active:
                    give_memory_back()
                continue
            if job is None:
                return
            job()

    def _turn(self, model: OpenModel) -> None:
        """A turn of all requests, and while the loader works the rest of what a turn may take."""
        started = time.monotonic()
        model.turn()
        took_s = time.monotonic() - started
        if self._loading and model.is_answering():
            time.sleep(min(max(0.0, self._turn_s * (1 + YIELD_SHARE) - took_s), YIELD_S_MAX))
        else:
            self._turn_s += (took_s - self._turn_s) * TURN_SMOOTHING

    def _tell_use(self, model: OpenModel) -> None:
        self._link.say("use", **self.usage.take(), experts=model.decoder.uses.take())

    def _open(self, name: str, wanted: ModelHash) -> None:
        """Open the version of that hash, or the newest if there is none."""
        options = self._options
        try:
            manifest = self._store.version(name, wanted) if wanted else self._store.manifest(name)
            if self._model is not None and self._model.manifest.hash == manifest.hash:
                self._say_opened(self._model)  # asked twice, since it took long
                return
            if self._model is not None:
                needed = manifest.trunk_blobs() + manifest.text_blobs()
                self._store.verify(needed)  # else there would be none
                self._let_go()
            introduction = Introduction(options.swarm, manifest.hash, options.node)
            deadline_s = options.call_deadline_ms / 1000
            pool = PeerPool(introduction, deadline_s, self._call_failed, self._addresses)
            model = OpenModel(
                manifest,
                self._store,
                me=options.node,
                peers=pool,
                context_tokens=options.context_tokens,
                patience_s=options.patience_s,
                guests_max=options.requests_max,
                on_failure=self._call_failed,
            )
            model.refit()
        except FAILURES as exc:
            self._link.say("failed", model=name, **error_to_json(exc))
            return
        self._model, self._pool = model, pool
        gc.collect()
        gc.freeze()  # else a look through all of this takes 35 ms, between two tokens
        self._server.serve(
            introduction,
            manifest.shape.hidden,
            partial(self._run_for_peer, model),
            model.welcome,
            self._addresses,
        )
        self._say_opened(model)

    def _say_opened(self, model: OpenModel) -> None:
        self._link.say(
            "opened",
            model=model.manifest.name,
            context_tokens=model.context_tokens,
            trunk_bytes=model.manifest.trunk_bytes,
            hash=model.manifest.hash,
        )

    def _let_go(self) -> None:
        """Nothing of the open model stays in memory: the next one may need all of it."""
        assert self._model is not None
        assert self._pool is not None
        self._model.scheduler.fail_all(NoModel("Another model is being opened: ask again."))
        self._tell_use(self._model)
        self._pool.close()
        self._model = self._pool = None
        self._server.rest()
        rested = threading.Event()
        self._loader_jobs.put(rested.set)  # after what it may still do with the model
        rested.wait()
        gc.unfreeze()
        gc.collect()
        give_memory_back()

    def _generate(self, ident: str, order: dict[str, Any], cancelled: threading.Event) -> None:
        if cancelled.is_set():
            return
        listener = Answer(self, ident)
        try:
            model = self._ready_for_request()
            prompt, budget = order.get("prompt"), order["kl_budget"]
            if prompt is None:
                tokens = model.text.encode_chat(order["messages"], model.context_tokens)
            else:
                tokens = model.text.encode(prompt, model.context_tokens)
            if not tokens:
                raise BadRequest("The prompt is empty: there is nothing to continue.", "prompt")
            request = Request(
                id=ident,
                prompt=tokens,
                tokens_max=0,
                listener=listener,
                sampling=Sampling(
                    order["temperature"], order["top_p"], order["top_k"], order["seed"]
                ),
                eos_tokens=frozenset(model.manifest.eos_tokens),
                quality=Quality(self._options.kl_budget if budget is None else budget),
                cancelled=cancelled,
            )
            model.admit(request, order["max_tokens"], "messages" if prompt is None else "prompt")
        except CoeldError as exc:
            self.ended(ident, "error", **error_to_json(exc))
            return
        listener.stream = model.text.stream(order["stop"], None if prompt is None else tokens)
        self.usage.requests += 1
        self.usage.prompt_tokens += len(tokens)
        model.scheduler.submit(request)

    def _ready_for_request(self) -> OpenModel:
        if self._model is None:
            raise NoModel("No model is open on this device yet: see coeld status.")
        active = [r for r in self._model.scheduler.active if not r.cancelled.is_set()]
        if len(active) >= self._options.requests_max:
            raise Overloaded(
                f"{self._options.requests_max} requests are under way (engine.requests_max): "
                "ask again in a moment."
            )
        table = self._model.board.table
        if table is not None and table.missing_bytes:
            raise not_covered(table.missing_bytes)
        return self._model

    def _watched(self) -> Watched | None:
        model, pool = self._model, self._pool
        if model is None or pool is None or self._loading:
            return None
        return Watched(model.me, model.board, pool)

    def _call_failed(self, node: NodeId, error: PeerError) -> None:
        self._link.say("call_failed", node=node, why=str(error))

    # The loader's thread

    def _load(self) -> None:
        while True:
            try:
                job = self._loader_jobs.get(timeout=self._pause_s())
            except queue.Empty:
                job = self._refit
            if job is None:
                return
            self._loading = True
            self._learn(False)
            job()
            self._loading = False
            self._learn(True)

    def _learn(self, on: bool) -> None:
        """What tokens and round trips take while the loader works is not what they take."""
        model, pool = self._model, self._pool
        self._server.busy = not on
        if model is not None:
            model.decoder.costs.paused = not on
        if pool is not None:
            pool.meter.paused = not on

    def _pause_s(self) -> float | None:
        """When to look again whether graphs can be brought in line; None: not by itself."""
        model = self._model  # it may be let go at any time
        if model is None:
            return None
        if self._unfit:
            return REFIT_S
        return SETTLE_S if model.fitter.adopted is not None else model.doors.shuts_in_s()

    def _load_lots(self, lots: list[Lot], narrow: bool) -> None:
        model, bad, why = self._model, frozenset(lots), "no model is open"
        try:
            if model is not None:
                model.experts.load(lots, narrow)
                bad = frozenset()
        except LotsDamaged as exc:
            bad, why = exc.lots, str(exc)
        except FAILURES as exc:
            why = str(exc) or type(exc).__name__
        if bad:
            self._link.say("load_failed", lots=[lot for lot in lots if lot in bad], why=why)
        good = [lot for lot in lots if lot not in bad]
        if model is not None and (good or not bad):
            model.board.nudge()
            self._link.say("loaded", lots=good)
            self._refit()

    def _drop_lots(self, lots: list[Lot]) -> None:
        model = self._model
        try:
            if model is not None:
                model.experts.drop(lots)
        except FAILURES as exc:  # what stays needs graphs of its own; until then the old ones do
            self._link.say("load_failed", lots=[], why=str(exc) or type(exc).__name__)
        self._link.say("dropped", lots=[list(lot) for lot in lots])
        self._refit()

    def _refit(self) -> None:
        """Have the next graphs adopted that are out of line, once the last ones are settled."""
        model = self._model
        try:
            while model is not None and model is self._model and model.fitter.settle():
                change = model.fitter.prepare()
                if change is None:
                    break
                model.fitter.adopt(change)
                model.board.nudge()
            self._unfit = ""
        except FAILURES as exc:
            before, self._unfit = self._unfit, str(exc) or type(exc).__name__
            if self._unfit != before:
                self._link.say("load_failed", lots=[], why=self._unfit)

    # Any thread

    def _route(self, table: RouteTable) -> None:
        model = self._model
        if model is not None and table.model == model.manifest.hash:
            self.narrow = narrow_experts(model.manifest, table.narrow)
            before = model.board.table
            if before is None or (before.owners, before.legs) != (table.owners, table.legs):
                model.decoder.costs.rerouted()
            model.board.pin(table)
            self._loader_jobs.put(self._refit)

    def _run_for_peer(
        self, model: OpenModel, layer: int, experts: Sequence[int], x: Rows, gates: Rows | None
    ) -> Rows:
        try:
            return model.run_for_peer(layer, experts, x, gates)
        except PeerRefused:
            self._loader_jobs.put(self._refit)
            raise

    def _addresses(self) -> Mapping[NodeId, tuple[str, int]]:
        table = self._model.board.table if self._model is not None else None
        return table.addresses if table is not None else {}

    def _cancel(self, ident: str) -> None:
        cancelled = self._requests.pop(ident, None)
        if cancelled is not None:
            cancelled.set()
            if (model := self._model) is not None:
                model.board.nudge()

    def ended(self, ident: str, event: str, **fields: Any) -> None:
        """A request is over: forget it and tell the agent."""
        if self._requests.pop(ident, None) is not None:
            self._link.say(event, id=ident, **fields)

    def said(self, ident: str, text: str) -> None:
        self._link.say("token", id=ident, text=text)

    @property
    def experts(self) -> int:
        """How many the open model has."""
        shape = self._model.manifest.shape if self._model else None
        return shape.layers * shape.experts if shape else 0

    def _stats(self) -> dict[str, Any]:
        model, pool = self._model, self._pool
        peers = {}
        for node, stats in pool.stats().items() if pool else ():
            times = sorted(stats.rtt_us)
            peers[node] = {
                "calls": stats.calls,
                "failures": stats.failures,
                "late": stats.late,
                "rtt_us_p50": times[len(times) // 2] if times else None,
            }
        active = list(model.scheduler.active) if model else []
        journeys = [request.journey for request in active]
        return {
            "rss_bytes": resident_bytes(),
            "weights_bytes": model.manifest.trunk_bytes + model.experts.bytes if model else 0,
            "kv_bytes": sum(journey.bytes for journey in journeys if journey is not None),
            "guest_kv_bytes": model.guests.bytes if model else 0,
            "lots": len(model.experts.lots) if model else 0,
            "requests": len(active),
            "peers": peers,
            "refused": self._server.refused,
            "steps": model.plan if model else "",
            "token_us": round(model.decoder.costs.token_s * 1e6) if model else 0,
            "costs": costs_to_json(model.decoder.costs.fitted()) if model else [],
        }


def _lots(values: list[Any]) -> list[Lot]:
    return [Lot(int(layer), int(expert)) for layer, expert in values]


def _fatal(loop: Callable[[], None]) -> Callable[[], None]:
    """Run a thread's loop; if it breaks, end the process after the traceback is printed."""

    def guarded() -> None:
        try:
            loop()
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(EXIT_BUG)

    return guarded
