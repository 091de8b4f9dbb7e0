"""The decision core of one device: what happened in, what to do out. Pure; holds no policy.

`step` carries facts through the stages in order: perception merges what was heard and tells who
is there; deployment bids for lots; update turns wins into loads and drops and publishes the route
table. (Compression works in the data path.) The same code runs in the daemon and in the
simulator: the same events at the same times with the same Random give the same effects.
"""

from collections.abc import Collection, Mapping
from functools import partial
from random import Random
from typing import Any

from coeld.deployment.auction import Offer, Task, bundle
from coeld.deployment.cost import LAN
from coeld.deployment.own_spans import OwnSpans, whole_layers
from coeld.deployment.placement import serving, unclaimed
from coeld.deployment.pricing import bids
from coeld.deployment.proposal import Deliberation, Facts, is_whole
from coeld.deployment.replicas import replicas
from coeld.deployment.room import Room, fitting
from coeld.deployment.supply import trunk_complaint
from coeld.deployment.widths import Widths, rest_s
from coeld.effects import DropLots, Effect, LoadLots, OpenModel, Report, SwapRoutes
from coeld.events import (
    BrokersReached,
    CallFailed,
    Drained,
    EngineStarted,
    EngineStopped,
    Event,
    LinksMeasured,
    LoadFailed,
    LotsDropped,
    LotsLoaded,
    MessageReceived,
    NeighbourLost,
    ReleaseFound,
    ResourcesSampled,
    Tick,
    Used,
)
from coeld.ids import Lot, ModelHash, NodeId
from coeld.messages import Claim
from coeld.node_config import NodeConfig
from coeld.node_market import Market
from coeld.node_status import counters, describe
from coeld.perception.asking import Asking
from coeld.perception.gossip import holders, releases
from coeld.perception.link_news import LinkNews
from coeld.perception.perceive import Perception
from coeld.perception.resources import Told
from coeld.releases import Release
from coeld.routes import RouteTable
from coeld.update.disk import Wanted, wanted
from coeld.update.migration import READ, LotState, Migration, Move, Plan, Wish
from coeld.update.rollout import Rollout
from coeld.update.spanning import OPEN_S, Spanning, ranges
from coeld.update.switchover import Switchover
from coeld.update.worth import worth_moving
from coeld.view import ModelDemand

__all__ = ["Node", "NodeConfig"]


class Node:
    """One device. Feed it events with a monotonic clock; do what it returns, in that order."""

    def __init__(self, node_id: NodeId, incarnation: int, config: NodeConfig, rng: Random) -> None:
        self.node_id = node_id
        self.config = config
        self.perception = Perception(node_id, incarnation, config, rng)
        self.market = Market(self.perception, config)
        self.told = Told()
        self.asking = Asking()
        self.links = LinkNews(*LAN)
        self.migration = Migration(config.load_batch_bytes, OPEN_S if config.spans else 0.0)
        self.switchover = Switchover(node_id)
        self.spanning = Spanning()
        self.widths = Widths()
        self.rollout = Rollout(config.drain_ms / 1000, config.settle_ms / 1000)
        self.own_spans = OwnSpans(node_id)
        self.demand: ModelDemand | None = None
        self.stale_reports = 0
        """Reports of the engine about lots that were in no such state: of an engine before."""
        self._lots: list[Lot] = []
        self._facts: Facts | None = None
        self._facts_at = float("-inf")
        """Since when they are so: devices come and go together, and thinking takes long."""
        self._thinking: Deliberation | None = None
        self._considered: object = None
        """What was served and held when bids were last worked out; None: work them out."""
        self._wanted: Mapping[Lot, NodeId] = {}
        self._before: Mapping[Lot, NodeId] = {}
        """What was served when that became the wish."""
        self._bids: dict[Lot, int] = {}
        self._most = 0
        """Lots to claim at most."""
        self._whole = True
        self._missing_bytes = 0
        self._bid_wanted = True
        self._bid_at = 0.0
        self._joined_at = float("-inf")
        self._barred: set[Lot] = set()
        self._seen_supply = self._seen_marks = self._bid_supply = -1
        self._planned_at = float("-inf")
        self._left = False
        self._due = self._now = float("-inf")
        self._set_back_s = 0.0
        """How far the clock has been set back altogether."""
        self._stepped = (-1, -1, -1)
        self._out: list[Effect] = []

    # ---- in and out ------------------------------------------------------------------------

    @property
    def deadline(self) -> float:
        """When the next Tick is due, on the clock that `step` is given."""
        return self._due - self._set_back_s

    def step(self, event: Event, now: float) -> list[Effect]:
        """What to do about `event`; `now` in seconds. If it goes back, time stood still."""
        if self._left:
            return []
        self._set_back_s = max(self._set_back_s, self._now - now)
        reached = self._due if now >= self.deadline else self._now  # whatever sums round to
        now = self._now = max(now + self._set_back_s, reached)
        if now >= self._due > float("-inf"):
            self.perception.membership.woke(now - self._due, now)
        self._absorb(event, now)
        if isinstance(event, Used) or now >= self.asking.due:
            self._tell_asked(now)
        if isinstance(event, MessageReceived) and self._unmoved(now):
            return []
        self.perception.tick(now)
        self._bid(now)
        self._plan(now)
        self._roll(now)
        self._out += self.perception.flush(now)
        out, self._out = self._out, []
        self._due = self._next_due()
        self._stepped = self._versions()
        return out

    def leave(self) -> list[Effect]:
        """A clean goodbye; afterwards the node does nothing any more."""
        self._left = True
        return self.perception.leave()

    def still_needed(self) -> bool:
        """For one about to leave: does nobody else serve some lot yet, though others have room?"""
        if self.demand is None or not self._room().others_suffice:
            return False
        return not self.market.taken_over(self.migration.serving)[0] >= {*self.migration.serving}

    def holders(self) -> list[tuple[ModelHash, str, int]]:
        """Which model the other devices have, and where each serves its blobs."""
        return holders(r for r in self.perception.present() if r.origin != self.node_id)

    def releases(self, name: str) -> list[tuple[Release, str, int]]:
        """Which versions of a model the other devices have, and where each serves its blobs."""
        return releases((r for r in self.perception.present() if r.origin != self.node_id), name)

    def wanted_on_disk(self) -> Wanted:
        """Which lots this device's disk is needed for, and on how many other disks they are."""
        ours = [*self.migration.serving, *self.migration.loading]
        records, suspects = self.market.records(), self.perception.suspects()
        return wanted(ours, records, suspects, self.config.blob_host)

    def status(self) -> dict[str, Any]:
        """A plain JSON value: devices, model, routes, owners, counters of what was ignored."""
        switch, counted = self.switchover, counters(self.perception, self.stale_reports)
        return describe(self.perception, self.demand, switch.table, switch.fingerprint, counted)

    def _next_due(self) -> float:
        outdated = self._bid_wanted or self._bid_supply != self.perception.supply
        bid_at = self._bid_at if outdated else float("inf")
        timers = [at for at in self._timers() if at > self._planned_at]
        due = bid_at, self.migration.retry_at(self._planned_at), self.asking.due, self.rollout.due
        return min(self.perception.due, *due, *timers)

    def _versions(self) -> tuple[int, int, int]:
        return self.perception.market, self.perception.supply, self.perception.marks

    def _unmoved(self, now: float) -> bool:
        """Has a message changed nothing? Most do not: then no stage needs to look."""
        return (
            now < self._due <= self.perception.due
            and self.perception.silent
            and self._versions() == self._stepped
        )

    # ---- the stages ------------------------------------------------------------------------

    def _absorb(self, event: Event, now: float) -> None:
        match event:
            case Tick():
                pass
            case MessageReceived(sender, message):
                self.perception.hear(sender, message, now)
            case NeighbourLost(node):
                self.perception.lost(node, now)
            case BrokersReached(reached):
                self.perception.membership.listen(reached, now)
            case CallFailed(node):
                self.perception.membership.suspect(node, now)
            case ResourcesSampled(resources):
                if self.told.sample(resources, now):
                    self._tell(**self.told.facts())
            case LinksMeasured(links):
                if self.links.measured(links, [r.origin for r in self.market.records()]):
                    self._tell(links=self.links.told, probed=self.links.probed)
            case EngineStarted():
                self._engine_started(event, now)
            case EngineStopped():
                self._engine_lost()
                self._tell_gone(data_host="", data_port=0)
            case LotsLoaded(lots):
                self._moved(Move.LOADED, lots, READ)
            case LotsDropped(lots):
                self._moved(Move.DROPPED, lots, (LotState.DRAINING,))
            case LoadFailed(lots, why):
                self._load_failed(lots, why, now)
            case ReleaseFound(demand, progress):
                self.rollout.found(demand, progress)
            case Drained():
                self.rollout.drained()
            case Used():
                self.asking.count(event, now)

    def _bid(self, now: float) -> None:
        """Deployment: claim the best lots that nobody else bids more for."""
        if (barred := self.migration.barred(now)) != self._barred:
            self._barred, self._bid_wanted = barred, True
        if self.market.moved(now) or self.perception.supply != self._bid_supply:
            self._bid_wanted = True
        if not self._bid_wanted or now < self._bid_at:
            return
        me = self.perception.me
        if self.demand is not None and me.model == self.demand.model:
            if not self._deliberate(self.demand, now):
                self.market.disturb(now)
                return
            self.perception.tell(claims=self._bundle(self.market.rivals()))
            self.market.moved(now)
        self._bid_wanted = False
        self._bid_supply = self.perception.supply
        self._bid_at = now + self.config.round_ms / 1000

    def _deliberate(self, demand: ModelDemand, now: float) -> bool:
        """Think a little about where everything should be; True when bids follow from it.

        While lots are where they were or where they are wanted, the wish stays: it is being carried
        out, and what is left of its gain may be less than a new wish would have to have.
        """
        records = self.market.records()
        facts = self.market.facts_after(self._facts)
        if self._facts != facts:
            self._facts, self._facts_at, self._thinking = facts, now, None
        if self._thinking is None:
            quiet_s = self.config.quiet_ms / 1000
            self._bid_at = self._facts_at + rest_s(facts.narrow, records, quiet_s)
            if now < self._bid_at:
                return False
            self._thinking, self._considered = Deliberation(facts), None
            self._touch()  # what is worth to be a span may have changed
        if not self._thinking.advance():
            return False
        served, held = serving(records, self.market.winners()), self._held(demand)
        if self._considered != (served, held):
            fresh = self._considered is None
            self._considered = (served, held)
            if fresh or served.items() - self._wanted.items() - self._before.items():
                self._before = served
                wanted = self._wanted = self._owners_wanted(served, demand.lot_bytes)
                self._whole = not wanted or is_whole(wanted)
            model = self._thinking.model
            copied = replicas(model, self._wanted, records, self.config.replicas_max)
            mine = copied.get(self.node_id, ())
            self._bids = bids(model, self.node_id, self._wanted, held, mine)
            self._most = self._room().most(model, self._wanted)
        return True

    def _held(self, demand: ModelDemand) -> set[Lot]:
        """Lots that are here to stay: of layers that are here whole, if layers are kept whole."""
        kept = self.migration.kept
        if not self._whole:
            return kept
        return {lot for layer in whole_layers(demand, kept) for lot in demand.lots_of(layer)}

    def _owners_wanted(self, served: Mapping[Lot, NodeId], lot_bytes: int) -> Mapping[Lot, NodeId]:
        """The best placement, or the present one if moving there does not pay."""
        assert self._thinking is not None
        fresh = self._thinking.fresh(served)
        kept = self._thinking.kept(served, fresh) if fresh else None
        if fresh is None or kept is None:
            return fresh.owners if fresh else {}
        moved = sum(kept.owners[lot] != node for lot, node in fresh.owners.items())
        pays = worth_moving(kept.price_ns, fresh.price_ns, moved * lot_bytes)
        return (fresh if pays else kept).owners

    def _bundle(self, rivals: Mapping[Task, Offer]) -> tuple[Claim, ...]:
        """No replicas while something is held in fewer bits: a lot has one width."""
        room = self._room()
        narrow = room.narrow or any(record.narrow for record in room.records)
        return bundle(
            self.node_id,
            self._lots,
            self._bids.__getitem__,
            rivals,
            room.claimable(self._most, self._whole),
            1 if narrow or self.perception.me.sparing else self.config.replicas_max,
            self._barred,
        )

    def _plan(self, now: float) -> None:
        """Update: load what was won, drop what is no longer needed, publish the routes."""
        perception = self.perception
        before, self._planned_at = self._planned_at, now
        if self.demand is None:
            return
        timed = any(before < at <= now for at in self._timers())
        if perception.supply == self._seen_supply and not timed:
            if perception.marks != self._seen_marks:
                self._swap(self.switchover.agree(self.demand, perception.present()))
                self._close(self.demand)
            return
        joined = now >= self._joined_at
        urgent, settled = (joined and now >= at for at in self._rests()[:2])
        plan = Plan()
        if perception.me.model is not None:
            wish = self._wish(self.demand, urgent, settled, now)
            plan = self.migration.plan(wish, *self.demand.sizes)
            self._bid_wanted |= bool(plan.load or plan.drop)
            self._serve(self.demand, now, urgent and not self.migration.busy)
        self._switch(self.demand, settled and self.market.complete)
        self._close(self.demand)
        if plan.drop:
            self._out.append(DropLots(plan.drop))
        if plan.load:
            self._out.append(LoadLots(plan.load, plan.narrow))
        self._seen_supply = perception.supply

    def _wish(self, demand: ModelDemand, urgent: bool, settled: bool, now: float) -> Wish:
        room, held = self._room(), self.migration.narrow_layers
        mine = self.market.won()
        narrow = self.widths.want(demand, mine, room.beside_trunk_bytes, held, now)
        sizes = room.capacity_bytes, room.fill_bytes(self._most, self._whole)
        there, gone = self.market.taken_over(self.migration.serving)
        moving = settled and self.rollout.serving
        return Wish(mine, there, *sizes, urgent, moving, narrow, now, gone)

    def _serve(self, demand: ModelDemand, now: float, rests: bool) -> None:
        """Tell what is served, and which layers of it as spans, anew when the auction `rests` and
        nothing loads: what was loaded in an emergency is announced with it."""
        perception, spanning = self.perception, self.spanning
        narrow = ranges(self.migration.narrow_layers | self.widths.narrow)
        perception.tell(serving=self.migration.serving, narrow=narrow)
        wanted: Collection[int] = spanning.announced
        borders: Collection[int] = spanning.borders
        if rests and self._thinking is not None:
            facts, winners = self._thinking.facts, self.market.winners()
            held_bytes, now_spans = self.migration.bytes(*demand.sizes), spanning.announced
            records = self.market.records()
            wanted = self.own_spans.wanted(facts, records, winners, now_spans, held_bytes)
            borders = self.own_spans.borders(winners)
        supply, whole = perception.supply, self.migration.staying(demand.experts)
        perception.tell(spans=spanning.want(wanted, whole, now, borders))
        if self._bid_supply == supply:  # no bid depends on spans
            self._bid_supply = perception.supply

    def _close(self, demand: ModelDemand) -> None:
        """Once all know what is announced here, single calls for it need no answer any more."""
        if self.switchover.agreed(self.market.records()) and self.spanning.agreed():
            self._switch(demand, False)

    def _switch(self, demand: ModelDemand, settled: bool) -> None:
        missing = self._room().missing_bytes(len(unclaimed(self._lots, self.market.leaders())))
        self._missing_bytes = missing if settled else min(missing, self._missing_bytes)
        records, suspects = self.perception.present(), self.perception.suspects()
        here = self.migration.staying(demand.experts)
        self._swap(
            self.switchover.update(
                demand,
                records,
                suspects,
                self.market.winners(),
                self._missing_bytes,
                self.spanning.closed_spans,
                partial(self.own_spans.legs, demand, records, suspects, here),
            )
        )

    def _swap(self, table: RouteTable | None) -> None:
        if table is not None:
            self._out.append(SwapRoutes(table))
            fingerprint = self.switchover.fingerprint
            self.perception.tell(urgent=False, epoch=table.epoch, fingerprint=fingerprint)
        self._seen_marks = self.perception.marks

    def _roll(self, now: float) -> None:
        """Update: go over to a newer version of the model when it is this device's turn."""
        perception, rollout = self.perception, self.rollout
        idle = self.migration.rests
        rests = idle and now >= self._rests()[1]
        if not rollout.unchanged((self._versions(), idle, rests), now):
            records, suspects = perception.present(), perception.suspects()
            fits, me = fitting(records), self.node_id
            effects = rollout.step(records, suspects, fits, me, idle, rests, now)
            if any(isinstance(effect, OpenModel) for effect in effects):
                self._engine_lost()
            self._out += effects
            if rollout.leaving:
                self._tell_gone()
            elif self.demand and perception.me.data_port:  # perhaps it came back
                perception.tell(model=self.demand.model)
        perception.tell(versions=rollout.versions)

    def _tell_gone(self, **address: Any) -> None:
        """Nobody can call this device's engine any more; or, with its address, should do so."""
        gone: dict[str, Any] = dict.fromkeys(("claims", "serving", "spans", "narrow"), ())
        self.perception.tell(model=None, **address, **gone)

    # ---- events in detail ------------------------------------------------------------------

    def _engine_lost(self) -> None:
        """Nothing is in memory any more."""
        self.migration.engine_lost()
        self.spanning, self.widths = Spanning(), Widths()

    def _engine_started(self, event: EngineStarted, now: float) -> None:
        self._engine_lost()
        self._out += self.rollout.opened(event.demand)
        self.switchover.forget()
        self.demand = self.market.demand = event.demand
        self._lots = event.demand.lots() if event.demand else []
        self._facts = self._thinking = None
        self._joined_at = now + self.config.join_ms / 1000
        self._bid_wanted = True
        self._missing_bytes = 0
        complaint = trunk_complaint(event.demand, self.perception.me.memory_budget_bytes)
        self._out += [Report(complaint)] if complaint else []
        model = event.demand.model if event.demand else None
        if self.asking.model != model:
            self.asking = Asking(model, event.demand.prior if event.demand else ())
        self.perception.tell(
            model=model,
            asked=self.asking.told,
            data_host=event.data_host,
            data_port=event.data_port,
            claims=(),
            serving=(),
            spans=(),
            narrow=(),
        )
        self._touch()

    def _tell(self, **facts: Any) -> None:
        """Something measured of this device matters now."""
        self._bid_wanted = True
        self._touch()
        self.perception.tell(urgent=False, **facts)

    def _tell_asked(self, now: float) -> None:
        asked = self.asking.news(not self._whole, now)
        if asked is not None:
            self.perception.tell(urgent=False, asked=asked)

    def _moved(self, move: Move, lots: tuple[Lot, ...], before: Collection[LotState]) -> None:
        known = [lot for lot in lots if self.migration.state(lot) in before]
        self.stale_reports += len(lots) - len(known)
        self.migration.apply(move, known)
        self._bid_wanted |= move is not Move.DROPPED
        self._touch()

    def _load_failed(self, lots: tuple[Lot, ...], why: str, now: float) -> None:
        known = [lot for lot in lots if self.migration.state(lot) in READ]
        self.stale_reports += len(lots) - len(known)
        wait_s = self.migration.failed(known, now, why)
        self._bid_wanted = True
        self._touch()
        if known:
            text = f"{len(known)} lots could not be loaded ({why}): others may take them,"
            self._out.append(Report(f"{text} next attempt here in {wait_s:.0f} s"))

    # ---- views -----------------------------------------------------------------------------

    def _touch(self) -> None:
        """Something of our own changed: plan again in this step."""
        self._seen_supply = -1

    def _rests(self) -> tuple[float, float, float]:
        """When the auction counts as quiet, as settled, and when joining is over."""
        return *self.market.rests(), self._joined_at

    def _timers(self) -> tuple[float, ...]:
        return (*self._rests(), self.spanning.due, self.widths.due, self.migration.due)

    def _room(self) -> Room:
        return self.market.room(self._facts is not None and self._facts.narrow)
