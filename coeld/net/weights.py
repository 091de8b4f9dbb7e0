"""Sees to it that the weights this device is to use are on its disk: fetches them from the others.

Three things need that, in this order. A lot that was won may not be here: it is fetched before the
engine is told to load it, and if nobody has it the load has failed, like any other, and is tried
again or taken by somebody else. A device without a model takes the one that the swarm has (or the
one it was told to serve): manifest, trunk and tokenizer; so one device imports a model and the
others get it. And when nothing else is to do, the rest of the model follows as long as the disk has
room to spare: who dies then takes no weights along, and a lot that moves is there already. Each
device begins somewhere else, so that disks too small for all of it hold different parts, and with
what only one other device serves: two disks where there is room.

A device that lost a lot keeps its bytes and serves them. Only where the store has a budget
(`device.disk_mb`) are copies deleted, those that coeld.update.disk chooses: to get room for lots
that were won, and when the store takes more than it may.
"""

import asyncio
import hashlib
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from coeld.errors import CoeldError, DiskFull, FetchFailed, ModelError
from coeld.events import Event, LoadFailed
from coeld.ids import Lot, ModelHash, NodeId
from coeld.model.manifest import BlobRef, Manifest
from coeld.model.store import Store, free_bytes
from coeld.net.blobs import BlobServer, Holder, Rate, fetch, fetch_manifest
from coeld.net.upgrade import Releases, Upgrade
from coeld.update.disk import Blob, Wanted, to_delete
from coeld.view import ModelDemand

LOOK_S: Final = 1.0
"""Between looks whether the swarm has a model, while this device has none."""
RESERVE_BYTES: Final = 64 << 20
"""What a fetch leaves free on the disk."""
COLLECT_S: Final = 10.0
"""Between looks whether the store takes more than it may, or lacks what opening a model takes."""

log = logging.getLogger(__name__)

Holders = Callable[[], list[tuple[ModelHash, str, int]]]


@dataclass(frozen=True, slots=True)
class DiskBudget:
    """What the store may take, and what stays free beside it."""

    store_bytes: int
    """0 = no limit."""
    free_bytes: int
    """Copies are fetched only while more than this is free."""


class Weights:
    """Start with `run`; everything else may be called at any time in the same loop."""

    def __init__(
        self,
        store: Store,
        wanted_name: str,
        node: NodeId,
        bytes_per_s: float,
        disk: DiskBudget,
        holders: Holders,
        releases: Releases,
        wanted: Callable[[], Wanted],
        load: Callable[[Sequence[Lot], bool], None],
        emit: Callable[[Event], None],
    ) -> None:
        self._store, self._wanted, self._holders = store, wanted_name, holders
        self._load, self._emit = load, emit
        self._node, self._disk, self._on_disk = node, disk, wanted
        self._incoming = Rate(bytes_per_s)
        self.server = BlobServer(store, Rate(bytes_per_s))
        self._upgrade = Upgrade(store, node, self, releases, lambda: wanted().kept, emit)
        self._orders: deque[tuple[tuple[Lot, ...], bool]] = deque()
        self._changed = asyncio.Event()
        self._manifest: Manifest | None = None
        """Of the model in `_open`."""
        self._open: ModelDemand | None = None
        self._spare: deque[BlobRef] = deque()
        """What nobody waits for and is not here, in this device's own order."""
        self._lots: dict[str, list[Lot]] = {}
        """By sha256: the lots of the open model whose weights a blob has."""
        self._collect_at = self._mend_at = float("-inf")
        self._other_names: set[ModelHash] = set()
        """Models of the swarm that are not the one this device is to serve."""
        self._complaint = ""
        self.fetched_bytes = self.deleted_bytes = 0
        self.fetching = ""
        """What is under way, for people; "" when nothing is."""

    def status(self) -> dict[str, Any]:
        return {
            "fetching": self.fetching,
            "next": self._upgrade.status(),
            "missing_blobs": sum(not self._store.has(ref) for ref in self._spare),
            "fetched_bytes": self.fetched_bytes,
            "deleted_bytes": self.deleted_bytes,
            "sent_bytes": self.server.sent_bytes,
        }

    def load(self, model: ModelDemand, lots: tuple[Lot, ...], narrow: bool = False) -> None:
        """Tell the engine to load these lots of that model, `narrow` or as they are stored, as soon
        as all their blobs are here."""
        try:
            here = not self._orders and not self._missing(model, lots)
        except ModelError as exc:
            self._emit(LoadFailed(lots, str(exc)))
            return
        if here:
            self._load(lots, narrow)
        else:
            self._orders.append((lots, narrow))
            self._changed.set()

    def forget(self) -> None:
        """The engine has gone, and with it everything that it was to load."""
        self._orders.clear()

    async def run(self, model: Callable[[], ModelDemand | None]) -> None:
        """Until cancelled. `model` is what the engine has open, or None."""
        while True:
            opened = model()
            if self._orders and opened:
                await self._next_order(opened)
                continue
            if opened is None:
                await (self._find_model() if self._nothing_installed() else self._mend())
            elif opened and (
                self._collect(opened)
                or await self._upgrade.advance(opened)
                or await self._next_spare(opened)
            ):
                continue
            self._changed.clear()
            try:
                async with asyncio.timeout(LOOK_S):
                    await self._changed.wait()
            except TimeoutError:
                continue

    # Lots

    def _missing(self, model: ModelDemand, lots: Iterable[Lot]) -> list[BlobRef]:
        """Raises ModelError when the manifest is gone or damaged."""
        if self._manifest is None or self._open != model:
            self._manifest = self._store.version(model.name, model.model)
            self._open = model
            self._lots = {}
            for layer, experts in enumerate(self._manifest.experts):
                for expert, ref in enumerate(experts):
                    self._lots.setdefault(ref.sha256, []).append(Lot(layer, expert))
            self._list_spare(self._manifest)
        refs = [self._manifest.experts[lot.layer][lot.expert] for lot in lots]
        return [ref for ref in refs if not self._store.has(ref)]

    def _list_spare(self, manifest: Manifest) -> None:
        rest = [ref for ref in manifest.blobs() if not self._store.has(ref)]
        self._spare = deque(sorted(rest, key=self._turn))

    def _turn(self, ref: BlobRef) -> bytes:
        return hashlib.sha256(f"{self._node}{ref.sha256}".encode()).digest()

    async def _next_spare(self, model: ModelDemand) -> bool:
        """Fetch one more blob that nobody waits for; False when there is none, or no room."""
        try:
            self._missing(model, ())
            self._spare_next()
            if not self._spare or self._manifest is None:
                return False
            ref = self._spare[0]
            if not self.has_room(ref.bytes):
                return False
            await self.bring([ref], self._manifest.hash, "the rest of the model", quiet=True)
        except (CoeldError, OSError) as exc:
            log.debug("the rest of the model cannot be fetched now: %s", exc)
            self._spare.rotate(-1)
            return False
        return True

    def _spare_next(self) -> None:
        """Bring to the front what only one other device serves, if there is such a blob."""
        while self._spare and self._store.has(self._spare[0]):
            self._spare.popleft()
        wanted = self._on_disk()
        for place, ref in enumerate(self._spare):
            lots = self._lots.get(ref.sha256)
            if lots and wanted.copies(lots) == 1 and not self._store.has(ref):
                del self._spare[place]
                self._spare.appendleft(ref)
                return

    async def _next_order(self, model: ModelDemand) -> None:
        order = self._orders[0]
        lots, narrow = order
        try:
            missing = self._missing(model, lots)
            assert self._manifest is not None
            await self.bring(missing, self._manifest.hash, f"{len(missing)} experts")
        except (CoeldError, OSError) as exc:
            self._emit(LoadFailed(lots, str(exc)))
        else:
            if self._orders and self._orders[0] is order:  # nobody has forgotten it meanwhile
                self._load(lots, narrow)
        if self._orders and self._orders[0] is order:
            self._orders.popleft()

    async def bring(
        self, refs: Sequence[BlobRef], model: ModelHash, what: str, quiet: bool = False
    ) -> None:
        """Fetch blobs from the devices that have that model. Raises FetchFailed, DiskFull."""
        if not refs:
            return
        size = sum(ref.bytes for ref in refs)
        self._make_room(size)
        self._store.require_free(size + RESERVE_BYTES)
        holders = [Holder(host, port) for has, host, port in self._holders() if has == model]
        self.fetching = f"{what} ({size / 1e6:.0f} MB) from {len(holders)} devices"
        log.log(logging.DEBUG if quiet else logging.INFO, "fetching %s", self.fetching)
        try:
            await fetch(self._store, refs, holders, self._incoming, self._count)
        finally:
            self.fetching = ""

    # The budget of the disk

    def has_room(self, more_bytes: int) -> bool:
        """For that much that nobody waits for."""
        if free_bytes(self._store.root) < more_bytes + self._disk.free_bytes:
            return False
        return self._excess(more_bytes) <= 0

    def _excess(self, more_bytes: int) -> int:
        """By how much the store would exceed its budget with that many bytes more."""
        if not self._disk.store_bytes:
            return 0
        return self._store.used_bytes() + more_bytes - self._disk.store_bytes

    def _make_room(self, more_bytes: int) -> None:
        """Delete copies until that much fits. Raises DiskFull when not enough may go."""
        excess = self._excess(more_bytes)
        if excess > 0:
            excess -= self._delete(excess)
        if excess > 0:
            raise DiskFull(
                f"{more_bytes} bytes of weights do not fit: {excess} too many for device.disk_mb, "
                "and nothing more may be deleted. Raise it, or remove a model that is not served."
            )

    def _collect(self, model: ModelDemand) -> bool:
        """When it is time, delete what is over the budget; False: nothing was deleted."""
        now = asyncio.get_running_loop().time()
        if now < self._collect_at:
            return False
        self._collect_at = now + COLLECT_S
        try:
            self._missing(model, ())
            if not self._spare and self._manifest is not None:
                self._list_spare(self._manifest)  # the engine may have removed what was damaged
            excess = self._excess(0)
            return excess > 0 and self._delete(excess) > 0
        except (CoeldError, OSError) as exc:
            log.debug("nothing can be deleted now: %s", exc)
            return False

    def _delete(self, excess_bytes: int) -> int:
        """Delete copies of that size or as much as may go; returns the bytes. Raises ModelError."""
        if self._manifest is None:
            return 0
        refs = {ref.sha256: ref for layer in self._manifest.experts for ref in layer}
        for manifest in self._store.models():
            if manifest.hash != self._manifest.hash:
                for ref in manifest.blobs():
                    refs.pop(ref.sha256, None)
        here = sorted(filter(self._store.has, refs.values()), key=self._turn)
        blobs = [Blob(ref.sha256, ref.bytes, self._lots[ref.sha256]) for ref in here]
        gone = to_delete(blobs, self._on_disk(), excess_bytes)
        if not gone:
            return 0
        self._store.delete(blob.sha256 for blob in gone)
        self._list_spare(self._manifest)
        size = sum(blob.bytes for blob in gone)
        self.deleted_bytes += size
        log.info("deleted %d copies (%.0f MB) that others serve", len(gone), size / 1e6)
        return size

    def _count(self, size: int) -> None:
        self.fetched_bytes += size

    # The model

    def _nothing_installed(self) -> bool:
        names = self._store.names()
        return self._wanted not in names if self._wanted else not names

    async def _find_model(self) -> None:
        """Take the model that most devices have; say once why that does not work."""
        seen = Counter(model for model, _host, _port in self._holders())
        for model in sorted(seen, key=lambda each: (-seen[each], each)):
            if model in self._other_names:
                continue
            try:
                await self._take(model)
            except (CoeldError, OSError) as exc:
                self._complain("the swarm's model cannot be fetched yet", exc)
            return

    async def _take(self, model: ModelHash) -> None:
        holders = [Holder(host, port) for has, host, port in self._holders() if has == model]
        manifest = await fetch_manifest(model, holders)
        if self._wanted and manifest.name != self._wanted:
            self._other_names.add(model)
            raise FetchFailed(
                f"the swarm has {manifest.name}, this device is to serve {self._wanted}"
            )
        await self._bring_trunk(manifest)
        with self._store.lock():
            self._store.save(manifest, manifest.trunk_blobs() + manifest.text_blobs())
        log.info("%s was fetched from the swarm", manifest.name)

    async def _bring_trunk(self, manifest: Manifest) -> None:
        needed = manifest.trunk_blobs() + manifest.text_blobs()
        missing = [ref for ref in needed if not self._store.has(ref)]
        await self.bring(missing, manifest.hash, f"{manifest.name}: what every device needs")

    async def _mend(self) -> None:
        """Fetch what the installed model cannot be opened without: the engine removes what is
        damaged."""
        now, names = asyncio.get_running_loop().time(), self._store.names()
        name = self._wanted or (names[0] if len(names) == 1 else "")
        if not name or now < self._mend_at:
            return
        self._mend_at = now + COLLECT_S
        try:
            for manifest in self._store.versions(name):
                await self._bring_trunk(manifest)
        except (CoeldError, OSError) as exc:
            self._complain(f"parts of {name} cannot be fetched yet", exc)

    def _complain(self, what: str, exc: Exception) -> None:
        """Once."""
        if str(exc) != self._complaint:
            self._complaint = str(exc)
            log.warning("%s: %s", what, exc)
