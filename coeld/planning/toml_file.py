"""TOML that people write, read so that a mistake is named with what is allowed. Pure."""

import tomllib
from collections.abc import Collection, Mapping
from typing import Any, Final

from coeld.errors import ConfigError

BYTES_MAX: Final = 1 << 20
SHOWN: Final = 60


def parse(text: str, source: str) -> dict[str, Any]:
    """Raises ConfigError."""
    if len(text) > BYTES_MAX:
        raise ConfigError(f"{source} is larger than {BYTES_MAX} bytes: that is no plan's file.")
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as exc:
        raise ConfigError(f"{source} is not TOML: {exc}.") from exc


class Table:
    """One table of a file. Every read is checked; `done` refuses keys that nobody asked for."""

    def __init__(self, values: Any, where: str) -> None:
        """`where`: the file and the table, as errors name it. Raises ConfigError."""
        if not isinstance(values, dict):
            raise ConfigError(f"{where} is {_shown(values)}, expected a table.")
        self.values: Mapping[str, Any] = values
        self.where = where
        self._asked: set[str] = set()

    def has(self, key: str) -> bool:
        return key in self.values

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """A number of low..high. Raises ConfigError."""
        found = self._get(key, default)
        fine = isinstance(found, int | float) and not isinstance(found, bool)
        if not fine or not low <= found <= high:
            self._bad(key, found, f"a number of {low:g} to {high:g}")
        return float(found)

    def count(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """A whole number of low..high. Raises ConfigError."""
        found = self._get(key, default)
        if type(found) is not int or not low <= found <= high:
            self._bad(key, found, f"a whole number of {low} to {high}")
        return int(found)

    def text(
        self, key: str, default: str | None = None, allowed: Collection[str] | None = None
    ) -> str:
        """Raises ConfigError."""
        found = self._get(key, default)
        if not isinstance(found, str) or not found.isprintable() or len(found) > 500:
            self._bad(key, found, "a line of text")
        if allowed is not None and found not in allowed:
            self._bad(key, found, "one of " + ", ".join(sorted(allowed)))
        return str(found)

    def flag(self, key: str, default: bool) -> bool:
        """Raises ConfigError."""
        found = self._get(key, default)
        if type(found) is not bool:
            self._bad(key, found, "true or false")
        return bool(found)

    def tables(self, key: str, most: int) -> "list[Table]":
        """An array of tables, empty if absent. Raises ConfigError."""
        found = self._get(key, [])
        if not isinstance(found, list) or len(found) > most:
            self._bad(key, found, f"at most {most} tables [[{key}]]")
        return [Table(item, f"{self.where}, [[{key}]] {i + 1}") for i, item in enumerate(found)]

    def done(self) -> None:
        """Raises ConfigError if there are keys that nobody asked for."""
        if unknown := sorted(set(self.values) - self._asked):
            known = ", ".join(sorted(self._asked))
            raise ConfigError(
                f"{self.where} has the unknown key {unknown[0]!r}. Known are {known}."
            )

    def _get(self, key: str, default: Any) -> Any:
        self._asked.add(key)
        found = self.values.get(key, default)
        if found is None:
            raise ConfigError(f"{self.where} lacks the key {key!r}.")
        return found

    def _bad(self, key: str, found: Any, wanted: str) -> None:
        raise ConfigError(f"{self.where}: {key} = {_shown(found)}, expected {wanted}.")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"
