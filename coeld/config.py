"""The configuration: one frozen tree that explains itself. Pure.

Every key carries its default, range, unit and trade-off beside it; `example()` turns that into
`agent.toml.example`. Unknown keys, wrong types and values out of range are ConfigErrors that name
the key, the value and what is allowed. Where files lie when nothing is said: coeld/host/places.py.
"""

import difflib
import ipaddress
import textwrap
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, NamedTuple, cast
from urllib.parse import unquote

from coeld.errors import ConfigError

SEARCHED: Final = (Path("agent.toml"), Path("/etc/coeld/agent.toml"))
"""Where a configuration is looked for when none is named, in this order."""


def _key(
    default: Any,
    text: str,
    low: float | None = None,
    high: float | None = None,
    allowed: tuple[str, ...] = (),
) -> Any:
    return field(
        default=default, metadata={"text": text, "low": low, "high": high, "allowed": allowed}
    )


@dataclass(frozen=True, slots=True)
class Device:
    """This device and where its files lie."""

    name: str = _key("", 'What people call it. "" = the host name.')
    state_dir: str = _key(
        "",
        'Identity and lock of this daemon; one directory per daemon. "" = $STATE_DIRECTORY under '
        "systemd, else $XDG_STATE_HOME/coeld (~/.local/state/coeld).",
    )
    store_dir: str = _key(
        "",
        'Models on disk; several daemons of one machine may share it. "" = $COELD_STORE, else '
        "$STATE_DIRECTORY/store under systemd, else ~/.local/share/coeld/store.",
    )
    disk_free_mb: int = _key(
        2000,
        "Megabytes (10^6 bytes) that stay free on the store's disk. While there are more, this "
        "device also keeps weights that it does not serve: a copy for when others vanish.",
        0,
        1_000_000_000,
    )
    battery_percent: int = _key(
        30,
        "On a battery with less charge than this, the device takes only parts that no other can "
        "hold. Higher spares the battery more. 0 = never spare it.",
        0,
        100,
    )
    disk_mb: int = _key(
        0,
        "Megabytes (10^6 bytes) that the store may take. Copies of what other devices serve are "
        "deleted when it takes more, never what this device needs or nobody else serves. "
        "0 = no limit but disk_free_mb, and nothing is deleted.",
        0,
        1_000_000_000,
    )


@dataclass(frozen=True, slots=True)
class Memory:
    """How much this device gives."""

    budget_mb: int = _key(
        0,
        "Megabytes (10^6 bytes) of weights this device may hold, trunk and experts together; less "
        "while there is less memory. 0 = measure: 60 % of the memory that coeld has or could have "
        "(within the cgroup's limit, if it is lower); the rest is for key-value caches, buffers "
        "and everything else that runs here.",
        0,
        10_000_000,
    )
    narrow: bool = _key(
        True,
        "While the swarm lacks memory for all experts as they are stored, in 8 bits, it holds as "
        "many layers as it must in 4: answers get worse instead of being refused, and their usage "
        "and `coeld status` say how many experts are narrow. false = rather refuse; one device "
        "with the model that says so speaks for all.",
    )


@dataclass(frozen=True, slots=True)
class Engine:
    """How the engine process computes."""

    threads: int = _key(
        0,
        "Threads for kernels. 0 = all cores. Fewer keeps the device cool and responsive.",
        0,
        1024,
    )
    context_tokens: int = _key(
        2048,
        "Tokens of prompt and answer together. The key-value cache of each running request "
        "grows with it; the model's own limit also holds.",
        64,
        1_048_576,
    )
    requests_max: int = _key(
        4,
        "Requests answered at once; more are refused with 503. Each costs a key-value cache and "
        "slows the others.",
        1,
        64,
    )
    call_deadline_ms: int = _key(
        1000,
        "Milliseconds a call to an owner of experts may take before another owner is tried. "
        "Shorter notices a dead device sooner, longer forgives a slow one.",
        50,
        60_000,
    )
    kl_budget: float = _key(
        0.0,
        "How much an answer may lose where rows cross slow links: mean divergence of its "
        "predictions, in nats per token. 0 = nothing: rows travel whole and answers are those of "
        "one device. 0.02 makes long prompts travel at an eighth of the size and changes the next "
        "token in about one of 12 places. A request may say otherwise (x_coeld.kl_budget).",
        0.0,
        1.0,
    )
    patience_s: float = _key(
        10.0,
        "Seconds an answer waits for experts that have lost their only owner while the swarm gets "
        "no further with loading them, before it fails; and for the next version of the model "
        "before it begins.",
        0.0,
        600.0,
    )


@dataclass(frozen=True, slots=True)
class Model:
    """Which model this device serves."""

    name: str = _key("", 'Name of an installed model. "" = the only one that is installed.')


@dataclass(frozen=True, slots=True)
class Api:
    """Where programs on this machine ask."""

    socket: str = _key(
        "",
        'Path of the unix socket, at most 107 bytes. "" = $RUNTIME_DIRECTORY/coeld.sock under '
        "systemd, else $XDG_RUNTIME_DIR/coeld/coeld.sock, else coeld.sock in the state directory.",
    )
    tcp_port: int = _key(
        0, "Also serve on this TCP port of 127.0.0.1, for every local user. 0 = off.", 0, 65535
    )


@dataclass(frozen=True, slots=True)
class Network:
    """How other devices reach this one."""

    host: str = _key(
        "127.0.0.1",
        "Address that other devices connect to. There is no encryption yet, so anything but a "
        "loopback address needs allow_unencrypted = true.",
    )
    data_port: int = _key(
        0, "TCP port of the data path (expert calls). 0 = any free one.", 0, 65535
    )
    blob_port: int = _key(
        0,
        "TCP port where other devices fetch weights that are on this one's disk. 0 = any free one.",
        0,
        65535,
    )
    blob_mb_per_s: float = _key(
        10.0,
        "Megabytes (10^6 bytes) of weights per second that this device sends, and as many that it "
        "fetches. More fills a new device sooner and disturbs answers more. 0 = no limit.",
        0.0,
        100_000.0,
    )
    mqtt_port: int = _key(
        1884,
        "TCP port of the embedded MQTT broker. Not 1883, where a broker of yours may live. "
        "0 = any free one. Unused when swarm.brokers replace it.",
        0,
        65535,
    )
    allow_unencrypted: bool = _key(
        False,
        "true = accept that prompts, answers and control messages cross the network readable and "
        "changeable by anyone on it. Only for networks you trust entirely.",
    )


@dataclass(frozen=True, slots=True)
class Swarm:
    """Which devices belong together, and how they find each other."""

    name: str = _key("home", "Devices with the same name form one swarm: a-z, 0-9, - and _.")
    neighbours: tuple[str, ...] = _key(
        (), 'Devices to start from, as "host:mqtt_port". One that is up is enough.'
    )
    discovery: str = _key(
        "mdns",
        '"mdns" = announce this device and find others on the local network, "off" = only the '
        "neighbours named here.",
        allowed=("mdns", "off"),
    )
    brokers: tuple[str, ...] = _key(
        (),
        'Use these MQTT brokers, as "mqtt://host:port" or "mqtts://user:password@host:port". With '
        "several, each that is up is used, so that no device waits for a broker that is gone.",
    )
    brokers_ca: str = _key(
        "", 'File with the certificates that mqtts:// brokers are signed with. "" = the system\'s.'
    )
    brokers_only: bool = _key(
        True,
        "true = brokers replace the embedded one. false = both at once: devices also find each "
        "other on the local network when the brokers are gone, at the price of more messages.",
    )
    heartbeat_ms: int = _key(
        500,
        "Milliseconds between this device's signs of life. Shorter notices failures sooner and "
        "costs more messages.",
        50,
        60_000,
    )
    silence_ms: int = _key(
        3000,
        "Milliseconds without a sign of life after which a device is suspected, when nothing else "
        "told of its failure. At least twice the heartbeat. Shorter is quicker and accuses busy "
        "devices more often.",
        100,
        600_000,
    )
    suspicion_ms: int = _key(
        1000,
        "Milliseconds a suspected device has to object before it counts as dead and its experts "
        "are given away; at least the heartbeat. Longer forgives stalls, shorter recovers sooner.",
        50,
        600_000,
    )
    spans: bool = _key(
        True,
        "true: devices run consecutive whole layers for each other in one call where the market "
        "finds that cheaper, and share layers where that is clearly faster still. false: every "
        "layer whose experts are elsewhere is a call by itself. The same on all devices.",
    )

    @property
    def embedded(self) -> bool:
        """Whether this device runs a broker of its own."""
        return not (self.brokers and self.brokers_only)


@dataclass(frozen=True, slots=True)
class Config:
    """Everything that can be set."""

    device: Device = Device()
    memory: Memory = Memory()
    engine: Engine = Engine()
    model: Model = Model()
    api: Api = Api()
    network: Network = Network()
    swarm: Swarm = Swarm()


def load(path: Path | None) -> Config:
    """Read the file at `path`, or the first one of SEARCHED, or take the defaults.

    Raises ConfigError when the file cannot be read, is not TOML, or says something impossible.
    """
    if path is None:
        path = next((place for place in SEARCHED if place.is_file()), None)
        if path is None:
            return Config()
    try:
        return parse(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise ConfigError(f"{path}: cannot be read ({reason}).") from exc


def parse(text: str, source: str = "configuration") -> Config:
    """TOML to a checked Config. Raises ConfigError, naming `source`."""
    try:
        value = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"{source}: not valid TOML: {exc}.") from exc
    try:
        config = cast(Config, _tree(Config, value, ""))
        _check_across(config)
    except ConfigError as exc:
        raise ConfigError(f"{source}: {exc}") from None
    return config


def _tree(cls: type[Any], value: Mapping[str, Any], prefix: str) -> Any:
    """One table to its dataclass."""
    known = {item.name: item for item in fields(cls)}
    found: dict[str, Any] = {}
    for name, given in value.items():
        if name not in known:
            raise ConfigError(_unknown(f"{prefix}{name}", [f"{prefix}{key}" for key in known]))
        item = known[name]
        if item.metadata:
            found[name] = _value(f"{prefix}{name}", given, item.default, item.metadata)
        elif isinstance(given, dict):
            found[name] = _tree(type(item.default), given, f"{name}.")
        else:
            raise ConfigError(f"{name} = {given!r}: this is a section, write it as [{name}].")
    return cls(**found)


def _unknown(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, [*known, *_all_keys()], n=1)
    hint = f"Did you mean {near[0]}?" if near else f"Known here: {', '.join(sorted(known))}."
    return f"unknown key {key}. {hint}"


def _all_keys() -> list[str]:
    return [
        f"{top.name}.{key.name}" for top in fields(Config) for key in fields(cast(Any, top.default))
    ]


_TYPES: Final = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def _value(key: str, given: Any, default: Any, rules: Mapping[str, Any]) -> Any:
    """One value, checked against its type, range and choices."""
    if isinstance(default, tuple):
        if not isinstance(given, list) or not all(isinstance(item, str) for item in given):
            raise ConfigError(f"{key} = {given!r}: must be a list of texts.")
        return tuple(given)
    wanted = type(default)
    if wanted is float and type(given) is int:
        given = float(given)
    if type(given) is not wanted:
        raise ConfigError(f"{key} = {given!r}: must be {_TYPES[wanted]}.")
    low, high = rules["low"], rules["high"]
    if low is not None and not low <= given <= high:  # also catches NaN
        raise ConfigError(f"{key} = {given!r}: must be between {low} and {high}.")
    if rules["allowed"] and given not in rules["allowed"]:
        choices = " or ".join(f'"{choice}"' for choice in rules["allowed"])
        raise ConfigError(f"{key} = {given!r}: must be {choices}.")
    if isinstance(given, str) and "\0" in given:
        raise ConfigError(f"{key} = {given!r}: must not contain a NUL character.")
    return given


def _check_across(config: Config) -> None:
    """What one key alone cannot tell."""
    swarm, network = config.swarm, config.network
    legal = set("abcdefghijklmnopqrstuvwxyz0123456789-_")
    if not 1 <= len(swarm.name) <= 32 or set(swarm.name) - legal:
        raise ConfigError(
            f"swarm.name = {swarm.name!r}: must be 1 to 32 characters out of a-z, 0-9, - and _."
        )
    if swarm.silence_ms < 2 * swarm.heartbeat_ms:
        raise ConfigError(
            f"swarm.silence_ms = {swarm.silence_ms}: must be at least twice swarm.heartbeat_ms "
            f"({swarm.heartbeat_ms}), or one lost message looks like a dead device."
        )
    if swarm.suspicion_ms < swarm.heartbeat_ms:
        raise ConfigError(
            f"swarm.suspicion_ms = {swarm.suspicion_ms}: must be at least swarm.heartbeat_ms "
            f"({swarm.heartbeat_ms}), or no device could object in time."
        )
    for address in swarm.neighbours:
        split_address("swarm.neighbours", address)
    for url in swarm.brokers:
        broker_at(url)
    fixed = (network.data_port, network.blob_port, config.api.tcp_port)
    ports = [port for port in fixed if port]
    ports += [network.mqtt_port] if network.mqtt_port and swarm.embedded else []
    if len(set(ports)) != len(ports):
        raise ConfigError(
            "network.data_port, network.blob_port, network.mqtt_port and api.tcp_port must differ "
            "from each other."
        )
    if network.host in ("", "0.0.0.0", "::"):
        raise ConfigError(
            f"network.host = {network.host!r}: name one address of this device, because the others "
            "are told to connect to it."
        )
    if not network.allow_unencrypted and not is_loopback(network.host):
        raise ConfigError(
            f"network.host = {network.host!r}: only loopback addresses (127.0.0.1, ::1, "
            "localhost) are allowed, because coeld does not encrypt yet and everybody on the "
            "network could read and change what devices say. On a network you trust entirely, "
            "set network.allow_unencrypted = true."
        )


def is_loopback(host: str) -> bool:
    """Whether `host` can only be reached from this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def split_address(key: str, text: str) -> tuple[str, int]:
    """ "host:port" or "[v6]:port". Raises ConfigError naming `key`."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isascii() or not port.isdigit() or not 1 <= int(port) <= 65535:
        raise ConfigError(f'{key} = {text!r}: must be "host:port" with a port between 1 and 65535.')
    return host, int(port)


class Broker(NamedTuple):
    """Where an MQTT broker of the user's own listens, and how to be let in."""

    host: str
    port: int
    tls: bool = False
    user: str = ""
    password: str = ""


def broker_at(url: str) -> Broker:
    """ "mqtt[s]://[user[:password]@]host[:port]", port 1883 or 8883 if unsaid, user and password
    percent-encoded. Raises ConfigError, which does not repeat a password."""
    scheme, _, rest = url.partition("://")
    login, at, address = rest.rpartition("@")
    user, _, password = (unquote(word) for word in login.partition(":"))
    if scheme not in ("mqtt", "mqtts") or not address or "/" in address or (at and not user):
        shown = url.replace(login, "…") if login else url
        raise ConfigError(
            f'swarm.brokers = {shown!r}: must look like "mqtt://host:port" or '
            '"mqtts://user:password@host:port" (percent-encode / and @ in a password).'
        )
    port = 8883 if scheme == "mqtts" else 1883
    has_port = ":" in address.rpartition("]")[2]
    host, port = split_address("swarm.brokers", address if has_port else f"{address}:{port}")
    return Broker(host, port, scheme == "mqtts", user, password)


def example() -> str:
    """The text of agent.toml.example: every key, explained, at its default."""
    lines = [
        "# coeld: configuration of one device. Generated by `coeld config`; every value shown is",
        "# the default. Looked for as ./agent.toml, then /etc/coeld/agent.toml, unless",
        "# `coeld up --config FILE` names another.",
    ]
    for top in fields(Config):
        lines += ["", f"# {type(top.default).__doc__}", f"[{top.name}]"]
        for key in fields(cast(Any, top.default)):
            rules = key.metadata
            text = rules["text"]
            if rules["low"] is not None:
                text += f" Range: {rules['low']} to {rules['high']}."
            lines += [f"# {line}" for line in textwrap.wrap(text, 96)]
            lines.append(f"{key.name} = {_toml(key.default)}")
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    return str(list(value)) if isinstance(value, tuple) else str(value)
