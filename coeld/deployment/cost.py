"""What a token costs, given who owns what: the one cost model of bids, plans and predictions. Pure.

Everything is an integer; times are nanoseconds inside, because thousands of small parts add up,
and microseconds at the edge. A megabyte per second is a byte per microsecond.

**A lot.** Decoding reads each weight once per token, so a lot of `bytes` costs bytes / speed; with
several rows the arithmetic may take longer (the roofline model: Williams, Waterman, Patterson,
CACM 2009): max(bytes / speed, rows × bytes / row speed).

**A branch.** The lots of a layer that one device holds. Reaching it costs nothing at home (one
more graph call if the layer is cut) and round trip + queue + graph calls + payload / bandwidth
elsewhere; each row travels once and one sum comes back, whatever the number of lots.

**A layer** costs the maximum over its branches. A router calls a random k of E lots, and the
expected maximum is more than the maximum of expectations: eight lots over four devices are two
each, yet the busiest has three or four. With s a branch's share of what the layer is used for, a
set of branches with share s is not called with probability void(s) = Π_{i<k} (1 − sE/(E−i)), exact
for equally popular lots (hypergeometric); a branch that is called has, on average, k·s / (1 −
void(s)) lots to run, and the more branches may be the slowest, the more standard deviations it
counts above that (Clark, 1961, does so for normals). Sorted by what they cost when called, the
layer is Σ cost_i × P(i is called and none before it is). Against 1,500 layers simulated draw by
draw the error is 1.8 % on average and under 7 % in 95 of 100; docs/log.md.

**A cut** is paid where some of the layer is elsewhere, so a layer that is wholly here saves it.
Consecutive whole layers of another device may be run there in one go (coeld.deployment.chains).

**A token** is the sum over layers, plus attention (trunk and KV cache at kernel speed) and head:
coeld.deployment.chains adds it up, and prompts as well.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import isqrt
from typing import Final, NamedTuple

from coeld.ids import Lot, NodeId
from coeld.view import ModelDemand

PPM: Final = 1_000_000
SHARES: Final = 1024
"""Steps in which a branch's share of a layer is looked up."""
SPREADS: Final = (0, 0, 564, 846, 1029, 1163, 1267, 1352, 1424)
"""By rivals: the expected maximum of so many standard normals, in thousandths."""
SPREADS_BY_EIGHTH: Final = tuple(
    SPREADS[i // 8] + (SPREADS[min(i // 8 + 1, len(SPREADS) - 1)] - SPREADS[i // 8]) * (i % 8) // 8
    for i in range(8 * len(SPREADS) - 7)
)
CALL_US: Final = 70
"""One more graph call in the engine (ONNX Runtime from Python, measured on x86-64)."""
CUT_US: Final = 150
"""Choosing owners, packing rows and adding sums, beyond the link's round trip, where nobody has
measured it: both ends together. Two thirds of it are the asker's work."""
ROW_VALUE_BYTES: Final = 4
"""Rows travel as float32."""
ROW_SPEED: Final = 8
"""Rows that one reading of a weight has time to compute, where nobody has measured it."""
CHUNK_ROWS: Final = 128
"""Rows of a prompt that go through a layer together (request.PREFILL_CHUNK_TOKENS)."""


class Tier(NamedTuple):
    """A memory of a device with what computes on it: GPU, RAM, a disk that is read each time."""

    name: str
    memory_bytes: int
    """For lots; trunk and KV cache are taken off by whoever builds it."""
    mb_per_s: int
    """Weight bytes read per microsecond in decode, by the real kernels."""
    row_mb_per_s: int = 0
    """Weight bytes × rows per microsecond when arithmetic is the limit; 0: ROW_SPEED × mb_per_s."""

    def lot_ns(self, lot_bytes: int, rows: int = 1) -> int:
        """Nanoseconds for `rows` rows on weights of `lot_bytes`."""
        reading = lot_bytes * 1000 // max(1, self.mb_per_s)
        return max(reading, rows * lot_bytes * 1000 // max(1, self.row_speed))

    @property
    def row_speed(self) -> int:
        return self.row_mb_per_s or ROW_SPEED * self.mb_per_s


@dataclass(frozen=True, slots=True)
class Device:
    """What the market knows of one device: measured by itself, told in its record."""

    node: NodeId
    tiers: tuple[Tier, ...]
    """Fastest first; the first one holds the trunk."""
    queue_us: int = 0
    """What a call waits behind others, on average."""
    weight: int = 1
    """How many of the swarm's tokens it is asked for, relative to others; 0: none."""
    call_us: int = CALL_US
    cut_us: int = CUT_US
    """What the work of a call takes there if both ends are there."""


class Link(NamedTuple):
    """Between two devices, as measured by the one that asks."""

    rtt_us: int
    mb_per_s: int


LAN: Final = Link(300, 110)
"""Gigabit Ethernet: what is assumed of a link that nobody has measured."""
Links = Callable[[NodeId, NodeId], Link]


class Share(NamedTuple):
    """The part of a layer that one site holds."""

    uses: int
    """Lots it is expected to run per token, in millionths."""
    bytes_used: int
    """Weight bytes it is expected to read per token, × 10^6."""


NOTHING: Final = Share(0, 0)
Site = tuple[int, int]
"""Device and tier, as indices."""
Branch = tuple[int, int, int, int, int]
"""Site; mean and standard deviation of its time if it is called, ns; uses; P(called), 10^-6."""


class CostModel:
    """Prices of one model on one set of devices. Tables are made once; methods are pure."""

    def __init__(
        self,
        demand: ModelDemand,
        devices: Sequence[Device],
        links: Links,
        free_calls: bool = False,
        spans: bool = True,
    ) -> None:
        """`free_calls`: reaching another device costs nothing, to see what calls cost; `spans`:
        devices serve whole layers in one go where that is cheaper."""
        self.demand = demand
        self.spans = spans
        self.devices = tuple(devices)
        self.sites: tuple[Site, ...] = tuple(
            (d, t) for d, device in enumerate(devices) for t in range(len(device.tiers))
        )
        self.tiers = tuple(devices[d].tiers[t] for d, t in self.sites)
        self.askers = tuple(d for d, device in enumerate(devices) if device.weight > 0)
        self.links = links
        self._void, self._when_called = _tables(demand.experts, demand.used)
        self._scale = max(1, demand.used * PPM // SHARES)
        self._reach = [
            [0 if free_calls else self.reach_ns(d, i) for i in range(len(self.sites))]
            for d in range(len(devices))
        ]

    def evened(self) -> "CostModel":
        """The same devices and a model whose lots are all equally popular."""
        return CostModel(replace(self.demand, popularity=()), self.devices, self.links)

    # ---- parts -----------------------------------------------------------------------------

    def uses(self, lot: Lot) -> int:
        """The probability that a token uses this lot, in millionths."""
        if self.demand.popularity:
            return self.demand.popularity[lot.layer][lot.expert]
        return self.demand.used * PPM // self.demand.experts

    def share(self, lot: Lot) -> Share:
        uses = self.uses(lot)
        return Share(uses, uses * self.demand.lot_bytes)

    def reach_ns(self, asker: int, site: int) -> int:
        """What it costs `asker` to have one row computed at `site`, without the computing."""
        home = self.sites[site][0]
        device = self.devices[home]
        if home == asker:
            return device.call_us * 1000
        link = self.links(self.devices[asker].node, device.node)
        payload = 2 * self.demand.hidden * ROW_VALUE_BYTES
        wire = link.rtt_us * 1000 + payload * 1000 // max(1, link.mb_per_s)
        return wire + (device.queue_us + device.call_us + self.cut_us(asker, home)) * 1000

    def cut_us(self, asker: int, home: int) -> int:
        """What a call costs beyond the link and the computing."""
        return (2 * self.devices[asker].cut_us + self.devices[home].cut_us) // 3

    # ---- one layer -------------------------------------------------------------------------

    def layer_ns(self, asker: int, shares: Mapping[int, Share]) -> int:
        """Expected time of one layer's lots for one row: `shares` by site, empty ones left out.

        Wholly at home, it is part of a span and costs no call.
        """
        return self._expected_ns(asker, self._branches(shares))

    def swarm_layer_ns(self, shares: Mapping[int, Share]) -> int:
        """The same, summed over all devices that are asked, by weight."""
        branches = self._branches(shares)
        return sum(self.devices[d].weight * self._expected_ns(d, branches) for d in self.askers)

    def _branches(self, shares: Mapping[int, Share]) -> list[Branch]:
        """What every site has to do for one row if it is called."""
        whole = self.demand.used * PPM
        branches = []
        for site, (uses, bytes_used) in shares.items():
            step = min(SHARES, (uses * SHARES + whole // 2) // whole)
            lot_ns = bytes_used * 1000 // max(1, uses * self.tiers[site].mb_per_s)
            mean, deviation, called = self._when_called[step]
            branches.append((site, lot_ns * mean // PPM, lot_ns * deviation // PPM, uses, called))
        return branches

    def _expected_ns(self, asker: int, branches: Sequence[Branch]) -> int:
        """Σ cost of a branch × P(it is called and no dearer one is)."""
        reach, void, scale = self._reach[asker], self._void, self._scale
        if len(branches) == 1:
            site, busy, *_ = branches[0]
            return busy if self.sites[site][0] == asker else busy + reach[site]
        costs = [reach[branch[0]] + branch[1] for branch in branches]
        spread = _spread(costs, branches)
        called = [
            (cost + branch[2] * spread // 1000, branch[3])
            for cost, branch in zip(costs, branches, strict=True)
        ]
        called.sort(reverse=True)
        total, before, above = 0, PPM, 0
        for cost, uses in called:
            above += uses
            after = void[min(SHARES, above // scale)]
            total += cost * (before - after)
            before = after
        return total // PPM

    def whole_ns(self, site: int) -> int:
        """One row through all of a layer's lots at one site, without reaching it."""
        return self.tiers[site].lot_ns(self.demand.used * self.demand.lot_bytes)

    def reached(self, asker: int, site: int) -> int:
        """`reach_ns`, looked up."""
        return self._reach[asker][site]

    def branch_ns(self, asker: int, site: int, share: Share) -> int:
        """What one branch alone is expected to cost if it is called."""
        ((_, busy, *_),) = self._branches({site: share})
        return busy + self._reach[asker][site]

    # ---- one token -------------------------------------------------------------------------

    @property
    def attention_bytes(self) -> int:
        """Trunk of one layer: what is neither embedding nor head."""
        demand = self.demand
        once = demand.head_bytes + demand.embedding_bytes
        return max(0, demand.trunk_bytes - once) // max(1, demand.layers)

    def attention_ns(self, device: int, context_tokens: int = 0) -> int:
        """One layer's attention for one row, which reads the KV cache of `context_tokens`."""
        cache = self.demand.kv_bytes_per_token * context_tokens // max(1, self.demand.layers)
        return self.devices[device].tiers[0].lot_ns(self.attention_bytes + cache)

    def head_ns(self, device: int) -> int:
        return self.devices[device].tiers[0].lot_ns(self.demand.head_bytes)

    def chunk_ns(self, asker: int, shares: Mapping[int, Share], rows: int) -> int:
        """One layer of a prompt's `rows` rows, its attention at `asker`.

        Many rows spread evenly, so the layer is the maximum of the branches' expectations. Wholly
        at home, it is part of a span and costs no call.
        """
        attention = self.devices[asker].tiers[0].lot_ns(self.attention_bytes, rows)
        busy = [self._branch_ns(asker, site, share, rows) for site, share in shares.items()]
        alone = len(shares) == 1 and self.sites[next(iter(shares))][0] == asker
        call = self.devices[asker].call_us * 1000 if alone else 0
        return attention + max(busy, default=0) - call

    def carried_ns(self, asker: int, device: int, rows: int) -> int:
        """`rows` rows to another device and back, without the round trip."""
        link = self.links(self.devices[asker].node, self.devices[device].node)
        payload = 2 * rows * self.demand.hidden * ROW_VALUE_BYTES
        return payload * 1000 // max(1, link.mb_per_s)

    def _branch_ns(self, asker: int, site: int, share: Share, rows: int) -> int:
        """`rows` rows at one site: its lots are read once if any row uses them, or computing takes
        longer; each row travels once."""
        demand, tier, home = self.demand, self.tiers[site], self.sites[site][0]
        whole = demand.used * PPM
        lot_rows = share.bytes_used * rows // PPM
        held = demand.lot_bytes * (demand.experts * share.uses // whole)
        read = min(held, lot_rows) * 1000 // max(1, tier.mb_per_s)
        busy = max(read, lot_rows * 1000 // max(1, tier.row_speed)) + self._reach[asker][site]
        if home == asker:
            return busy
        called = PPM - self._void[min(SHARES, share.uses * SHARES // whole)]
        return busy + self.carried_ns(asker, home, rows * called // PPM)


def kv_cache_bytes(demand: ModelDemand, context_tokens: int, requests: int) -> int:
    """Memory of a decoder beside trunk and lots, for so many requests of so many tokens."""
    return demand.kv_bytes_per_token * context_tokens * requests


def _spread(costs: Sequence[int], branches: Sequence[Branch]) -> int:
    """Thousandths of a standard deviation that branches count above their means.

    It grows with the number of branches that may well be the slowest: those within two of the
    largest deviations of the dearest one, each counted by how near it is and how often called.
    """
    width = 2 * max([branch[2] for branch in branches])
    if width <= 0:
        return 0
    nearest = max(costs) - width
    near = 0
    for cost, branch in zip(costs, branches, strict=True):
        if cost > nearest:
            near += branch[4] * (cost - nearest) // width
    return SPREADS_BY_EIGHTH[min(near * 8 // PPM, len(SPREADS_BY_EIGHTH) - 1)]


@lru_cache(maxsize=64)
def _tables(lots: int, used: int) -> tuple[tuple[int, ...], tuple[tuple[int, int, int], ...]]:
    """For every step of the share s: void(s); and mean, standard deviation of the lots that a
    called branch runs, and the probability that it is called. All in millionths."""
    void, when_called = [], []
    for step in range(SHARES + 1):
        absent = PPM
        for i in range(used):
            left = (lots - i) * SHARES - step * lots
            absent = absent * max(0, left) // ((lots - i) * SHARES)
        void.append(absent)
        mean = used * PPM * step // SHARES
        variance = used * step * (SHARES - step) * PPM // SHARES**2
        variance = variance * (lots - used) // max(1, lots - 1)
        called = PPM - absent
        if called <= 0:
            when_called.append((PPM, 0, 0))
            continue
        given = mean * PPM // called
        square = (variance * PPM + mean * mean) * PPM // called - given * given
        when_called.append((given, isqrt(max(0, square)), called))
    return tuple(void), tuple(when_called)
