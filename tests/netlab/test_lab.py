"""That the emulation is true, measured with ordinary sockets; and that nothing of a lab stays.

Bounds hold on a busy machine: packets may come later than told, never earlier, and shares are
compared with five standard deviations.
"""

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netlab import PROFILES, Lab, Link, Profile, cgroups, missing
from tests.netlab.lab import ROOT, running, tell
from tests.netlab.probe import round_trips_s, stream_s

REASON = missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")
PORT = 4000
FAST = Profile(Link(), 1e9, 9000)
SLACK_S = 0.5
"""How late a busy machine may make the luckiest of many packets."""


class Ends:
    """A UDP socket on every device of a lab, in this process."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.socks = {}
        for name, address in lab.addresses.items():
            sock = self.socks[name] = lab.socket(name, socket.SOCK_DGRAM)
            sock.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE: we read late
            sock.bind((address, PORT))

    def send(self, a: str, b: str, data: bytes) -> None:
        self.socks[a].sendto(data, (self.lab.addresses[b], PORT))

    def receive(self, name: str, wait_s: float) -> list[bytes]:
        """What has come, until nothing comes for `wait_s`."""
        found = []
        while select.select([self.socks[name]], [], [], wait_s)[0]:
            found.append(self.socks[name].recv(65536))
        return found

    def passes(self, a: str, b: str, wait_s: float) -> bool:
        self.send(a, b, b"x")
        return bool(select.select([self.socks[b]], [], [], wait_s)[0] and self.receive(b, 0))

    def trips_s(self, a: str, b: str, count: int) -> list[float]:
        found = []
        for _ in range(count):
            started_s = time.monotonic()
            self.send(a, b, b"x")
            if select.select([self.socks[b]], [], [], 1)[0]:
                self.send(b, a, self.socks[b].recv(9))
                if select.select([self.socks[a]], [], [], 1)[0]:
                    self.socks[a].recv(9)
                    found.append(time.monotonic() - started_s)
        return found

    def close(self) -> None:
        for sock in self.socks.values():
            sock.close()


@pytest.fixture(scope="module")
def three() -> Iterator[Ends]:
    with Lab(["a", "b", "c"], FAST, seed=7) as lab:
        ends = Ends(lab)
        yield ends
        ends.close()


@pytest.fixture
def ends(three: Ends) -> Ends:
    three.lab.reset()
    return three


@pytest.mark.parametrize("name", ["lan", "wifi", "far"])
def test_round_trips_take_what_the_profile_says(name: str) -> None:
    profile = PROFILES[name]
    link = profile.link
    with Lab(["a", "b"], profile) as lab:
        pair = Ends(lab)
        trips_s = sorted(pair.trips_s("a", "b", 40))
        pair.close()
    assert trips_s[0] >= 2 * (link.delay_s - link.jitter_s)
    assert trips_s[0] <= 2 * (link.delay_s + link.jitter_s) + SLACK_S
    assert len(trips_s) >= 30


def test_one_direction_is_slowed_and_the_other_is_not(ends: Ends) -> None:
    ends.lab.link("a", "b", delay_s=0.05)
    assert min(ends.trips_s("a", "b", 5)) >= 0.05
    for a, b, slow in (("a", "b", True), ("b", "a", False)):
        took_s = []
        for _ in range(10):
            started_s = time.monotonic()
            assert ends.passes(a, b, 5)
            took_s.append(time.monotonic() - started_s)
        assert (min(took_s) >= 0.05) is slow


def test_the_share_of_lost_packets_is_the_one_asked_for(ends: Ends) -> None:
    ends.lab.link("a", "b", loss=0.2)
    before = ends.lab.show()["a > b"]["lost"]
    count, came = 3000, []
    for number in range(count):
        ends.send("a", "b", number.to_bytes(4, "big"))
        came += ends.receive("b", 0)
    came += ends.receive("b", SLACK_S)
    lost = count - len(set(came))
    assert abs(lost - 0.2 * count) < 5 * (count * 0.2 * 0.8) ** 0.5
    assert ends.lab.show()["a > b"]["lost"] - before == lost


def test_packets_arrive_in_order_unless_reordering_is_asked_for(ends: Ends) -> None:
    for share, wanted in ((0.0, False), (0.2, True)):
        ends.lab.link("a", "b", delay_s=0.001, jitter_s=0.001, reorder=share)
        for number in range(300):
            ends.send("a", "b", number.to_bytes(4, "big"))
        came = ends.receive("b", SLACK_S)
        assert len(came) == 300
        assert (came != sorted(came)) is wanted


def test_packets_that_wait_at_a_slow_port_leave_it_in_order() -> None:
    with Lab(["a", "b"], Profile(Link(delay_s=0.001, jitter_s=0.001), 8e6, 9000)) as lab:
        pair = Ends(lab)
        for _ in range(20):
            for number in range(300):
                pair.send("a", "b", number.to_bytes(4, "big"))
            came = pair.receive("b", SLACK_S)
            assert len(came) == 300
            assert came == sorted(came)
        pair.close()


def test_a_cut_works_in_one_direction_and_a_partition_in_both(ends: Ends) -> None:
    ends.lab.cut("a", "b")
    assert not ends.passes("a", "b", 0.1)
    assert ends.passes("b", "a", 5)
    ends.lab.partition(["a", "b"], ["c"])
    assert ends.passes("a", "b", 5)
    assert not ends.passes("a", "c", 0.1)
    assert not ends.passes("c", "b", 0.1)
    ends.lab.heal()
    assert ends.passes("a", "c", 5)
    assert ends.passes("c", "b", 5)


def test_multicast_reaches_everybody_else(ends: Ends) -> None:
    group = "239.1.2.3"
    for name, sock in ends.socks.items():
        own = socket.inet_aton(ends.lab.addresses[name])
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, own)
    listeners = {}
    for name in ("b", "c"):
        listeners[name] = sock = ends.lab.socket(name, socket.SOCK_DGRAM)
        sock.bind((group, PORT + 1))
        own = socket.inet_aton(ends.lab.addresses[name])
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton(group) + own)
    ends.socks["a"].sendto(b"hello", (group, PORT + 1))
    for sock in listeners.values():
        assert select.select([sock], [], [], 5)[0]
        assert sock.recv(9) == b"hello"
        sock.close()


def serve(lab: Lab, name: str) -> None:
    lab.start(name, [sys.executable, "-m", "tests.netlab.probe"], cwd=ROOT)


def test_a_stream_is_no_faster_than_the_rate_and_goes_on_after_a_cut(tmp_path: Path) -> None:
    """TCP through unchanged programs in both namespaces."""
    client = (
        "import sys; from tests.netlab.probe import *\n"
        "while not round_trips_s(sys.argv[1], 1): pass\n"
        "print('ready', flush=True); print(stream_s(sys.argv[1], int(sys.argv[2])))"
    )
    size = 1_000_000
    with Lab(["a", "b"], Profile(Link(), 20e6, 1500)) as lab:
        serve(lab, "b")
        argv = [sys.executable, "-c", client, lab.addresses["b"], str(size)]
        process = lab.start("a", argv, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        lab.partition(["a"], ["b"])
        cut = lab.show()["a > b"]["cut"]
        while lab.show()["a > b"]["cut"] == cut:  # until something has run into the cut
            assert process.poll() is None
        lab.heal()
        took_s = float(process.communicate()[0])
        assert process.returncode == 0
    assert took_s >= size * 8 / 20e6


def test_a_device_gets_no_more_cpu_and_memory_than_told() -> None:
    burn = (
        "import time; end = time.monotonic() + 1\n"
        "while time.monotonic() < end: pass\n"
        "print(time.process_time())"
    )
    with Lab(["a"], FAST) as lab:
        lab.limit("a", cpu=0.3, memory_bytes=64_000_000)
        done = lab.start("a", [sys.executable, "-c", burn], stdout=subprocess.PIPE, text=True)
        assert float(done.communicate()[0]) <= 0.4
        hungry = lab.start("a", [sys.executable, "-c", "x = b'x' * 200_000_000"])
        assert hungry.wait() == -signal.SIGKILL
        lab.limit("a")
        assert lab.start("a", [sys.executable, "-c", "x = b'x' * 200_000_000"]).wait() == 0


def groups_left(name: str) -> list[Path]:
    return cgroups.find(cgroups.places(), name)


def left_of(name: str) -> list[str]:
    """Groups of a lab, and its switch."""
    labs = [lab for lab in running() if lab.startswith(name)]
    return [*labs, *(str(path) for path in groups_left(name))]


def run_by_hand(*words: str) -> subprocess.Popen[str]:
    """The command line, with a program on each device that has a child and prints two pids."""
    program = 'sleep 1000 & echo "$$ $!"; wait'
    argv = [sys.executable, "-m", "tests.netlab", "--devices", "2", *words]
    return subprocess.Popen(
        [*argv, "--", "sh", "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


def pids_of(process: subprocess.Popen[str]) -> list[int]:
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(2)]
    assert sorted(line[:4] for line in lines) == ["d1| ", "d2| "]
    return [int(word) for line in lines for word in line[4:].split()]


def lives(pid: int) -> bool:
    """Runs; a zombie whose parent has not looked yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def gone(pids: list[int], timeout_s: float = 30) -> bool:
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s:
        if not any(lives(pid) for pid in pids):
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_however_a_lab_ends(how: signal.Signals) -> None:
    process = run_by_hand()
    name = cgroups.process_prefix(process.pid)
    pids = pids_of(process)
    assert len(groups_left(name)) == 4
    process.send_signal(how)
    expected = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[how]
    assert process.wait(30) == expected
    process.stdout.close()
    assert gone(pids)
    end_s = time.monotonic() + 30
    while left_of(name) and time.monotonic() < end_s:
        time.sleep(0.02)
    assert left_of(name) == []


def test_what_a_killed_lab_and_its_killed_switch_leave_is_swept_by_the_next() -> None:
    process = run_by_hand()
    name = cgroups.process_prefix(process.pid)
    pids = pids_of(process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (switch,) = (
        int(pid)
        for pid in children
        if "tests.netlab.switch" in Path(f"/proc/{pid}/cmdline").read_text()
    )
    os.kill(process.pid, signal.SIGSTOP)  # so that it cannot clean up when the switch dies
    os.kill(switch, signal.SIGKILL)
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()
    assert not gone(pids, 0.1)
    with Lab(["a"], FAST):
        assert groups_left(name) == []
    assert gone(pids)


def test_the_command_line_runs_a_command_per_device_and_collects_how_they_end() -> None:
    command = "echo {name} {ip} {index} {others}; exit $(({index} - 1))"
    done = subprocess.run(
        [sys.executable, "-m", "tests.netlab", "--devices", "3", "--", "sh", "-c", command],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert sorted(lines[:3])[1] == "d2| d2 10.77.0.2 2 10.77.0.1,10.77.0.3"
    assert lines[3] == "d1: status 0, d2: status 1, d3: status 2"


def test_a_running_lab_is_told_from_outside_and_refuses_nonsense() -> None:
    process = run_by_hand()
    name = cgroups.process_prefix(process.pid) + "1"
    pids_of(process)
    told = [sys.executable, "-m", "tests.netlab", "--lab", name, "--tell"]
    subprocess.run([*told, "link", "d1", "d2", "loss=0.5"], cwd=ROOT, check=True)
    shown = tell(name, {"do": "show"})
    assert (shown["d1 > d2"]["loss"], shown["d2 > d1"]["loss"]) == (0.5, 0)
    for words in (["link", "d1", "d9", "loss=0.5"], ["link", "d1", "d2", "loss=7"], ["boo"]):
        assert subprocess.run([*told, *words], cwd=ROOT, capture_output=True).returncode == 2
    with pytest.raises(ValueError, match="unknown"):
        tell(name, {"do": "link", "from": "d1", "to": "d2", "speed": 3})
    process.send_signal(signal.SIGINT)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_the_probe_measures_what_it_is_told() -> None:
    """In the loopback of this machine: the probe itself, without a lab."""
    import threading

    from tests.netlab import probe

    threading.Thread(target=probe.serve, name="probe.serve", daemon=True).start()
    assert len(round_trips_s("127.0.0.1", 20)) >= 19
    assert stream_s("127.0.0.1", 1 << 20) > 0
