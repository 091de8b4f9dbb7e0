"""The command line: what it imports, what it says, how it exits."""

import errno
import io
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from coeld.ui.cli import COMMANDS, HELP, main, parser_for
from coeld.ui.doctor_command import machine
from coeld.ui.status_command import (
    asked,
    devices,
    headline,
    layers_owned,
    links,
    rollout,
    this_device,
)

HEAVY = ("numpy", "onnxruntime", "onnx", "gguf", "tokenizers", "jinja2", "rich", "zeroconf")


def modules_after(code: str) -> set[str]:
    command = [sys.executable, "-c", f"{code}; import sys; print(*sys.modules)"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return set(done.stdout.split())


def test_the_agent_imports_nothing_heavy() -> None:
    assert not modules_after("import coeld.agent") & set(HEAVY)


def test_the_command_line_imports_only_what_it_needs() -> None:
    code = "from coeld.ui.cli import parser_for; parser_for(['ask', 'x']); parser_for(['bench'])"
    assert not modules_after(code) & {*HEAVY, "amqtt", "psutil", "asyncio", "starlette"}


def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert COMMANDS.keys() == HELP.keys()
    for name in COMMANDS:
        with pytest.raises(SystemExit) as caught:
            main([name, "--help"])
        assert caught.value.code == 0
    assert "usage: coeld eval" in capsys.readouterr().out


def test_config_prints_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config"]) == 0
    assert "[swarm]" in capsys.readouterr().out


def test_errors_are_one_line_and_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.toml").write_text("[engine]\nthread = 1")
    assert main(["up", "--config", str(tmp_path / "a.toml")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("coeld: ")
    assert "Did you mean engine.threads?" in error
    assert error.count("\n") == 1


def test_doctor_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COELD_STORE", str(tmp_path))
    assert main(["doctor", "--socket", str(tmp_path / "none")]) == 1
    out = capsys.readouterr().out
    assert "ok python" in out
    assert "coeld model add" in out
    assert "coeld up" in out


def test_doctor_has_the_model_installed_where_the_daemon_looks_for_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.toml").write_text(f'[device]\nstore_dir = "{tmp_path}/my models"')
    main(["doctor", "--config", str(tmp_path / "a.toml"), "--socket", str(tmp_path / "none")])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "model add" in line]
    words = shlex.split(line.partition("coeld ")[2])
    arguments = parser_for(words).parse_args(words)
    assert arguments.store == tmp_path / "my models"


def test_a_reader_that_goes_away_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "coeld", "config"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
def test_output_that_cannot_be_written_is_one_line_and_status_1() -> None:
    command = [sys.executable, "-m", "coeld", "config"]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=60, check=False)
    assert (done.returncode, done.stderr.count(b"\n")) == (1, 1)
    assert done.stderr.startswith(b"coeld: writing failed: No space left on device.")


def test_an_error_of_the_system_that_is_not_about_writing_is_not_hidden(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(_: object) -> int:
        raise PermissionError(errno.EPERM, "forbidden")

    monkeypatch.setattr("coeld.ui.config_command.run", run)
    with pytest.raises(PermissionError):
        main(["config"])


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_lead_nowhere(closed: str) -> None:
    for words, status in (("config", 0), ("ask - --socket /nowhere", 1)):
        command = f"exec {sys.executable} -m coeld {words} {closed}"
        done = subprocess.run(
            ["sh", "-c", command], stdin=subprocess.DEVNULL, capture_output=True, timeout=60
        )
        assert (done.returncode, b"Traceback" in done.stderr) == (status, False)


def test_what_the_terminal_cannot_show_is_escaped() -> None:
    code = "from coeld.ui.cli import main; main(['config']); print('é\\U0001f984')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.endswith(b"\\xe9\\U0001f984\n")


def test_bytes_that_are_no_text_are_read_as_such() -> None:
    command = [sys.executable, "-m", "coeld", "ask", "-", "--socket", "/nowhere"]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
        input=b"\xff\xfe",
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, b"no daemon answers" in done.stderr) == (1, True)


def swarm_status(devices: int) -> dict[str, Any]:
    """Devices that own every other layer each, as /status describes them."""
    members = [
        {
            "node": f"{number:016x}",
            "name": f"raspberry-{number}",
            "status": "alive",
            "memory_budget_bytes": 1_104_000_000,
            "kernel_mb_per_s": 16_834,
            "cpu_load_percent": 100,
            "serving": 120,
            "narrow": 24,
            "engine": True,
        }
        for number in range(devices)
    ]
    runs = [[layer, 0, 8] for layer in range(0, 29, 2)] + [[29, 3, 5]]
    model = {
        "experts": 8,
        "trunk_bytes": 60_192_000,
        "lot_bytes": 352_512,
        "narrow_lot_bytes": 190_000,
    }
    owners = {member["node"]: runs for member in members}
    return {"node": {"me": f"{0:016x}", "members": members, "model": model, "owners": owners}}


def test_the_headline_says_how_many_experts_are_narrow() -> None:
    routes = {"covered": 240, "total": 240, "epoch": 9, "missing_bytes": 0, "narrow": 0}
    node = {"model": {"name": "m"}, "routes": routes, "members": []}
    status = {"node": node, "engine": {"trouble": "", "load_trouble": ""}}
    assert headline(status) == "m: 240 of 240 experts are served, epoch 9"
    routes["narrow"] = 24
    assert "24 of them are held in fewer bits than stored" in headline(status)


def test_what_could_not_be_loaded_is_said_beside_what_is_missing() -> None:
    routes = {"covered": 239, "total": 240, "epoch": 9, "missing_bytes": 7, "narrow": 0}
    node = {"model": {"name": "m"}, "routes": routes, "members": []}
    status = {"node": node, "engine": {"trouble": "", "load_trouble": "blob 7 is damaged."}}
    assert headline(status).splitlines()[1:] == [
        "7 bytes of memory are missing in the swarm",
        "this device could not load all its experts: blob 7 is damaged.",
    ]


@pytest.mark.parametrize("width", [80, 200])
def test_the_table_of_devices_fits_the_terminal(width: int) -> None:
    out = io.StringIO()
    Console(file=out, width=width).print(devices(swarm_status(3)))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    (line,) = [line for line in lines if "raspberry-0 *" in line]  # names are not folded
    assert "99 of 1,104 MB  16.8 GB/s  100 %  120" in line
    assert "29[3-7]" in out.getvalue()
    if width == 200:
        assert len(lines) <= 9


def test_only_those_are_named_who_are_asked() -> None:
    status = swarm_status(3)
    rates = {"requests": 0.0, "prompt_tokens": 0.0, "tokens": 0.0}
    for member in status["node"]["members"]:
        member["asked_per_min"] = rates
    assert asked(status) == ""
    status["node"]["members"][1]["asked_per_min"] = {
        "requests": 1.07, "prompt_tokens": 136.53, "tokens": 1092.27
    }  # fmt: skip
    status["node"]["members"][2]["asked_per_min"] = None  # it is gone
    assert asked(status) == (
        "raspberry-1 is asked, per minute, about 1.1 requests with 137 tokens, and answers 1,092"
    )


def test_who_has_which_version_is_shown_while_they_differ() -> None:
    def versions(number: int, requests: str = "serving", following: int | None = None) -> dict:
        progress = "ready" if following else None
        return {
            "model": "m", "open": number, "requests": requests, "next": following,
            "progress": progress,
        }  # fmt: skip

    members = [
        {"name": "one", "node": "1", "versions": versions(2)},
        {"name": "two", "node": "2", "versions": versions(1, "draining", 2)},
        {"name": "other", "node": "3", "versions": versions(7) | {"model": "n"}},
        {"name": "gone", "node": "4", "versions": None},
    ]
    status: dict[str, Any] = {
        "node": {"model": {"name": "m"}, "members": members},
        "weights": {"next": {"trouble": "the disk is full"}},
    }
    assert rollout(status).splitlines()[1:] == [
        "a new version is being rolled out:",
        "  one: version 2",
        "  two: version 1, ends its answers; version 2 is on disk",
        "the disk is full",
    ]
    members[1]["versions"] = versions(2)
    assert rollout(status) == ""


def test_devices_with_one_name_are_told_apart_by_their_keys() -> None:
    status = swarm_status(2)
    status["node"]["members"][1]["name"] = "raspberry-0"
    out = io.StringIO()
    Console(file=out, width=200).print(devices(status))
    assert f"raspberry-0 {1:016x}" in out.getvalue()


def test_owned_experts_are_shown_as_ranges() -> None:
    runs = [[0, 0, 8], [1, 0, 8], [2, 0, 4], [2, 6, 1], [4, 0, 8], [9, 2, 2]]
    assert layers_owned(runs, 8) == "0-1, 4, 2[0-3,6], 9[2-3]"
    assert layers_owned([], 8) == ""


SENSORS: dict[str, Any] = {
    "memory": {
        "total_bytes": 8_000_000_000,
        "available_bytes": 700_000_000,
        "pressure_percent": 31,
        "budget_bytes": 10**9,
    },
    "heat": {
        "celsius": 84,
        "where": "cpu-thermal",
        "limit_celsius": 85,
        "clock_mhz": 1500,
        "clock_full_mhz": 2400,
        "complaints": ["under-voltage"],
    },
    "battery": {"percent": 20, "discharging": True, "spared": True},
    "disk": {"free_bytes": 10**8, "read_mb_per_s": 88},
    "gpus": [{"name": "RTX 4060"}],
}


def test_what_ails_a_device_is_shown_with_what_to_do() -> None:
    kernels = {"dense": {"1": {"gb_per_s": 3.25, "us_per_row": 9}}}
    line = this_device({"sensors": SENSORS, "engine": {"kernels": kernels}})
    for part in ("pressure 31 %", "84 °C", "clock 1,500 of 2,400 MHz", "under-voltage"):
        assert part in line
    for part in ("battery 20 %, spared", "0.1 GB free, reads 88 MB/s", "dense kernels 3.2 GB/s"):
        assert part in line
    assert "RTX 4060 (not used)" in line
    advice = {check.name: check.advice for check in machine(SENSORS)}
    assert "memory.budget_mb" in advice["memory"]
    assert "power supply" in advice["heat"]
    assert "Plug it in" in advice["battery"]
    assert "nearly full" in advice["disk"]
    assert advice["gpu"] == ""


def test_a_device_without_sensors_has_nothing_to_complain_of() -> None:
    unknown = {"celsius": None, "limit_celsius": None, "clock_mhz": 0, "clock_full_mhz": 0}
    well = SENSORS | {
        "memory": SENSORS["memory"] | {"pressure_percent": 0},
        "heat": SENSORS["heat"] | unknown | {"complaints": []},
        "battery": None,
        "disk": {"free_bytes": 10**10, "read_mb_per_s": 0},
        "gpus": [],
    }
    line = this_device({"sensors": well, "engine": {"kernels": {}}})
    assert line == "700 MB of memory available, disk 10.0 GB free"
    assert [(check.name, check.advice) for check in machine(well)] == [("memory", ""), ("disk", "")]


def test_links_show_what_was_measured_and_what_is_assumed() -> None:
    status = swarm_status(3)
    bus = [
        {"node": f"{n:016x}", "host": "10.0.0.1", "port": 1, "up": True, "messages": 7}
        for n in (1, 2)
    ]
    measured = {"node": f"{1:016x}", "rtt_us": 420, "rtt_p99_us": 2310, "mb_per_s": 0}
    far = measured | {"node": "f" * 16, "mb_per_s": 31}
    peers = {f"{1:016x}": {"calls": 900, "rtt_us_p50": 800}}
    status["bus"] = {"topology": "embedded", "links": bus}
    status["engine"] = {"stats": {"peers": peers}, "links": [measured, far]}
    out = io.StringIO()
    Console(file=out, width=200).print(links(status))
    near, unknown, other = (
        next(line for line in out.getvalue().splitlines() if name in line)
        for name in ("raspberry-1", "raspberry-2", "f" * 16)
    )
    assert "0.80 ms  0.42 2.31 ms  assumed" in near
    assert unknown.count("assumed") == 2
    assert "31 MB/s" in other
