"""The arithmetic of links, without a network: no root needed."""

from itertools import pairwise
from random import Random

import pytest

from tests.netlab.__main__ import command_of
from tests.netlab.cgroups import mounts
from tests.netlab.links import PROFILES, QUEUE_S, Fabric, Link, Profile

MBIT = 1e6


def fabric(link: Link, port_bps: float = 1e12, seed: int = 0) -> Fabric:
    return Fabric(["a", "b", "c"], Profile(link, port_bps, 1500), Random(seed))


def journey(net: Fabric, a: str, b: str, size: int, now_s: float) -> float | None:
    arrival_s = net.arrival_s(a, b, size, now_s)
    return None if arrival_s is None else net.admission_s(a, b, size, arrival_s)


@pytest.mark.parametrize("seed", range(20))
def test_jitter_stays_in_its_bounds_and_keeps_the_order(seed: int) -> None:
    rng, net = Random(seed), fabric(Link(delay_s=0.01, jitter_s=0.004), seed=seed)
    now_s, last_s = 0.0, 0.0
    for _ in range(500):
        now_s += rng.random() * 0.002
        arrival_s = journey(net, "a", "b", 100, now_s)
        assert arrival_s is not None
        assert now_s + 0.006 <= arrival_s <= now_s + 0.014 + 1e-6
        assert arrival_s >= last_s
        last_s = arrival_s


def test_a_rate_spaces_packets_and_a_full_queue_drops() -> None:
    net = fabric(Link(rate_bps=MBIT))
    arrivals = [journey(net, "a", "b", 1250, 0.0) for _ in range(20)]  # 10 ms each
    passed = [arrival for arrival in arrivals if arrival is not None]
    assert passed == pytest.approx([0.01 * (n + 1) for n in range(len(passed))])
    assert len(passed) == QUEUE_S / 0.01 + 1
    assert net.directions["a", "b"].counts.overflowed == 20 - len(passed)


def test_a_slow_link_does_not_hold_up_what_goes_elsewhere() -> None:
    net = fabric(Link())
    net.change("a", "b", rate_bps=MBIT)
    for _ in range(5):
        journey(net, "a", "b", 1250, 0.0)
    assert journey(net, "a", "c", 1250, 0.0) == pytest.approx(0, abs=1e-6)


def test_a_port_is_shared_by_everything_a_device_sends_and_by_what_it_receives() -> None:
    net = fabric(Link(), port_bps=MBIT)
    assert journey(net, "a", "b", 1250, 0.0) == pytest.approx(0.01)
    assert journey(net, "a", "c", 1250, 0.0) == pytest.approx(0.02)
    net = fabric(Link(), port_bps=MBIT)
    assert journey(net, "a", "c", 1250, 0.0) == pytest.approx(0.01)
    assert journey(net, "b", "c", 1250, 0.0) == pytest.approx(0.02)


@pytest.mark.parametrize("share", [0.002, 0.1, 0.5])
def test_the_share_that_is_lost_is_the_one_asked_for(share: float) -> None:
    net, count = fabric(Link(loss=share)), 50_000
    lost = sum(journey(net, "a", "b", 10, float(n)) is None for n in range(count))
    spread = (count * share * (1 - share)) ** 0.5
    assert abs(lost - count * share) < 5 * spread
    assert net.directions["a", "b"].counts.lost == lost


def test_reordering_lets_later_packets_overtake() -> None:
    net = fabric(Link(delay_s=0.001, reorder=0.1))
    arrivals = [net.arrival_s("a", "b", 10, n * 1e-4) or 0 for n in range(2000)]
    overtaken = sum(a > b for a, b in pairwise(arrivals))
    assert 100 < overtaken < 300


def test_partitions_cuts_and_healing() -> None:
    net = fabric(Link())
    net.partition(["a", "b"], ["c"])
    passes = {(a, b) for a, b in net.directions if journey(net, a, b, 10, 0.0) is not None}
    assert passes == {("a", "b"), ("b", "a")}
    net.heal()
    net.cut("a", "b")
    passes = {(a, b) for a, b in net.directions if journey(net, a, b, 10, 0.0) is not None}
    assert passes == set(net.directions) - {("a", "b")}
    net.change("a", "b", loss=1.0)
    net.reset()
    assert journey(net, "a", "b", 10, 0.0) is not None
    with pytest.raises(KeyError, match="nobody"):
        net.partition(["a"], ["nobody"])


@pytest.mark.parametrize("wrong", [{"loss": 1.5}, {"delay_s": -1}, {"delay_s": 1, "jitter_s": 2}])
def test_impossible_links_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"use 0 to|no packet arrives"):
        Link(**wrong)


def test_the_profiles_are_those_of_the_documentation() -> None:
    rtt_ms = {name: 2000 * profile.link.delay_s for name, profile in PROFILES.items()}
    assert rtt_ms["lan"] < 0.3 < rtt_ms["wifi"] < 4 < rtt_ms["far"] < 20
    assert [PROFILES[name].port_bps for name in ("lan", "wifi", "far")] == [1e9, 3e8, 2e7]
    assert [PROFILES[name].link.loss for name in ("lan", "wifi", "far")] == [0, 0.002, 0.01]


def test_commands_in_words() -> None:
    assert command_of(["link", "a", "b", "loss=0.3", "rate_bps=1e6"]) == {
        "do": "link", "from": "a", "to": "b", "loss": 0.3, "rate_bps": 1e6,
    }  # fmt: skip
    assert command_of(["partition", "a,b", "c"])["sets"] == [["a", "b"], ["c"]]
    for wrong in ("", "link a b", "partition", "explode", "link a b loss=much"):
        with pytest.raises(ValueError, match=r"help|much"):
            command_of(wrong.split())


def test_control_groups_of_both_versions_are_found() -> None:
    version_1 = (
        "31 23 0:27 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid - cgroup cgroup rw,cpu,cpuacct\n"
        "32 23 0:28 /docker/77 /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    )
    own = "4:memory:/docker/77/inner\n3:cpu,cpuacct:/jobs\n0::/\n"
    first, second = mounts(version_1, own)
    assert {name: str(path) for name, path in first.items()} == {
        "cpu": "/sys/fs/cgroup/cpu,cpuacct/jobs",
        "memory": "/sys/fs/cgroup/memory/inner",
    }
    assert second is None
    version_2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
    first, second = mounts(version_2, "0::/user.slice/user-0.slice/session-1.scope\n")
    assert first == {}
    assert str(second) == "/sys/fs/cgroup/user.slice/user-0.slice"
