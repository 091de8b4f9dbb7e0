"""Neighbours on the local network: announce this device over mDNS and listen for others.

Service type `_coeld._tcp.local.`, one instance per device, named by its node id; swarm and node id
are in a TXT record, because a name that is taken (by a copied identity, or by oneself before a
quick restart) is changed. A device bound to loopback announces itself there only, any other on all
its interfaces, over IPv4 and IPv6. What it announces is its one address: whoever hears of it on a
network from which that cannot be reached tries for a while and forgets it. Without multicast (some
containers, some networks) there is a warning and the configured neighbours still work.
"""

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Callable
from typing import Final

from zeroconf import Error, InterfaceChoice, IPVersion, ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from coeld.config import is_loopback
from coeld.ids import NodeId
from coeld.net.mqtt_topics import NODE_ID

SERVICE: Final = "_coeld._tcp.local."
RESOLVE_MS: Final = 2000
FOUND_MAX: Final = 256
"""Devices resolved in one run; bounds what a noisy network can cost."""

log = logging.getLogger(__name__)
logging.getLogger("zeroconf").setLevel(logging.ERROR)  # it warns of every interface without IPv6


async def discover(
    me: NodeId,
    swarm: str,
    mqtt_address: tuple[str, int],
    found: Callable[[NodeId, str, int], None],
) -> None:
    """Announce and browse until cancelled; `found` gets node, host and MQTT port of others."""
    host, port = mqtt_address
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((str(address), 0))  # zeroconf would leak a socket if this fails later
        zeroconf = _opened(str(address), address.version)
    except (OSError, ValueError) as exc:
        _warn(exc)
        return
    finder = _Finder(me, swarm, found)
    browser = None
    try:
        info = AsyncServiceInfo(
            SERVICE,
            f"{me}.{SERVICE}",
            port=port,
            properties={"swarm": swarm, "node": me},
            addresses=[address.packed],
            server=f"coeld-{me}.local.",
        )
        await zeroconf.async_register_service(info, allow_name_change=True)
        browser = AsyncServiceBrowser(zeroconf.zeroconf, SERVICE, handlers=[finder.changed])
        await finder.resolve_all()
    except (OSError, Error) as exc:
        _warn(exc)
    finally:
        if browser:
            await browser.async_cancel()
        await zeroconf.async_unregister_all_services()
        await zeroconf.async_close()


def _opened(address: str, version: int) -> AsyncZeroconf:
    """On the interfaces that fit the address. Raises OSError."""
    own = IPVersion.V4Only if version == 4 else IPVersion.V6Only
    if is_loopback(address):
        return AsyncZeroconf(interfaces=[address], ip_version=own)
    try:
        return AsyncZeroconf(interfaces=InterfaceChoice.All, ip_version=IPVersion.All)
    except OSError:  # one of the two is switched off
        return AsyncZeroconf(interfaces=InterfaceChoice.All, ip_version=own)


def _warn(exc: Exception) -> None:
    log.warning(
        "devices on the local network cannot be discovered (%s); name them in swarm.neighbours",
        exc,
    )


class _Finder:
    """Resolves the names that the browser sees, one after the other."""

    def __init__(self, me: NodeId, swarm: str, found: Callable[[NodeId, str, int], None]) -> None:
        self._me, self._swarm, self._found = me, swarm, found
        self._names: asyncio.Queue[tuple[Zeroconf, str]] = asyncio.Queue(FOUND_MAX)

    def changed(
        self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange
    ) -> None:
        gone = state_change is ServiceStateChange.Removed
        if not gone and service_type == SERVICE and not self._names.full():
            self._names.put_nowait((zeroconf, name))

    async def resolve_all(self) -> None:
        while True:
            zeroconf, name = await self._names.get()
            info = AsyncServiceInfo(SERVICE, name)
            if not await info.async_request(zeroconf, RESOLVE_MS):
                continue
            if (info.properties or {}).get(b"swarm") != self._swarm.encode() or not info.port:
                continue
            node = ((info.properties or {}).get(b"node") or b"").decode(errors="replace")
            if node == self._me or not NODE_ID.match(node):
                continue
            for host in info.parsed_addresses()[:2]:
                self._found(NodeId(node), host, info.port)
