"""The agent's side of the engine: keeps one running, opens the model, carries requests.

Turns what the engine says into node events, and one socket into many answers. The engine cannot be
slowed down by a reader, so one that falls too far behind is cut off and its request cancelled
(coeld.net.answer). When the engine dies, running answers fail with EngineGone, the
node learns that nothing is in memory any more, and a new engine is started after a pause that
doubles while engines keep dying young.
"""

import asyncio
import itertools
import logging
import signal
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any, Final

from coeld.engine.kernels import Kernels
from coeld.engine.protocol import ENGINE_COMMAND, EngineOptions, error_from_json
from coeld.errors import (
    CoeldError,
    EngineGone,
    FrameError,
    ModelError,
    NoModel,
    StartError,
    Starting,
    Updating,
)
from coeld.events import (
    CallFailed,
    Drained,
    EngineStarted,
    EngineStopped,
    Event,
    LinksMeasured,
    LoadFailed,
    LotsDropped,
    LotsLoaded,
    Used,
)
from coeld.host.engine_process import EngineProcess
from coeld.host.sensors import UNKNOWN, Speeds
from coeld.ids import Lot, ModelHash, NodeId
from coeld.measured import MeasuredLink
from coeld.model.narrow import demand_of
from coeld.model.store import Store
from coeld.net.answer import Answer, Lobby
from coeld.routes import RouteTable
from coeld.view import ModelDemand

READY_S: Final = 60.0
"""From start to "ready"; includes imports and the measurement of the kernels."""
STORE_POLL_S: Final = 2.0
REOPEN_S: Final = 5.0
"""From asking the engine to open a model to asking again, if it has not."""
RESTART_S: Final = (0.2, 10.0)
"""First and longest pause before a restart."""
YOUNG_S: Final = 30.0
"""An engine that dies younger than this doubles the pause."""
STATS_S: Final = 0.5
PING_S: Final = 1.0
UNANSWERED_MAX: Final = 5
"""Pings in a row. Counted, not timed: while the agent itself is stopped or late, none is sent."""
KILLED: Final = (-signal.SIGKILL, -signal.SIGTERM)
"""Exit statuses of an engine that did not end by itself."""

log = logging.getLogger(__name__)


class EngineLink:
    """Start with `run`; everything else may be called at any time."""

    def __init__(
        self,
        options: EngineOptions,
        model_name: str,
        emit: Callable[[Event], None],
        command: tuple[str, ...] = ENGINE_COMMAND,
    ) -> None:
        self._options = options
        self._command = command
        self._store = Store(options.store_dir)
        self._wanted = model_name
        self._emit = emit
        self._process: EngineProcess | None = None
        self._address: tuple[str, int] | None = None
        self._answers: dict[str, Answer] = {}
        self._ids = itertools.count(1)
        self._stats: dict[str, Any] = {}
        self._stats_changed = asyncio.Event()
        self._try_open_at = 0.0
        self._chosen: ModelHash | None = None
        """The version to open; None: the oldest, which the swarm had open last."""
        self._lobby = Lobby(options.requests_max, options.patience_s)
        self._complaint = ""
        self.kernels: Kernels | None = None
        """How fast it computes, measured by the first engine; None: none got ready yet."""
        self.model: ModelDemand | None = None
        """What is open; None while nothing is."""
        self.context_tokens = 0
        self.trouble = "the engine is starting"
        """Why there is no open model, and what to do."""
        self._passing = True
        """Whether the trouble ends without anybody doing anything."""
        self._unanswered = 0
        """Pings since the engine last answered one."""
        self.restarts = 0
        self.links: tuple[MeasuredLink, ...] = ()
        """As the engine last found them."""

    @property
    def speeds(self) -> Speeds:
        """Of the open model's kernels."""
        if self.kernels is None:
            return UNKNOWN
        routed = self.model is not None and self.model.top_k > 0
        kernels = self.kernels
        return Speeds(*kernels.speeds(routed), kernels.cut_us, kernels.clock_mhz)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def serves(self) -> tuple[str, int] | None:
        """Name and context length of the model that requests are for: the open one, or the one
        whose next version is being opened."""
        name = self.model.name if self.model else self._lobby.coming
        return (name, self.context_tokens) if name else None

    def not_ready(self) -> NoModel:
        """The error for whoever asks while no model is open."""
        kind = Starting if self._passing else NoModel
        return kind(f"no model can answer yet: {self.trouble}")

    # Requests

    @asynccontextmanager
    async def generate(self, request: dict[str, Any]) -> AsyncIterator[Answer]:
        """Run a request (fields as in engine/protocol.py); leaving the block cancels it.

        It waits while none may begin because the model goes over to its next version. Raises
        NoModel when nothing is open, Updating when that took too long, Overloaded.
        """
        await self._lobby.pass_through()
        if self.model is None:
            raise self.not_ready()
        number, answer = str(next(self._ids)), Answer()
        self._answers[number] = answer
        self._send({"op": "generate", "id": number, **request})
        try:
            yield answer
        finally:
            if self._answers.pop(number, None):
                self._send({"op": "cancel", "id": number})
                self._tell_drained()

    async def stats(self) -> dict[str, Any]:
        """What the engine says about itself now, or said last."""
        if self._process:
            self._stats_changed.clear()
            self._send({"op": "stats"})
            try:
                await asyncio.wait_for(self._stats_changed.wait(), STATS_S)
            except TimeoutError:
                log.debug("the engine is too busy to answer a stats request")
        return self._stats

    # Effects

    def load(self, lots: Iterable[Lot], narrow: bool = False) -> None:
        self._send({"op": "load", "lots": [list(lot) for lot in lots], "narrow": narrow})

    def drop(self, lots: Iterable[Lot]) -> None:
        self._send({"op": "drop", "lots": [list(lot) for lot in lots]})

    def routes(self, table: RouteTable) -> None:
        self._send({"op": "routes", "table": table.to_json()})

    def admit(self, refusal: str) -> None:
        """From now on begin no requests for that reason; an empty one: begin them again."""
        self._lobby.change(refusal=refusal)
        self._tell_drained()

    def end_requests(self, why: str) -> None:
        """What is under way fails."""
        for number, answer in self._answers.items():
            answer.fail(Updating(why))
            self._send({"op": "cancel", "id": number})
        self._answers.clear()
        self._tell_drained()

    def _tell_drained(self) -> None:
        if self._lobby.refusal and not self._answers:
            self._emit(Drained())

    def open(self, model: ModelHash) -> None:
        """Have the engine let its model go and open this version of it."""
        if self.model:
            self._lobby.change(coming=self.model.name)
        self._chosen, self.model, self._try_open_at = model, None, 0.0
        self._explain("the new version of the model is being opened", passing=True)
        self._open_if_there()

    def _send(self, message: dict[str, Any]) -> None:
        if self._process:
            self._process.send(message)

    # Life

    async def run(self) -> None:
        """Keep an engine running until cancelled; then stop it.

        Raises StartError when the very first one cannot start.
        """
        loop = asyncio.get_running_loop()
        pause_s = RESTART_S[0]
        while True:
            born = loop.time()
            await self._live(first=self.restarts == 0)
            if loop.time() - born > YOUNG_S:
                pause_s = RESTART_S[0]
            self.restarts += 1
            log.warning("starting a new engine in %.1f s", pause_s)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, RESTART_S[1])

    async def _live(self, first: bool) -> None:
        """One engine from start to end."""
        process = await EngineProcess.start(self._options, self._command)
        why = "it did not start"
        try:
            if not await self._expect_ready(process):
                why = "it was killed while starting"
                return
            self._process, why = process, "it was told to stop"
            async with asyncio.TaskGroup() as group:
                watchers = (
                    group.create_task(self._watch_store(), name="engine-store-watcher"),
                    group.create_task(self._ping(process), name="engine-ping"),
                )
                while (event := await process.receive()) is not None:
                    self._handle(event)
                for watcher in watchers:
                    watcher.cancel()
                hung = self._unanswered >= UNANSWERED_MAX
                why = "it hung and was killed" if hung else "it closed its socket"
        except* FrameError as group_error:
            why = f"it said something that is no message: {group_error.exceptions[0]}"
        except* StartError:
            if first:
                raise
            log.exception("the engine cannot start")
        finally:
            self._process = None
            self._gone()
            status = await process.stop()
            log.info("the engine has gone: %s (exit status %s)", why, status)

    async def _ping(self, process: EngineProcess) -> None:
        """Kill an engine that hangs: all else then goes as if it had crashed. Threads that compute
        or load do not keep the one that answers from it."""
        self._unanswered = 0
        while self._unanswered < UNANSWERED_MAX:
            process.send({"op": "ping"})
            await asyncio.sleep(PING_S)
            self._unanswered += 1
        log.error("the engine has not answered %d pings: it is killed", self._unanswered)
        process.kill()

    def _gone(self) -> None:
        """Everybody who waits for it learns so, before its process has ended."""
        task = asyncio.current_task()
        text = (
            "this device was told to stop while it answered. Ask another device, or this one when "
            "it is up again."
            if task and task.cancelling()
            else "the engine process died while it answered; a new one is being started. Ask again "
            "in a few seconds."
        )
        for answer in self._answers.values():
            answer.fail(EngineGone(text))
        self._answers.clear()
        self._tell_drained()
        was_started, self._address = self._address, None
        self.links = ()
        self.model, self._try_open_at = None, 0.0
        self._explain("the engine died and is being restarted", passing=True)
        if was_started:
            self._emit(EngineStopped())

    async def _expect_ready(self, process: EngineProcess) -> bool:
        """False when somebody killed it (out of memory, a person): another one may start.

        Raises StartError when it cannot start.
        """
        try:
            event = await asyncio.wait_for(process.receive(), READY_S)
        except TimeoutError:
            raise StartError(
                f"the engine did not get ready within {READY_S:.0f} s. Its messages, above, may "
                "say why."
            ) from None
        if event is None:
            if await process.stop() in KILLED:
                return False
            raise StartError("the engine ended while starting. Its messages, above, say why.")
        if event.get("ev") != "ready":
            raise StartError(str(event.get("message", event)))
        self._address = (str(event["data_host"]), int(event["data_port"]))
        self.kernels = Kernels.from_json(event.get("kernels"))
        return True

    def _handle(self, event: dict[str, Any]) -> None:
        """One message. Raises FrameError when a field is missing or of the wrong type."""
        try:
            kind = event["ev"]
            if kind in ("token", "done", "error"):
                self._route(event)
            elif kind == "pong":
                self._unanswered = 0
            elif kind == "stats":
                self._stats = event
                self._stats_changed.set()
            else:
                self._control(kind, event)
        except (KeyError, TypeError, ValueError) as exc:
            raise FrameError(f"{exc!r} in {str(event)[:200]}") from exc

    def _control(self, kind: str, event: dict[str, Any]) -> None:
        match kind:
            case "loaded":
                self._emit(LotsLoaded(_lots(event)))
            case "dropped":
                self._emit(LotsDropped(_lots(event)))
            case "load_failed" if not event["lots"]:
                log.warning("graphs cannot be built, the present ones go on: %s", event["why"])
            case "load_failed":
                self._emit(LoadFailed(_lots(event), str(event["why"])))
            case "call_failed":
                self._emit(CallFailed(NodeId(str(event["node"]))))
            case "use":
                self._emit(_used(event))
            case "measured":
                self.links = _links(event)
                self._emit(LinksMeasured(self.links))
            case "opened":
                self._opened(event)
            case "failed":
                self._explain(str(event["message"]), passing=False)
                if self.trouble != self._complaint:
                    log.error("cannot open the model, trying on: %s", self.trouble)
                self._complaint = self.trouble
                self._lobby.change(coming="")
            case _:
                raise FrameError(f"unknown event {kind!r}")

    def _route(self, event: dict[str, Any]) -> None:
        answer = self._answers.get(event["id"])
        if answer is None:
            return  # cancelled a moment ago
        if event["ev"] == "error":
            answer.fail(error_from_json(event))
        elif not answer.push(event):
            answer.fail(
                CoeldError("the client reads too slowly: its answer was cut off and cancelled.")
            )
            self._send({"op": "cancel", "id": event["id"]})
        if answer.ended:
            del self._answers[event["id"]]
            self._tell_drained()

    # The model

    async def _watch_store(self) -> None:
        """Open the model when there is one; until then say what is missing."""
        assert self._address is not None
        if not self._open_if_there():
            log.warning("%s", self.trouble)
            self._emit(EngineStarted(None, *self._address))
        while True:
            await asyncio.sleep(STORE_POLL_S)
            if self.model is None:
                self._open_if_there()

    def _open_if_there(self) -> bool:
        """Whether the model of the configuration is there; asks the engine to open it."""
        names = self._store.names()
        name = self._wanted or (names[0] if len(names) == 1 else "")
        if not names or (name and name not in names):
            wanted = name or "smollm2-135m-instruct"
            self._explain(
                f"no model {name or 'at all'} is installed in {self._store.root}. Install one: "
                f"coeld model add {wanted} --store {self._store.root}. It is opened as soon as it "
                "is there.",
                passing=False,
            )
            return False
        if not name:
            self._explain(
                f"several models are installed ({', '.join(names)}). Say which one to serve: "
                'model.name = "…" in agent.toml.',
                passing=False,
            )
            return False
        now = asyncio.get_running_loop().time()
        if now >= self._try_open_at:
            self._try_open_at = now + REOPEN_S
            if self.trouble != self._complaint:
                self._explain(f"the model {name} is being opened", passing=True)
            self._send({"op": "open", "model": name, "hash": self._version_of(name)})
        return True

    def _version_of(self, name: str) -> str:
        """The hash of the version to open; empty if the store cannot say, and the engine will."""
        try:
            hashes = [manifest.hash for manifest in self._store.versions(name)]
        except ModelError:
            return ""
        if self._chosen not in hashes:
            self._chosen = None  # it was removed meanwhile
        return self._chosen or hashes[0]

    def _explain(self, trouble: str, *, passing: bool) -> None:
        self.trouble, self._passing = trouble, passing

    def _opened(self, event: dict[str, Any]) -> None:
        assert self._address is not None
        try:
            found = self._store.version(str(event["model"]), ModelHash(str(event["hash"])))
        except ModelError as exc:
            self._explain(f"the model was replaced while it was being opened: {exc}", passing=True)
            self._try_open_at = 0.0
            return
        demand = demand_of(found)
        if self.model == demand or self._chosen not in (None, demand.model):
            return  # it was asked for twice, or for another one meanwhile
        self._chosen = demand.model
        self.model, self.trouble = demand, ""
        self.context_tokens = int(event["context_tokens"])
        self._emit(EngineStarted(demand, *self._address))
        self._lobby.change(coming="")


def _links(event: dict[str, Any]) -> tuple[MeasuredLink, ...]:
    return tuple(
        MeasuredLink(NodeId(str(node)), int(rtt_us), int(p99_us), int(mb_per_s))
        for node, rtt_us, p99_us, mb_per_s in event["links"]
    )


def _lots(event: dict[str, Any]) -> tuple[Lot, ...]:
    return tuple(Lot(int(layer), int(expert)) for layer, expert in event["lots"])


def _used(event: dict[str, Any]) -> Used:
    experts = {int(layer): tuple(map(int, rows)) for layer, rows in event["experts"].items()}
    return Used(int(event["requests"]), int(event["prompt_tokens"]), int(event["tokens"]), experts)
