"""Brings the newest version of the open model onto this disk, and tells the node how far it is.

Newest is what is newest in the own store, which is looked at again and again (somebody may have
added a version), or what another device tells of. First comes what is needed to go over: trunk,
tokenizer, and the lots that are served now, likely to be served then; after that the rest, as long
as the disk has room, so that little is left to fetch when nobody answers. Only then is it ready.
When nobody has an older version open any more, those are removed.
"""

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, Final, Protocol

from coeld.errors import CoeldError, DiskFull, FetchFailed
from coeld.events import Event, ReleaseFound
from coeld.ids import Lot, ModelHash, NodeId
from coeld.model.manifest import BlobRef, Manifest
from coeld.model.narrow import demand_of
from coeld.model.store import Store
from coeld.net.blobs import Holder, fetch_manifest
from coeld.releases import Progress, Release
from coeld.update.rollout import release_of
from coeld.view import ModelDemand

AT_ONCE: Final = 8
"""Blobs of one step: orders of the node wait no longer than for these."""
RETRY_S: Final = 5.0
PATIENCE_S: Final = 30.0
"""Failures in a row for so long mean that this device cannot have the version now."""

log = logging.getLogger(__name__)

Releases = Callable[[str], list[tuple[Release, str, int]]]
"""By the name of a model: versions of it that other devices have whole, and where."""


class Fetcher(Protocol):
    """What this asks of coeld.net.weights.Weights."""

    def bring(
        self, refs: Sequence[BlobRef], model: ModelHash, what: str, quiet: bool = False
    ) -> Awaitable[None]: ...
    def has_room(self, more_bytes: int) -> bool: ...


class Upgrade:
    """Call `advance` again and again; it may be cancelled."""

    def __init__(
        self,
        store: Store,
        node: NodeId,
        fetcher: Fetcher,
        releases: Releases,
        lots: Callable[[], Collection[Lot]],
        emit: Callable[[Event], None],
    ) -> None:
        self._store, self._node, self._fetcher = store, node, fetcher
        self._releases, self._lots, self._emit = releases, lots, emit
        self._changed: tuple[object, ...] = ()
        self._installed: Manifest | None = None
        """The newest in the own store."""
        self._next: Manifest | None = None
        """The newest of all, which is to come."""
        self._sought: Release | None = None
        """The same, or what is told to be newer and whose manifest is not here yet."""
        self._refused: set[Release] = set()
        """What others tell of, but is something else."""
        self._told: tuple[object, ...] = ()
        self._retry_at = float("-inf")
        self._failing_since: float | None = None
        self.trouble = ""
        """Why the next version cannot be had."""

    def status(self) -> dict[str, Any]:
        return {"version": self._sought.version if self._sought else None, "trouble": self.trouble}

    async def advance(self, opened: ModelDemand) -> bool:
        """A step towards the newest version of what is open; False: nothing to do for now."""
        now = asyncio.get_running_loop().time()
        if now < self._retry_at:
            return False
        try:
            more = await self._step(opened)
        except (CoeldError, OSError) as exc:
            self._failed(opened, exc, now)
            return False
        self._retry_at, self._failing_since, self.trouble = float("-inf"), None, ""
        return more

    def _failed(self, opened: ModelDemand, exc: Exception, now: float) -> None:
        self._retry_at = now + RETRY_S
        self._failing_since = self._failing_since or now
        lasting = isinstance(exc, DiskFull) or now - self._failing_since >= PATIENCE_S
        if self._sought is not None and lasting:
            self._tell(opened, self._demand(opened, self._sought), Progress.FAILED)
        if str(exc) != self.trouble:
            self.trouble = str(exc)
            log.warning(
                "this device stays on version %d of %s: the next one cannot be had yet: %s",
                opened.version,
                opened.name,
                exc,
            )

    async def _step(self, opened: ModelDemand) -> bool:
        present = release_of(opened)
        manifest = self._next = await self._newest(opened.name, present)
        if manifest is None:
            self._retire(opened.name, present)
            return False
        if self._told == (present, manifest.release, Progress.READY):
            return False
        if self._told[:2] != (present, manifest.release):  # who has failed is not waited for
            self._tell(opened, demand_of(manifest), Progress.FETCHING)
        if missing := [ref for ref in self._needed(manifest) if not self._store.has(ref)]:
            what = f"{len(missing)} parts of version {manifest.version} of {manifest.name}"
            await self._fetcher.bring(missing[:AT_ONCE], manifest.hash, what)
            return True
        if self._installed is None or self._installed.hash != manifest.hash:
            with self._store.lock():
                self._store.save(manifest, manifest.trunk_blobs() + manifest.text_blobs())
        if await self._bring_more(manifest):
            return True
        log.info("version %d of %s is on this device's disk", manifest.version, manifest.name)
        self._tell(opened, demand_of(manifest), Progress.READY)
        return True

    def _tell(self, opened: ModelDemand, demand: ModelDemand, progress: Progress) -> None:
        told = release_of(opened), release_of(demand), progress
        if told != self._told:
            self._told = told
            self._emit(ReleaseFound(demand, progress))

    def _demand(self, opened: ModelDemand, release: Release) -> ModelDemand:
        """What that version needs: as much as the open one, while its manifest is not here."""
        if self._next is not None and self._next.release == release:
            return demand_of(self._next)
        return replace(opened, version=release.version, model=release.model)

    def _needed(self, manifest: Manifest) -> list[BlobRef]:
        """What this device cannot do without when it goes over, each blob once."""
        refs = manifest.trunk_blobs() + manifest.text_blobs()
        shape = manifest.shape
        refs += [
            manifest.experts[lot.layer][lot.expert]
            for lot in sorted(self._lots())
            if lot.layer < shape.layers and lot.expert < shape.experts
        ]
        return list({ref.sha256: ref for ref in refs}.values())

    async def _bring_more(self, manifest: Manifest) -> bool:
        """Some of the rest that has room; False when there is none, or none can be had."""
        rest = [ref for ref in manifest.blobs() if not self._store.has(ref)]
        rest.sort(key=lambda ref: hashlib.sha256(f"{self._node}{ref.sha256}".encode()).digest())
        chosen = rest[:AT_ONCE]
        if not chosen or not self._fetcher.has_room(sum(ref.bytes for ref in chosen)):
            return False
        try:
            await self._fetcher.bring(chosen, manifest.hash, "the rest of it", quiet=True)
        except FetchFailed as exc:
            log.debug("the rest of version %d cannot be fetched now: %s", manifest.version, exc)
            return False
        return True

    async def _newest(self, name: str, present: Release) -> Manifest | None:
        """The manifest of the newest version, from here or from others; None: it is open."""
        changed = name, *self._store.changed(name)
        if len(changed) == 1:
            self._sought = None
            return None  # it was removed, and serves on
        if changed != self._changed:
            self._installed = self._store.manifest(name)
            self._changed = changed
        told = self._releases(name)
        self._refused &= {release for release, _host, _port in told}
        known = [self._installed, self._next]
        found = [m for m in known if m is not None and m.name == name and m.release > present]
        best = max(found, key=lambda manifest: manifest.release, default=None)
        newer = [release for release, _host, _port in told if release not in self._refused]
        newest = max(newer, default=present)
        if newest <= (best.release if best else present):
            self._sought = best.release if best else None
            return best
        self._sought = newest
        holders = [Holder(host, port) for release, host, port in told if release == newest]
        manifest = await fetch_manifest(newest.model, holders)
        if (manifest.name, manifest.version) != (name, newest.version):
            self._refused.add(newest)
            raise FetchFailed(f"what is told to be version {newest.version} of {name} is not")
        return manifest

    def _retire(self, name: str, present: Release) -> None:
        """Remove older versions once nobody has one open."""
        if self._installed is None or self._installed.hash != present.model:
            return
        if any(release < present for release, _host, _port in self._releases(name)):
            return
        if self._store.has_older(name):
            self._store.retire(name)
            log.info(
                "version %d of %s is open everywhere: older ones removed", present.version, name
            )
