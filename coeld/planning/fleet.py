"""The devices of a plan: a TOML file, or a line such as 4xraspberry-pi-5.

Profiles come with coeld, each figure with its source. A link costs half of what each end's kind
costs, and carries what the narrower end carries.
"""

import re
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Final

from coeld.deployment.cost import Link
from coeld.deployment.supply import both_ways
from coeld.errors import ConfigError
from coeld.ids import NodeId
from coeld.measured import MeasuredLink
from coeld.messages import CUT_US_MAX
from coeld.planning.toml_file import Table, parse

DEVICES_MAX: Final = 64
SPEED_MAX: Final = 10_000_000
BUDGET_PERCENT: Final = 60
"""Of available memory, as the daemon takes it where memory.budget_mb is 0."""
LINKS: Final = {"ethernet": Link(300, 110), "wifi": Link(4000, 30), "fast-ethernet": Link(400, 11)}
SHORT: Final = re.compile(r"(?:(\d{1,3})x)?([a-z0-9.-]+)")


@dataclass(frozen=True, slots=True)
class Machine:
    """One device of a plan."""

    name: str
    profile: str
    budget_bytes: int
    """For weights and KV caches."""
    kernel_mb_per_s: int
    row_mb_per_s: int
    cut_us: int
    """Work of its processor for a call of experts, at both ends."""
    link: str
    asks: bool
    measured: bool
    """False: the profile's speed is an estimate."""
    node: NodeId | None = None
    """Of a running device."""
    links: tuple[MeasuredLink, ...] = ()
    """That it told of; others are as their kind is."""

    @property
    def link_kind(self) -> str:
        return "measured" if self.links else self.link


@dataclass(frozen=True, slots=True)
class Profile:
    """A kind of device, from a file that comes with coeld."""

    name: str
    title: str
    memory_gb: float
    available_percent: float
    kernel_mb_per_s: int
    row_mb_per_s: int
    cut_us: int
    measured: bool
    source: str


def profiles() -> dict[str, Profile]:
    folder = resources.files("coeld.planning") / "profiles"
    found = {}
    for file in sorted(folder.iterdir(), key=lambda item: item.name):
        if file.name.endswith(".toml"):
            name = file.name.removesuffix(".toml")
            found[name] = _profile(name, file.read_text("utf-8"))
    return found


def _profile(name: str, text: str) -> Profile:
    table = Table(parse(text, name), f"the profile {name}")
    found = Profile(
        name=name,
        title=table.text("title"),
        memory_gb=table.number("memory_gb", 0.1, 4096),
        available_percent=table.number("available_percent", 1, 100),
        kernel_mb_per_s=table.count("kernel_mb_per_s", 1, SPEED_MAX),
        row_mb_per_s=table.count("row_mb_per_s", 1, SPEED_MAX),
        cut_us=table.count("cut_us", 1, CUT_US_MAX),
        measured=table.text("basis", allowed=("measured", "estimated")) == "measured",
        source=table.text("source"),
    )
    table.done()
    return found


def read_fleet(text: str) -> tuple[Machine, ...]:
    """From a file's path, or a line such as "4xraspberry-pi-5,n100". Raises ConfigError."""
    path = Path(text)
    if path.suffix == ".toml":
        try:
            return parse_fleet(path.read_text("utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as exc:
            raise ConfigError(f"{path} cannot be read: {exc}.") from exc
    rows = []
    for part in text.split(","):
        found = SHORT.fullmatch(part.strip())
        if found is None or found[2] not in profiles():
            raise ConfigError(
                f"{part!r} names no devices. Write a file ending in .toml, or COUNTxPROFILE with "
                f"the profiles {', '.join(profiles())}."
            )
        rows.append(f'[[device]]\nprofile = "{found[2]}"\ncount = {int(found[1] or 1)}')
    return parse_fleet("\n".join(rows), text)


def parse_fleet(text: str, source: str) -> tuple[Machine, ...]:
    """The devices of a fleet file. Raises ConfigError that names the key and its range."""
    known = profiles()
    top = Table(parse(text, source), source)
    machines: list[Machine] = []
    for table in top.tables("device", DEVICES_MAX):
        profile = known[table.text("profile", allowed=known)]
        count = table.count("count", 1, DEVICES_MAX, 1)
        name = table.text("name", profile.name)
        memory_bytes = table.number("memory_gb", 0.1, 4096, profile.memory_gb) * 2**30
        default = memory_bytes * profile.available_percent / 100 * BUDGET_PERCENT / 100 / 1e6
        budget_mb = table.number("budget_mb", 1, 10_000_000, default)
        speeds = {"kernel_mb_per_s", "row_mb_per_s"}
        machine = Machine(
            name=name,
            profile=profile.name,
            budget_bytes=int(budget_mb * 1e6),
            kernel_mb_per_s=table.count("kernel_mb_per_s", 1, SPEED_MAX, profile.kernel_mb_per_s),
            row_mb_per_s=table.count("row_mb_per_s", 1, SPEED_MAX, profile.row_mb_per_s),
            cut_us=table.count("cut_us", 1, CUT_US_MAX, profile.cut_us),
            link=table.text("link", "ethernet", allowed=LINKS),
            asks=table.flag("asks", True),
            measured=profile.measured or speeds <= set(table.values),
        )
        table.done()
        for index in range(count):
            label = f"{name}-{index + 1}" if count > 1 else name
            machines.append(replace(machine, name=label))
    top.done()
    if not 1 <= len(machines) <= DEVICES_MAX:
        raise ConfigError(f"{source} names {len(machines)} devices, expected 1 to {DEVICES_MAX}.")
    if not any(machine.asks for machine in machines):
        raise ConfigError(f"{source}: no device asks. Leave `asks` out, or set it to true for one.")
    return tuple(machines)


def link_between(a: Machine, b: Machine) -> Link:
    """As measured; else half a round trip at each end, and the narrower end's bandwidth."""
    out, back = ({link.node: link for link in machine.links} for machine in (a, b))
    known = both_ways(out.get(b.node), back.get(a.node)) if a.node and b.node else None
    if known is not None:
        return known
    one, two = LINKS[a.link], LINKS[b.link]
    return Link((one.rtt_us + two.rtt_us) // 2, min(one.mb_per_s, two.mb_per_s))
