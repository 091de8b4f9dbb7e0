"""How a model would run on these devices: where everything goes, how fast, and what limits it.

The market's own placement and cost model, on figures from profiles instead of measurements. What a
change would bring is worked out by making it and placing again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from coeld.deployment import chains
from coeld.deployment.cost import CostModel, Device, Share, Tier, kv_cache_bytes
from coeld.deployment.proposal import Deliberation, Facts, is_whole, shares_of
from coeld.deployment.widths import must_narrow, narrow_layers
from coeld.ids import Lot, NodeId
from coeld.planning.fleet import Machine, link_between
from coeld.planning.shape import WIDTHS, Shape
from coeld.view import ModelDemand

REQUESTS: Final = 1
"""Answers at a time that a plan leaves memory for."""


@dataclass(frozen=True, slots=True)
class Part:
    """Where a token's time goes."""

    what: str
    us: int
    arithmetic: str


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a fleet would do with a model. Times are of the device that answers fastest."""

    demand: ModelDemand
    machines: tuple[Machine, ...]
    missing_bytes: int
    """0: it fits."""
    owners: Mapping[Lot, int]
    """Index of the machine that holds each lot."""
    whole: bool
    narrow: frozenset[int] = frozenset()
    """Layers that are held in fewer bits than stored, because the rest would not fit."""
    asker: int = 0
    legs: tuple[chains.Run, ...] = ()
    """The way of a token: layers and the machine whose part they are, the asker's or a span's."""
    token_us: int = 0
    prefill_us: int = 0
    parts: tuple[Part, ...] = ()
    slowest: str = ""
    """The device that a token waits for longest, and how long."""

    @property
    def tokens_per_s(self) -> float:
        return 1e6 / self.token_us if self.token_us else 0.0


def choose_width(
    shape: Shape, machines: Sequence[Machine], context_tokens: int, trunk_bits: int
) -> int:
    """The widest experts that fit; the narrowest width there is if none do."""
    for bits in WIDTHS:
        demand = shape.demand(bits, trunk_bits)
        if lacking(demand, machines, context_tokens) == 0:
            return bits
    return WIDTHS[-1]


def rooms_bytes(demand: ModelDemand, machines: Sequence[Machine], context_tokens: int) -> list[int]:
    """For lots at each device, beside trunk and KV cache."""
    cache = kv_cache_bytes(demand, context_tokens, REQUESTS)
    return [max(0, m.budget_bytes - demand.trunk_bytes - cache * m.asks) for m in machines]


def rooms(demand: ModelDemand, machines: Sequence[Machine], context_tokens: int) -> list[int]:
    """Lots that fit at each device."""
    return [room // demand.lot_bytes for room in rooms_bytes(demand, machines, context_tokens)]


def lacking(demand: ModelDemand, machines: Sequence[Machine], context_tokens: int) -> int:
    """Bytes of memory that are missing for all lots."""
    short = demand.layers * demand.experts - sum(rooms(demand, machines, context_tokens))
    return max(0, short) * demand.lot_bytes


def enough_each(demand: ModelDemand, machines: Sequence[Machine], context_tokens: int) -> int:
    """Bytes that every device would have to give, were they to share the lots equally."""
    lots = -(-demand.layers * demand.experts // len(machines))
    cache = kv_cache_bytes(demand, context_tokens, REQUESTS)
    return demand.trunk_bytes + cache + lots * demand.lot_bytes


def forecast(
    demand: ModelDemand,
    machines: Sequence[Machine],
    prompt_tokens: int,
    context_tokens: int,
    split: bool,
    spans: bool = True,
) -> Forecast:
    """Place the model and say how it would run, with layers in parts or with `spans` as the
    configuration says.

    Memory is left for a KV cache of `context_tokens`; a token is timed after `prompt_tokens`.
    """
    spare = rooms_bytes(demand, machines, context_tokens)
    narrow = must_narrow(demand, spare)
    devices = tuple(
        Device(
            NodeId(f"{index:016x}"),
            (Tier("ram", room, m.kernel_mb_per_s, m.row_mb_per_s),),
            weight=int(m.asks),
            cut_us=m.cut_us,
        )
        for index, (m, room) in enumerate(zip(machines, spare, strict=True))
    )
    links = tuple(tuple(link_between(a, b) for b in machines) for a in machines)
    facts = Facts(demand, devices, links, split, spans, narrow)
    missing = 0 if narrow else lacking(demand, machines, context_tokens)
    thinking = Deliberation(facts)
    while not thinking.advance():
        pass
    found = thinking.fresh({})
    if missing or found is None:
        return Forecast(demand, tuple(machines), missing, {}, False)
    owners = {lot: int(node, 16) for lot, node in found.owners.items()}
    model = facts.model()
    layers = shares_of(model, owners)
    times = {a: chains.token_us(model, a, layers, prompt_tokens) for a in model.askers}
    asker = min(times, key=lambda a: (times[a], a))
    way = _Way(model, asker, layers, prompt_tokens)
    return Forecast(
        demand,
        tuple(machines),
        0,
        owners,
        is_whole(found.owners),
        _narrow(demand, owners, spare) if narrow else frozenset(),
        asker,
        tuple(way.legs),
        times[asker],
        chains.prefill_us(model, asker, layers, prompt_tokens),
        tuple(way.parts(times[asker])),
        way.slowest(machines),
    )


def _narrow(demand: ModelDemand, owners: Mapping[Lot, int], spare: Sequence[int]) -> frozenset[int]:
    """What each device would narrow of its layers."""
    chosen: set[int] = set()
    for index, room in enumerate(spare):
        mine = [lot for lot, owner in owners.items() if owner == index]
        chosen |= narrow_layers(demand, mine, room, ())
    return frozenset(chosen)


class _Way:
    """What a token at one asker is made of."""

    def __init__(
        self,
        model: CostModel,
        asker: int,
        layers: Sequence[Mapping[int, Share]],
        context_tokens: int,
    ) -> None:
        self.model, self.asker, self.layers, self.context = model, asker, layers, context_tokens
        self.legs = chains.legs(model, asker, layers, context_tokens)
        self.places = [leg.site for leg in self.legs for _ in range(leg.first, leg.stop)]
        """Where each layer's attention is."""
        free = CostModel(model.demand, model.devices, model.links, free_calls=True)
        pairs = zip(self.places, layers, strict=True)
        self.computing = [free.layer_ns(place, shares) for place, shares in pairs]

    def parts(self, token_us: int) -> list[Part]:
        """They add up to the token."""
        model, demand, context = self.model, self.model.demand, self.context
        attention = sum(map(model.attention_ns, self.places)) // 1000
        cached = sum(model.attention_ns(at, context) for at in self.places) // 1000 - attention
        head, computing = model.head_ns(self.asker) // 1000, sum(self.computing) // 1000
        read = demand.used * demand.lot_bytes * len(self.layers)
        home = sum(shares[self.asker].bytes_used for shares in self.layers if self.asker in shares)
        speed = self._speed(self.asker)
        speeds = ", ".join(dict.fromkeys(map(self._speed, self.places)))
        spans = sum(leg.site != self.asker for leg in self.legs)
        pairs = zip(self.places, self.layers, strict=True)
        cuts = sum(any(model.sites[site][0] != at for site in shares) for at, shares in pairs)
        return [
            Part(
                "attention and other trunk",
                attention,
                f"{model.attention_bytes * len(self.layers) / 1e6:,.0f} MB at {speeds}",
            ),
            Part(
                "KV cache",
                cached,
                f"{demand.kv_bytes_per_token * context / 1e6:,.0f} MB of {context} tokens"
                f" at {speeds}",
            ),
            Part("head", head, f"{demand.head_bytes / 1e6:,.0f} MB at {speed}"),
            Part(
                "experts",
                computing,
                f"{demand.used} of {demand.experts} in {len(self.layers)} layers: "
                f"{read / 1e6:,.0f} MB, {home // 10**4 // max(1, read)} % of it here; a layer in "
                "parts waits for its busiest device",
            ),
            Part(
                "calls to other devices",
                token_us - attention - cached - head - computing,
                f"{spans} for whole layers, {cuts} for a layer's experts: round trips, payload, "
                "work at both ends",
            ),
        ]

    def _speed(self, device: int) -> str:
        return f"{self.model.devices[device].tiers[0].mb_per_s / 1000:.1f} GB/s"

    def slowest(self, machines: Sequence[Machine]) -> str:
        """Each layer's experts count for the device that they wait for."""
        model, waits = self.model, [0] * len(machines)
        waits[self.asker] = model.head_ns(self.asker)
        for at, shares, computing in zip(self.places, self.layers, self.computing, strict=True):
            waits[at] += model.attention_ns(at, self.context)
            alone = {site: model.branch_ns(at, site, share) for site, share in shares.items()}
            waits[model.sites[max(alone, key=lambda s: (alone[s], s))][0]] += computing
        index = max(range(len(waits)), key=lambda i: (waits[i], -i))
        return f"a token waits {waits[index] / 1e6:.1f} ms for {machines[index].name}"


def limit(found: Forecast) -> str:
    """What the time per token depends on most."""
    part = max(found.parts, key=lambda part: part.us)
    if part.what == "calls to other devices":
        kinds = sorted({m.link_kind for m in found.machines})
        return f"calls to other devices: the network ({', '.join(kinds)}) and the work for a call"
    return f"memory speed, most of it for {part.what}: {found.slowest}"


def changes(
    found: Forecast, prompt_tokens: int, context_tokens: int, split: bool, spans: bool = True
) -> list[tuple[str, Forecast]]:
    """What one more device, a wired network, or splitting layers would bring."""
    last = found.machines[-1]
    another = replace(last, name=f"another {last.profile}", node=None, links=())
    more = (*found.machines, another)
    tried = [(f"one more {last.profile}", more, split)]
    if any(machine.link == "wifi" for machine in found.machines):
        wired = tuple(replace(machine, link="ethernet") for machine in found.machines)
        tried.append(("cables instead of Wi-Fi", wired, split))
    if any(machine.links for machine in found.machines):
        wired = tuple(replace(machine, links=()) for machine in found.machines)
        tried.append(("gigabit Ethernet instead of the measured links", wired, split))
    if not split and found.whole:
        tried.append(("splitting layers over devices (--split)", found.machines, True))
    return [
        (what, forecast(found.demand, machines, prompt_tokens, context_tokens, parts, spans))
        for what, machines, parts in tried
    ]
