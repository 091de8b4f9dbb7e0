"""The configuration: what is refused, and how it is said."""

from pathlib import Path

import pytest

from coeld.config import Broker, Config, broker_at, example, load, parse, split_address
from coeld.errors import ConfigError

EXAMPLE = Path(__file__).parents[3] / "agent.toml.example"


def test_the_committed_example_is_the_one_the_code_generates() -> None:
    assert EXAMPLE.read_text() == example(), "run: coeld config > agent.toml.example"


def test_the_example_loads_and_says_nothing_but_the_defaults() -> None:
    assert parse(example()) == Config()


def test_an_empty_file_is_all_defaults() -> None:
    assert parse("") == Config()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[engine]\nthread = 2", "unknown key engine.thread. Did you mean engine.threads?"),
        ("[enginee]\nthreads = 2", "unknown key enginee."),
        ("[swarm]\nmqtt_port = 1", "unknown key swarm.mqtt_port. Did you mean network.mqtt_port?"),
        ("[api]\nxyzzy = 1", "Known here: api.socket, api.tcp_port."),
        ("threads = 2", "unknown key threads."),
        ("engine = 3", "write it as [engine]"),
        ('[engine]\nthreads = "two"', "engine.threads = 'two': must be a whole number"),
        ("[engine]\nthreads = true", "engine.threads = True: must be a whole number"),
        ("[engine]\nthreads = 1.5", "must be a whole number"),
        ("[engine]\nthreads = -1", "must be between 0 and 1024"),
        ("[engine]\npatience_s = nan", "must be between 0.0 and 600.0"),
        ("[engine]\npatience_s = true", "must be a number"),
        ("[memory]\nbudget_mb = 99999999999", "memory.budget_mb"),
        ("[network]\ndata_port = 65536", "network.data_port = 65536: must be between 0 and 65535"),
        ("[network]\nallow_unencrypted = 1", "must be true or false"),
        ('[network]\nhost = "192.168.1.7"', "coeld does not encrypt yet"),
        ('[network]\nhost = "pi.local"', "only loopback addresses"),
        ('[network]\nhost = "0.0.0.0"\nallow_unencrypted = true', "name one address"),
        ("[network]\ndata_port = 7000\nmqtt_port = 7000", "must differ"),
        ("[api]\ntcp_port = 1884", "must differ"),
        ('[swarm]\ndiscovery = "bonjour"', 'must be "mdns" or "off"'),
        ('[swarm]\nname = "Our Home"', "a-z, 0-9, - and _"),
        ('[swarm]\nname = ""', "1 to 32 characters"),
        ('[swarm]\nname = "a/b"', "a-z, 0-9"),
        ("[swarm]\nneighbours = [1]", "must be a list of texts"),
        ('[swarm]\nneighbours = "pi:1"', "must be a list of texts"),
        ('[swarm]\nneighbours = ["pi"]', 'must be "host:port"'),
        ('[swarm]\nneighbours = ["pi:0"]', 'must be "host:port"'),
        ('[swarm]\nneighbours = ["pi:²"]', 'must be "host:port"'),
        ('[swarm]\nbrokers = ["http://pi:1883"]', 'must look like "mqtt://host:port"'),
        ('[swarm]\nbrokers = ["mqtt://u:p@pi:1/x"]', 'must look like "mqtt://host:port"'),
        ("[swarm]\nheartbeat_ms = 2000", "must be at least twice swarm.heartbeat_ms"),
        ("[swarm]\nheartbeat_ms = 1500\nsuspicion_ms = 1000", "swarm.suspicion_ms"),
        ('[device]\nname = "a\\u0000b"', "NUL"),
        ("[engine\n", "not valid TOML"),
    ],
)
def test_what_is_wrong_is_named_with_what_is_allowed(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, "agent.toml")
    assert says in str(caught.value)
    assert str(caught.value).startswith("agent.toml: ")


def test_another_address_needs_a_deliberate_word() -> None:
    config = parse('[network]\nhost = "192.168.1.7"\nallow_unencrypted = true')
    assert config.network.host == "192.168.1.7"


def test_a_whole_number_is_a_number() -> None:
    assert parse("[engine]\npatience_s = 3").engine.patience_s == 3.0


def test_a_missing_file_is_an_error_only_when_it_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("coeld.config.SEARCHED", (Path("agent.toml"),))
    assert load(None) == Config()
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "nowhere.toml")


def test_agent_toml_in_the_working_directory_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "agent.toml").write_text("[engine]\nthreads = 3")
    assert load(None).engine.threads == 3


def test_binary_rubbish_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "a.toml")


def test_addresses_with_brackets_and_default_ports() -> None:
    assert split_address("k", "[::1]:1884") == ("::1", 1884)
    assert broker_at("mqtt://pi.local") == Broker("pi.local", 1883)
    assert broker_at("mqtts://[::1]") == Broker("::1", 8883, tls=True)
    assert broker_at("mqtt://[::1]:77") == Broker("::1", 77)
    login = broker_at("mqtts://me:p%40s%2Fs%3A@pi:1")
    assert login == Broker("pi", 1, True, "me", "p@s/s:")
    assert broker_at("mqtt://me@pi") == Broker("pi", 1883, False, "me", "")


@pytest.mark.parametrize(
    "url",
    ["http://me:secret@pi", "mqtt://me:secret@", "mqtt://me:secret@pi/x", "mqtt://:secret@pi"],
)
def test_a_broker_that_is_none_is_refused_without_telling_the_password(url: str) -> None:
    with pytest.raises(ConfigError, match=r"swarm\.brokers") as error:
        parse(f"[swarm]\nbrokers = ['{url}']")
    assert "secret" not in str(error.value)
