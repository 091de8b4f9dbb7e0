"""A hundred devices under random faults, and what `coeld sim` says of them: cost, speed, truth."""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from random import Random
from xml.etree import ElementTree

import pytest

from coeld.errors import ConfigError
from coeld.perception.perceive import LAZY_PER_S
from coeld.sim import checkers
from coeld.sim.device import Spec
from coeld.sim.faults import Faults
from coeld.sim.observe import Observer, all_met, moves, same_view
from coeld.sim.picture import draw
from coeld.sim.scenario import Plan, simulate
from coeld.sim.world import MODEL, World

NODES = 100
ENGINES = 4
SMALL = replace(MODEL, layers=6)


@pytest.fixture(autouse=True)
def without_collector() -> Iterator[None]:
    """Millions of objects, hardly a cycle: collecting takes half the time."""
    gc.disable()
    yield
    gc.enable()


def swarm(seed: int) -> World:
    room = MODEL.trunk_bytes + 32 * MODEL.lot_bytes
    specs = [Spec(room, engine=index < ENGINES) for index in range(NODES)]
    world = World(seed, specs, SMALL, seeds=(), codec=False)
    checkers.watch(world)
    return world


@pytest.mark.parametrize("seed", range(20))
def test_a_hundred_devices_keep_every_promise_under_faults_and_agree_once_healed(seed: int) -> None:
    rng = Random(f"faults/{seed}")
    faults = Faults(
        loss=rng.choice([0.0, 0.05, 0.2]),
        dup=rng.choice([0.0, 0.2]),
        reorder=rng.choice([0.0, 0.05]),
        delay=rng.choice([0.003, 0.05]),
        partition=rng.choice([0.0, 0.0, 0.1, 0.1]) if seed else 0.5,
        asym=rng.choice([0.0, 0.05]),
        slow=rng.choice([0.0, 0.1]),
        skew=rng.choice([0.0, 0.01]),
    )
    world = swarm(seed)
    faults.skew_clocks(world, rng)
    observer = Observer(world)
    world.start_all()
    world.run(0.4)
    world.acquaint()
    assert observer.run(10, lambda: all_met(world)), f"seed={seed}"
    faults.begin(world, rng)
    for device in rng.sample(world.up(), 3):
        observer.crash(device, silent=rng.random() < 0.5)
    faults.cut(world, rng)
    observer.run(4.5 if seed % 2 else 2.0)
    faults.end(world)
    for device in world.devices.values():
        if device.node is None:
            world.start(device)
    healed = observer.run(25, lambda: same_view(world) and checkers.covered(world))
    assert healed, f"seed={seed}: not healed"
    assert observer.run(25, lambda: rests(world)), f"seed={seed}: no rest"
    checkers.same_knowledge(world)
    checkers.at_rest(world)


def rests(world: World) -> bool:
    """Nothing changed for longer than anything waits to be told: then look."""
    views = {d.id: d.node.perception.view for d in world.up() if d.node is not None}
    loaded = moves(world)
    world.run(len(world.devices) / LAZY_PER_S + 0.6)
    same = all(d.node is None or d.node.perception.view == views[d.id] for d in world.up())
    return same and loaded == moves(world) and same_view(world)


def sim(*options: str, hash_seed: str = "0") -> subprocess.Popen[bytes]:
    """`coeld sim --json` in a process of its own."""
    command = [sys.executable, "-m", "coeld", "sim", "--json", *options]
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)


def printed(run: subprocess.Popen[bytes]) -> bytes:
    out, _ = run.communicate(timeout=500)
    assert run.returncode == 0
    return out


def test_the_same_seed_gives_the_same_figures_and_trace_in_every_process() -> None:
    faults = "loss=0.05,dup=0.1,reorder=0.02,crash=20,partition=0.3,slow=0.2,skew=0.01"
    options = ("--nodes", "12", "--seed", "7", "--faults", faults, "--minutes", "0.2")
    runs = [sim(*options, hash_seed=seed) for seed in ("0", "1", "31337")]
    another = sim("--nodes", "12", "--seed", "8", "--minutes", "0.1")
    outputs = set(map(printed, runs))
    assert len(outputs) == 1
    figures = json.loads(outputs.pop())
    assert len(figures["trace_sha256"]) == 64
    assert figures["violations"] == []
    other = json.loads(printed(another))
    assert other["trace_sha256"] != figures["trace_sha256"]


def test_bytes_sent_at_rest_do_not_grow_with_the_swarm() -> None:
    rates = {}
    for nodes in (20, 120):
        figures = simulate(
            Plan(nodes, 1, Faults(), minutes=0.05, engines=0, acquainted=True)
        ).figures
        assert figures["violations"] == []
        assert figures["bytes_per_node_s_max"] <= 4000
        assert figures["rounds_to_all"] <= 6
        rates[nodes] = figures["bytes_per_node_s"]
    assert max(rates.values()) <= 1.1 * min(rates.values()), rates


def test_a_silent_crash_is_known_everywhere_within_five_seconds() -> None:
    plan = Plan(60, 3, Faults(crash=15, loss=0.05), engines=0, minutes=1, acquainted=True)
    figures = simulate(plan).figures
    assert figures["violations"] == []
    assert figures["crashes"] >= 10
    assert figures["detect_s_p99"] <= 5.0
    assert figures["detect_reset_s_p99"] <= 2.5
    assert figures["false_dead"] == 0


def test_pinned_devices_neither_kill_nor_are_killed() -> None:
    plan = Plan(50, 4, Faults(loss=0.05, slow=0.1), engines=0, minutes=1, acquainted=True)
    figures = simulate(plan).figures
    assert figures["violations"] == []
    assert figures["false_dead"] == 0


@pytest.mark.parametrize("text", ["loss", "loss=", "loss=2", "loss=-1", "crash=nan", "flood=1"])
def test_a_fault_that_cannot_be_is_refused_with_the_list_of_those_that_can(text: str) -> None:
    with pytest.raises(ConfigError, match="partition"):
        Faults.parse(text)
    assert Faults.parse("loss=0.1,skew=0.01") == Faults(loss=0.1, skew=0.01)


def test_a_broken_promise_is_named_and_ends_the_run() -> None:
    plan = Plan(3, 1, Faults(loss=1.0), minutes=0.05)
    outcome = simulate(plan)
    assert len(outcome.violations) == 1
    assert "not everybody knows everybody" in outcome.violations[0]


def test_the_picture_is_well_formed_and_shows_phases_and_crashes() -> None:
    outcome = simulate(Plan(8, 2, Faults(crash=30), minutes=0.3))
    text = draw("8 < devices", outcome.samples, outcome.marks, outcome.crashes)
    root = ElementTree.fromstring(text)
    names = {item.text for item in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"8 < devices", "form", "rest", "trouble", "heal"} <= names
    circles = list(root.iter("{http://www.w3.org/2000/svg}circle"))
    assert len(circles) == len(outcome.crashes) > 0
