"""One swarm that meets faults, and what each of them cost: used by scripts/faults."""

import math
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from statistics import median

import demo

from coeld.model.store import Store, default_store
from tests.harness.disasters import Disaster, Havoc
from tests.harness.lab_swarm import Heard, LabDevice, Stalls, listen

PROMPT = "Write a long story about a lighthouse keeper and a young engineer."
TOKENS, SHORT_TOKENS = 200, 40
AT_PIECE = 20
LASTS_S = 10.0
SETTLE_S_MAX = 60.0
SILENCE_S_MAX = {"replica": 1.5, "disk": 5.0, "decoder": 1.5}
"""By what is left when a device is gone."""
STALL_S = 0.3
"""The machine itself stood still for longer than this: the row says so."""


@dataclass
class Row:
    fault: str
    left: str
    heard: Heard
    whole_s: float
    same: bool
    same_chars: int
    """How much of the text is that of the undisturbed swarm."""
    afterwards: bool
    fault_s: float = 0.0

    @property
    def silence_s(self) -> float:
        """The longest one that reached beyond the beginning of the fault."""
        times = [*self.heard.at_s, self.heard.ended_s]
        return max(
            (b - a for a, b in pairwise(times) if b > self.fault_s),
            default=0.0,
        )

    @property
    def allowed_s(self) -> float:
        if self.left == "moved":
            return 2 * self.median_s + 0.2
        return SILENCE_S_MAX[self.left]

    @property
    def median_s(self) -> float:
        return median(self.heard.gaps_s or [0.0])

    @property
    def kept(self) -> bool:
        return self.same and self.afterwards and self.silence_s <= self.allowed_s

    def __str__(self) -> str:
        end = self.heard.reason or "broken: " + self.heard.error
        text = "same" if self.same else f"NOT THE SAME after {self.same_chars} characters ({end})"
        if self.left == "decoder" and self.same:
            text = f'same elsewhere; here an error: "{self.heard.error[:40]}"'
        return (
            f"| {self.fault} | {self.left} | {self.silence_s:.2f} s (median "
            f"{self.median_s * 1e3:.0f} ms) | {self.whole_s:.1f} s "
            f"| {text} | {'all answer the same' if self.afterwards else 'NOT ALL'} |"
        )


class Acts(threading.Thread):
    """The fault, beside the answer: begins, lasts, ends; then the swarm is waited for."""

    def __init__(self, begin: Callable[[], None], end: Callable[[], None] | None) -> None:
        super().__init__(name="acts")
        self._begin, self._end = begin, end
        self.began_s = 0.0
        self.whole_s = 0.0
        self.error: Exception | None = None
        self.settle: Callable[[], float] = lambda: 0.0

    def run(self) -> None:
        self.began_s = time.monotonic()
        try:
            self._begin()
            if self._end is not None:
                time.sleep(max(0.0, self.began_s + LASTS_S - time.monotonic()))
                self._end()
            self.whole_s = self.settle()
        except Exception as exc:  # it belongs to whoever joins this thread
            self.error = exc


class Bench:
    """One swarm that meets one fault after the other."""

    def __init__(self, devices: Sequence[LabDevice], tokens: int = TOKENS) -> None:
        self.devices, self.tokens = list(devices), tokens
        self.asker = devices[0]
        self.havoc = Havoc(devices)
        self.settle()
        undisturbed = listen(self.asker, PROMPT, tokens)
        if not undisturbed.reason:
            raise demo.Failed(f"the undisturbed swarm did not answer: {undisturbed.error}")
        self.text = undisturbed.text
        self.short = listen(self.asker, PROMPT, SHORT_TOKENS).text

    @property
    def present(self) -> list[LabDevice]:
        return [device for device in self.devices if device.up]

    def settle(self) -> float:
        """Seconds until those that run know each other and agree on who serves what."""
        present = self.present
        return demo.wait_settled(list(present), len(present), time.monotonic())

    def owner(self) -> LabDevice:
        """Of the others, the one that the asked device can spare least: it alone holds most, or
        else it is called most."""
        names = self._nodes()
        before = self._calls()
        listen(self.asker, PROMPT, SHORT_TOKENS)
        after = self._calls()

        def dear(device: LabDevice) -> tuple[int, int]:
            me = names[device.name]
            return self.alone(device), after.get(me, 0) - before.get(me, 0)

        return max(self.present[1:], key=dear)

    def alone(self, device: LabDevice) -> int:
        """How many lots this device alone serves."""
        node = self.asker.status()["node"]
        serving = {
            name: {(run[0], run[1] + n) for run in runs for n in range(run[2])}
            for name, runs in node["owners"].items()
        }
        me = self._nodes()[device.name]
        rest = set().union(*(lots for name, lots in serving.items() if name != me))
        return len(serving.get(me, set()) - rest)

    def once(self) -> None:
        """Restart all until some other device is alone with some lots: after a takeover, those
        that were left may hold everything."""
        for _ in range(5):
            if any(self.alone(device) for device in self.devices[1:]):
                return
            for device in self.devices:
                device.kill()
            for device in self.devices:
                device.start()
            self.settle()
        raise demo.Failed("nobody is alone with any lot")

    def _nodes(self) -> dict[str, str]:
        return {m["name"]: m["node"] for m in self.asker.status()["node"]["members"]}

    def _calls(self) -> dict[str, int]:
        peers = self.asker.status()["engine"]["stats"]["peers"]
        return {name: stats["calls"] for name, stats in peers.items()}

    def twice(self) -> None:
        """Wait until every lot is served twice."""

        def served() -> bool:
            status = self.asker.status()
            if status is None:
                return False
            node = status["node"]
            return bool(
                sum(m["serving"] for m in node["members"]) >= 2 * node["routes"]["total"] > 0
            )

        wait(served, "every lot is served twice")
        self.settle()

    def row(
        self,
        fault: str,
        left: str,
        begin: Callable[[], None],
        end: Callable[[], None] | None = None,
    ) -> Row:
        """One answer with the fault in it. Prints the row. Raises demo.Failed when the fault did
        not happen, or when the swarm did not become whole again."""
        acts = Acts(begin, end)
        acts.settle = self.settle

        def then(pieces: int) -> None:
            if pieces == AT_PIECE:
                acts.start()

        with Stalls() as stalls:
            heard = listen(self.asker, PROMPT, self.tokens, then)
        if len(heard.at_s) < AT_PIECE:
            raise demo.Failed(f"{fault}: the answer ended before the fault: {heard.error}")
        acts.join()
        if acts.error is not None:
            raise demo.Failed(f"{fault}: {acts.error}") from acts.error
        same = heard.text == self.text and bool(heard.reason)
        at = sum(
            1
            for _ in takewhile(
                lambda pair: pair[0] == pair[1], zip(heard.text, self.text, strict=False)
            )
        )
        if left == "decoder":
            retry = listen(self.devices[1], PROMPT, self.tokens)
            same = not heard.reason and retry.text == self.text
            if retry.error:
                print(f"asked again elsewhere: {retry.error}", file=sys.stderr, flush=True)
        afterwards = all(listen(d, PROMPT, SHORT_TOKENS).text == self.short for d in self.present)
        row = Row(fault, left, heard, acts.whole_s, same, at, afterwards, acts.began_s)
        if stalls.longest_s > STALL_S:
            row.fault += f" (the machine stood still for {stalls.longest_s:.1f} s)"
        print(row, flush=True)
        return row

    def lasting(self, kind: str, victim: str, other: str = "") -> Disaster:
        return Disaster(kind, victim, other, 0.0, LASTS_S)

    def disaster(self, fault: str, left: str, kind: str, victim: str, other: str = "") -> Row:
        what = self.lasting(kind, victim, other)
        return self.row(fault, left, lambda: self.havoc.begin(what), lambda: self.havoc.end(what))


def wait(check: Callable[[], object], what: str, timeout_s: float = SETTLE_S_MAX) -> None:
    """Until `check` is true. Raises demo.Failed when that takes too long."""
    end = time.monotonic() + timeout_s
    while not check():
        if time.monotonic() > end:
            raise demo.Failed(f"it did not happen within {timeout_s:.0f} s that {what}")
        time.sleep(0.02)


def budget_mb(share: float) -> int:
    """Megabytes for the trunk and that share of all experts, rounded up to a layer."""
    manifest = Store(default_store()).manifest(demo.MODEL)
    layer_bytes = manifest.shape.experts * manifest.demand().lot_bytes
    layers = math.ceil(manifest.shape.layers * share)
    return math.ceil((manifest.trunk_bytes + layers * layer_bytes) / 1e6)
