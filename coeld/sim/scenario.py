"""One life of a simulated swarm: it forms, rests, hears news, suffers, heals, and is judged. Pure.

Safety is checked at every effect of every device, also while everything goes wrong; liveness when
all faults have ended and the swarm has had time: the same view everywhere, routes that agree,
everything covered, silence. What is measured at rest and for news is measured on the network that
the user asked for, lossy if it is to be lossy, but before crashes and partitions begin.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from coeld.events import EngineStarted
from coeld.node import NodeConfig
from coeld.sim import checkers
from coeld.sim.device import Device, Spec
from coeld.sim.faults import Faults
from coeld.sim.observe import EXCUSED_S, Observer, Sample, all_met, moves, quantile, same_view
from coeld.sim.world import MODEL, World

INTRODUCTIONS = 3
"""Others that a device finds when it starts, as mDNS shows some."""
STARTS_PER_S = 100
WARM_S = 0.5
FORM_S_MAX = 120.0
SETTLE_S = 6.0
"""Without a move: the auction has settled."""
SETTLE_S_MAX = 120.0
REST_S = 10.0
NEWS = 5
BACK_S = 20.0
NOTICE_S = 8.0
HEAL_S_MAX = 120.0
CODEC_NODES_MAX = 100
"""Up to this size every message is decoded as well; above, only encoded."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to simulate. `engines` devices run a model with 240 lots, two copies of which fit."""

    nodes: int
    seed: int
    faults: Faults
    minutes: float = 1.0
    engines: int | None = None
    acquainted: bool = False
    """Begin with devices that have just been told of each other: forming costs the most time."""
    config: NodeConfig | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """`figures` are plain values; None where nothing was there to be measured."""

    figures: dict[str, Any]
    samples: list[Sample]
    marks: list[tuple[float, str]]
    """What began, and when."""
    crashes: list[float]
    violations: list[str]


def simulate(plan: Plan, progress: Callable[[str], None] = lambda text: None) -> Outcome:
    """Run it to the end. A broken promise ends it early and is named in `violations`."""
    return _Run(plan, progress).outcome()


class _Run:
    def __init__(self, plan: Plan, progress: Callable[[str], None]) -> None:
        self.plan, self.faults, self.progress = plan, plan.faults, progress
        self.rng = Random(f"scenario/{plan.seed}")
        engines = plan.engines if plan.engines is not None else min(plan.nodes // 2, 16)
        lots = 2 * len(MODEL.lots()) // max(1, engines) + MODEL.experts
        budget = MODEL.trunk_bytes + lots * MODEL.lot_bytes
        specs = [Spec(budget, engine=index < engines) for index in range(plan.nodes)]
        codec = plan.nodes <= CODEC_NODES_MAX
        self.world = World(plan.seed, specs, config=plan.config, seeds=(), codec=codec)
        self.world.introductions = min(INTRODUCTIONS, plan.nodes - 1)
        self.began = self.world.now
        self.observer = Observer(self.world)
        checkers.watch(self.world)
        self.figures: dict[str, Any] = {"nodes": plan.nodes, "seed": plan.seed}

    def outcome(self) -> Outcome:
        violations = []
        try:
            for part in (self._form, self._rest, self._news, self._suffer, self._heal):
                part()
        except AssertionError as exc:
            violations.append(f"{exc} ({self.world.now - self.began:.1f} s after the start)")
        self._count()
        self.figures["violations"] = violations
        self.figures["trace_sha256"] = self.world.fingerprint()
        observer = self.observer
        crashes = [death.at - self.began for death in observer.deaths]
        return Outcome(self.figures, observer.samples, observer.marks, crashes, violations)

    def _begin(self, what: str) -> None:
        self.observer.mark(what)
        self.progress(what)

    def _form(self) -> None:
        self._begin("form")
        self.faults.skew_clocks(self.world, self.rng)
        self.faults.begin(self.world, self.rng)
        start = self.world.now
        if self.plan.acquainted:
            self.world.introductions = 0
            self.world.start_all(WARM_S / 2)
            self.observer.run(WARM_S)
            self.world.acquaint()
        else:
            self.world.start_all(max(0.3, self.plan.nodes / STARTS_PER_S))
        formed = self.observer.run(FORM_S_MAX, lambda: all_met(self.world))
        assert formed, f"not everybody knows everybody {FORM_S_MAX:.0f} s after the first start"
        if not self.plan.acquainted:
            self.figures["form_s"] = round(self.world.now - start, 2)
            self.figures["form_bytes_per_node"] = self._sent() // self.plan.nodes

    def _rest(self) -> None:
        self._begin("rest")
        start = self.world.now
        loaded = -1
        while moves(self.world) > loaded or not same_view(self.world):
            assert self.world.now - start < SETTLE_S_MAX, "lots still move although nothing happens"
            loaded = moves(self.world)
            self.observer.run(SETTLE_S)
        self.figures["settle_s"] = round(self.world.now - start - SETTLE_S, 2)
        before = {id: device.sent_bytes for id, device in self.world.devices.items()}
        messages = sum(device.sent_messages for device in self.world.devices.values())
        self.observer.run(REST_S)
        devices = self.world.devices.values()
        rates = [(device.sent_bytes - before[device.id]) / REST_S for device in devices]
        messages = sum(device.sent_messages for device in devices) - messages
        self.figures["bytes_per_node_s"] = round(sum(rates) / len(rates))
        self.figures["bytes_per_node_s_max"] = round(max(rates))
        self.figures["messages_per_node_s"] = round(messages / REST_S / len(rates), 2)
        self.figures["moves_at_rest"] = moves(self.world) - loaded
        checkers.no_storm(self.world, messages / REST_S / len(rates))

    def _news(self) -> None:
        """Devices without a model tell of a new address, which everybody wants to know."""
        self._begin("news")
        quiet = [d for d in self.world.up() if not d.spec.engine]
        for number in range(NEWS if quiet else 0):
            device = self.rng.choice(quiet)
            self.world.feed(device, EngineStarted(None, f"{device.id}.local", 9001 + number))
            self.observer.follow(device)
            assert self.observer.run(10, self._told), "news did not reach everybody in 10 s"
        hops = [max(news.hops.values()) for news in self.observer.news]
        spread_s = [news.last_at - news.at for news in self.observer.news]
        self.figures["rounds_to_all"] = max(hops, default=None)
        self.figures["news_s_p50"] = _rounded(quantile(spread_s, 0.5))
        self.figures["news_s_max"] = _rounded(max(spread_s, default=None))

    def _told(self) -> bool:
        return len(self.observer.news[-1].hops) == self.plan.nodes

    def _suffer(self) -> None:
        self._begin("trouble")
        loaded = moves(self.world)
        third_s = self.plan.minutes * 60 / 3
        self._crashes(third_s)
        if self.faults.partition or self.faults.asym:
            self._begin("cut")
            self.observer.excused_until = float("inf")
            self.faults.cut(self.world, self.rng)
            self.observer.run(third_s)
            self._begin("joined")
            self.world.split([])
            self.world.deafen([])
            self.observer.excused_until = self.world.now + EXCUSED_S
        else:
            self._crashes(third_s)
        self._crashes(third_s)
        self.figures["moves"] = moves(self.world) - loaded

    def _crashes(self, for_s: float) -> None:
        """That many crashes at random moments; whoever crashed is back after a while."""
        end = self.world.now + for_s
        expected = self.faults.crash * for_s / 60
        count = int(expected) + (self.rng.random() < expected % 1)
        last = max(self.world.now, end - NOTICE_S)  # what comes next does not blur who noticed
        for at in sorted(self.rng.uniform(self.world.now, last) for _ in range(count)):
            self.observer.run(at - self.world.now)
            up = self.world.up()
            if 2 * len(up) <= self.plan.nodes:
                continue  # a swarm of which half is down has trouble enough
            device = self.rng.choice(up)
            self.observer.crash(device, silent=len(self.observer.deaths) % 2 == 0)
            self.world.after(BACK_S, self._back, device)
        self.observer.run(end - self.world.now)

    def _back(self, device: Device) -> None:
        if device.node is None:
            self.world.start(device)

    def _heal(self) -> None:
        self._begin("heal")
        self.faults.end(self.world)
        for device in self.world.devices.values():
            self._back(device)
        start = self.world.now
        self.observer.run(HEAL_S_MAX, lambda: same_view(self.world) and self._covered())
        assert same_view(self.world), f"views differ {HEAL_S_MAX:.0f} s after healing"
        assert self._covered(), f"lots without an owner {HEAL_S_MAX:.0f} s after healing"
        self.figures["heal_s"] = round(self.world.now - start, 2)
        self.observer.run(SETTLE_S + REST_S)
        checkers.same_knowledge(self.world)
        if any(device.spec.engine for device in self.world.devices.values()):
            checkers.at_rest(self.world)

    def _covered(self) -> bool:
        return checkers.covered(self.world)

    def _sent(self) -> int:
        return sum(device.sent_bytes for device in self.world.devices.values())

    def _count(self) -> None:
        observer, silent = self.observer, [d for d in self.observer.deaths if d.silent]
        spoken = [death for death in observer.deaths if not death.silent]
        for name, deaths in (("detect", silent), ("detect_reset", spoken)):
            everywhere = [death.all_s for death in deaths if death.all_s is not None]
            self.figures[f"{name}_s_p50"] = _rounded(quantile(everywhere, 0.5))
            self.figures[f"{name}_s_p99"] = _rounded(quantile(everywhere, 0.99))
        first = [death.first_s for death in silent if death.first_s is not None]
        self.figures["detect_first_s_p50"] = _rounded(quantile(first, 0.5))
        self.figures["crashes"] = len(observer.deaths)
        self.figures["false_dead"] = len(observer.false_dead)
        self.figures["false_suspects"] = len(observer.false_suspects)
        self.figures["bytes_sent_per_node"] = self._sent() // self.plan.nodes
        self.figures["virtual_s"] = round(self.world.now - self.began, 1)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
