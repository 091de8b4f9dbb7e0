"""The demo: separate daemons on loopback organise themselves, answer, lose one, and go on.

Every device gets a memory budget that cannot hold the whole model; all but one can. With two
devices the survivor alone cannot hold it, so there the killed device is started again at once and
the answer waits for it.
"""

import argparse
import contextlib
import http.client
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from coeld.model.store import Store

ROOT = Path(__file__).resolve().parent.parent
MODEL = "smollm2-135m-instruct"
COELD = Path(sys.executable).with_name("coeld")
MEASURE = """
import sys
from pathlib import Path
from coeld.engine.calibrate import conditions, measure
from coeld.engine.sessions import use_threads
from coeld.host.remembered import remember
threads = int(sys.argv[2])
use_threads(threads)
depends_on = conditions(threads)
remember(Path(sys.argv[1]), depends_on, measure(depends_on["clock_mhz"]).to_json())
"""
ORGANISE_S_MAX = 30.0
ANSWER_TOKENS = 160
KILL_AT_PIECE = 25


class Failed(Exception):
    """The demo did not show what it promises."""


@cache
def calibration(threads: int) -> bytes:
    """How fast this machine is, as an engine remembers it: measured once and alone. Several devices
    that measure themselves on the same cores at the same time would all be wrong."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "calibration.json"
        subprocess.run([sys.executable, "-c", MEASURE, path, str(threads)], check=True)
        return path.read_bytes()


@dataclass
class Device:
    """One daemon: its folder, its socket, its process."""

    number: int
    folder: Path
    process: subprocess.Popen[bytes] | None = None
    model: str = MODEL
    narrow: bool = False
    """Hold layers in fewer bits where memory is short: the text then differs."""

    @property
    def name(self) -> str:
        return f"device-{self.number}"

    @property
    def socket(self) -> Path:
        return self.folder / "api.sock"

    def configure(self, mqtt_port: int, seed_port: int, budget_mb: int, threads: int) -> None:
        state = self.folder / "state"
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        (state / "calibration.json").write_bytes(calibration(threads))
        neighbours = [] if seed_port == mqtt_port else [f"127.0.0.1:{seed_port}"]
        (self.folder / "agent.toml").write_text(
            f"""
[device]
name = "{self.name}"
state_dir = "{state}"
store_dir = "{os.environ["COELD_STORE"]}"
[memory]
budget_mb = {budget_mb}
narrow = {json.dumps(self.narrow)}
[engine]
threads = {threads}
[model]
name = "{self.model}"
[api]
socket = "{self.socket}"
[network]
mqtt_port = {mqtt_port}
[swarm]
name = "demo"
neighbours = {json.dumps(neighbours)}
discovery = "off"
"""
        )

    def start(self) -> None:
        log = (self.folder / "log.txt").open("ab")
        with log:
            self.process = subprocess.Popen(
                [COELD, "up", "--config", self.folder / "agent.toml"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # so that agent and engine can be killed together
            )

    def status(self) -> dict[str, Any] | None:
        try:
            return request(self.socket, "GET", "/status")
        except (OSError, http.client.HTTPException, ValueError):
            return None

    def kill(self) -> None:
        """kill -9 of agent and engine: the plug is pulled."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def terminate(self) -> None:
        """Tell it to stop: it hands over what others need, unless they were told as well."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.kill()
                raise Failed(f"{self.name} did not stop within 5 s") from None


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def request(path: Path, method: str, target: str) -> dict[str, Any]:
    with contextlib.closing(UnixConnection(path)) as connection:
        connection.request(method, target)
        value: dict[str, Any] = json.loads(connection.getresponse().read())
        return value


def stream(path: Path, prompt: str, tokens: int = ANSWER_TOKENS) -> Iterator[dict[str, Any]]:
    """The chunks of a streamed chat completion."""
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    with contextlib.closing(UnixConnection(path)) as connection:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise Failed(f"the request was refused: {response.read().decode()}")
        for line in response:
            if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise Failed(f"the answer broke off: {chunk['error']['message']}")
                yield chunk


def say(text: str = "") -> None:
    print(text, flush=True)


@dataclass
class Answer:
    """What came back."""

    text: str = ""
    reason: str = ""
    pieces: int = 0
    silence_s: float = 0.0
    """The longest pause between two chunks."""
    usage: dict[str, Any] = field(default_factory=dict)


def ask(device: Device, prompt: str, at_piece: int = -1, then: Any = None) -> Answer:
    """Stream an answer to the terminal; call `then` after `at_piece` pieces of text."""
    say(f'\n\033[1m> coeld ask "{prompt}"\033[0m   (through {device.name})')
    answer, last = Answer(), None
    for chunk in stream(device.socket, prompt):
        now = time.monotonic()
        answer.silence_s = max(answer.silence_s, now - (last or now))
        last = now
        answer.usage = chunk.get("usage") or answer.usage
        for choice in chunk["choices"]:
            answer.reason = choice["finish_reason"] or answer.reason
            piece = choice["delta"].get("content") or ""
            answer.text += piece
            print(piece, end="", flush=True)
            answer.pieces += bool(piece)
            if piece and answer.pieces == at_piece:
                then()
    if answer.reason not in ("stop", "length") or not answer.text:
        raise Failed(f"the answer is incomplete (finish_reason {answer.reason!r})")
    say(
        f"\n\033[2m[{answer.usage['completion_tokens']} tokens, "
        f"{answer.usage['x_coeld']['decode_tokens_per_s']} tok/s, complete: {answer.reason}, "
        f"longest silence {answer.silence_s:.2f} s]\033[0m"
    )
    return answer


def covered(status: dict[str, Any]) -> bool:
    """Does this device know an owner for every expert?"""
    routes = status["node"]["routes"]
    return bool(0 < routes["total"] == routes["covered"])


def settled(devices: list[Device], members: int) -> bool:
    """Everybody sees `members` devices, everything is covered, all agree on the routes."""
    views = [device.status() for device in devices]
    prints = set()
    for view in views:
        if view is None or not covered(view):
            return False
        alive = [m for m in view["node"]["members"] if m["status"] == "alive"]
        if len(alive) != members:
            return False
        prints.add(view["node"]["routes"]["fingerprint"])
    return len(prints) == 1


def wait_settled(devices: list[Device], members: int, since: float) -> float:
    while time.monotonic() - since < ORGANISE_S_MAX:
        if settled(devices, members):
            return time.monotonic() - since
        if any(device.process and device.process.poll() is not None for device in devices):
            break
        time.sleep(0.05)
    logs = devices[0].folder.parent / "*/log.txt"
    raise Failed(f"the devices did not organise themselves: see {logs}")


def lots_served(device: Device) -> int:
    """By the device's own account."""
    node = (device.status() or {"node": {"me": "", "members": []}})["node"]
    return sum(member["serving"] for member in node["members"] if member["node"] == node["me"])


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def budget_mb(count: int, model: str = MODEL) -> int:
    """Whole megabytes with which all devices but one hold the model, and one alone does not."""
    manifest = Store(Path(os.environ["COELD_STORE"])).manifest(model)
    layers = manifest.shape.layers
    share = layers * 3 // 5 if count == 2 else math.ceil(layers / (count - 1))
    layer_bytes = manifest.shape.experts * manifest.demand().lot_bytes
    return math.ceil((manifest.trunk_bytes + share * layer_bytes) / 1e6)


def prepare(arguments: argparse.Namespace) -> list[Device]:
    if MODEL not in Store(Path(os.environ["COELD_STORE"])).names():
        subprocess.run([COELD, "model", "add", MODEL], check=True)
    folder = ROOT / ".demo"
    devices = [Device(n + 1, folder / f"device-{n + 1}") for n in range(arguments.devices)]
    for earlier in folder.glob("device-*"):
        stop_kept(Device(0, earlier))
        shutil.rmtree(earlier)
    ports = free_ports(len(devices))
    size, threads = budget_mb(len(devices)), max(1, (os.cpu_count() or 1) // len(devices))
    for device, port in zip(devices, ports, strict=True):
        device.configure(port, ports[0], size, threads)
    manifest = Store(Path(os.environ["COELD_STORE"])).manifest(MODEL)
    say(
        f"\n{len(devices)} devices, each with a budget of {size} MB; the model has "
        f"{manifest.weights_bytes / 1e6:.0f} MB of weights, {manifest.trunk_bytes / 1e6:.0f} MB of "
        "them needed by every device that decodes."
    )
    return devices


def show(device: Device) -> None:
    subprocess.run([COELD, "status", "--socket", device.socket], check=True)


def play(devices: list[Device], arguments: argparse.Namespace) -> None:
    started = time.monotonic()
    for device in devices:
        device.start()
    took_s = wait_settled(devices, len(devices), started)
    say(f"They organised themselves in {took_s:.1f} s.")
    show(devices[0])
    undisturbed = ask(devices[0], arguments.prompt)

    victim = max(devices, key=lots_served)
    others = [device for device in devices if device is not victim]
    killed_at = 0.0

    def pull_the_plug() -> None:
        nonlocal killed_at
        victim.kill()
        killed_at = time.monotonic()
        print(f"\033[31m <kill -9 {victim.name}> \033[0m", end="", flush=True)
        if len(devices) == 2:  # one device alone cannot hold the model: the answer waits for it
            victim.start()

    middle = min(KILL_AT_PIECE, max(1, undisturbed.pieces // 2))
    answer = ask(others[0], arguments.prompt, middle, pull_the_plug)
    same = "the same as" if answer.text == undisturbed.text else "not the same as"
    say(f"The text is {same} that of the undisturbed answer.")
    alive = devices if len(devices) == 2 else others
    took_s = wait_settled(alive, len(alive), killed_at)
    say(f"\n{victim.name} was killed in mid-answer; {took_s:.1f} s later everything had an owner.")
    show(others[0])
    if arguments.keep:
        keep(devices, victim)


def stop_kept(device: Device) -> None:
    """Stop a device that an earlier --keep left running in this folder."""
    status = device.status()
    if status is not None:
        os.kill(status["agent"]["pid"], signal.SIGTERM)
        while device.status() is not None:
            time.sleep(0.05)


def keep(devices: list[Device], victim: Device) -> None:
    """Everything runs again and goes on running when the demo has ended."""
    if victim.process is not None and victim.process.poll() is not None:
        victim.start()
        wait_settled(devices, len(devices), time.monotonic())
    path = devices[0].socket
    say("\nThe devices keep running. Try:")
    for command in (
        f'{COELD} ask --socket {path} "Why is the sky blue?"',
        f"{COELD} status --socket {path}",
        f"curl --unix-socket {path} http://localhost/v1/models",
        f"tail -f {devices[0].folder.parent}/*/log.txt",
    ):
        say(f"  {command}")
    pids = " ".join(str(device.process.pid) for device in devices if device.process)
    say(f"Stop them with:\n  kill {pids}")


def stop(devices: Sequence[Device]) -> None:
    for device in devices:
        device.terminate()
    for device in devices:
        device.stop()


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument("--devices", type=int, default=3, choices=range(2, 9), metavar="2-8")
    parser.add_argument("--prompt", default="Explain in a few sentences why the sky is blue.")
    parser.add_argument("--keep", action="store_true", help="leave it running")
    arguments = parser.parse_args()
    os.environ.setdefault("COELD_STORE", str(ROOT / ".demo" / "store"))
    devices: list[Device] = []
    try:
        devices = prepare(arguments)
        play(devices, arguments)
    except (Failed, subprocess.CalledProcessError) as exc:
        say(f"\n\033[31mThe demo failed: {exc}\033[0m")
        stop(devices)
        return 1
    except BaseException:
        stop(devices)
        raise
    else:
        if arguments.keep:
            return 0
        stop(devices)
        say("\nAll devices have stopped. Both answers were complete.")
        return 0


if __name__ == "__main__":
    sys.exit(main())
