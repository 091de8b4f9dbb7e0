"""Dispatch with a world of plain functions: whatever fails, the sum is right or the error clear."""

import threading
import time
from random import Random

import numpy as np
import pytest

from coeld.compression.transfer import SENSITIVITY_FIRST
from coeld.datapath import dispatch
from coeld.datapath.costs import Costs, Work, lots_work
from coeld.datapath.dispatch import Dispatcher, RouteBoard, Stall
from coeld.datapath.pace import Paces
from coeld.datapath.ports import Held
from coeld.datapath.quality import EXACT, Quality, Traffic
from coeld.datapath.request import Cancelled, Request
from coeld.errors import NotCovered, PeerGone, PeerOwes, PeerRefused, PeerSlow
from coeld.ids import Lot, ModelHash, NodeId
from coeld.routes import RouteTable

EXPERTS, HIDDEN = 8, 4
ME = NodeId("0" * 16)
NODES = [NodeId(str(n) * 16) for n in range(1, 5)]


def weight(layer: int, expert: int) -> float:
    return 1.0 + layer * 100 + expert


def summed(layer: int, experts, x, gates):
    """The truth: every expert is a multiplication."""
    columns = np.ones((len(x), len(experts)), np.float32) if gates is None else gates
    assert columns.shape == (len(x), len(experts))
    factors = np.array([weight(layer, expert) for expert in experts], np.float32)
    return (columns @ factors)[:, None] * x


class Runner:
    """Experts are multiplications; some of them are here."""

    def __init__(self, here: set[int]) -> None:
        self.experts = here

    def here(self, layer: int) -> Held:
        return Held(sorted(self.experts, key=lambda expert: (expert % 2, expert)))

    def run(self, layer: int, experts, x, gates):
        if not set(experts) <= self.experts:
            raise PeerRefused("not here")
        return summed(layer, experts, x, gates)


class Call:
    """Ends with `outcome`, or only after somebody else's call if it is slow."""

    computed_us = 1_000_000_000
    traffic = Traffic(100, 50, (0.03, 0.04))
    beyond_s = None

    def __init__(self, node: NodeId, outcome, slow: bool = False) -> None:
        self.node = node
        self.told = outcome
        self.slow = slow
        self.given_up = False

    @property
    def outcome(self):
        return None if self.slow else self.told


class Peers:
    """Owners as runners; `faults` says what happens to the next calls of a node."""

    def __init__(self, owners: dict[NodeId, set[int]]) -> None:
        self.owners = owners
        self.faults: dict[NodeId, list] = {}
        self.asked: list[tuple[NodeId, tuple[int, ...]]] = []
        self.rows = 0
        self.slow: set[NodeId] = set()
        self.slow_calls = float("inf")
        """Calls after so many are answered at once."""
        self.errors = EXACT
        self.calls: list[Call] = []
        self.paces = Paces()

    def call(self, node, address, layer, experts, x, gates, errors):
        self.errors = errors
        self.rows += len(x)
        self.asked.append((node, tuple(sorted(experts))))
        fault = self.faults[node].pop(0) if self.faults.get(node) else None
        if isinstance(fault, PeerGone | PeerOwes):
            raise fault
        if fault is None and not set(experts) <= self.owners[node]:
            fault = PeerRefused("not here")
        outcome = fault if fault is not None else summed(layer, experts, x, gates)
        slow = node in self.slow and len(self.calls) < self.slow_calls
        self.calls.append(Call(node, outcome, slow))
        return self.calls[-1]

    def send(self, calls, until_s): ...

    def ready(self, calls, until_s):
        ended = [call for call in calls if call.outcome is not None]
        if not ended and until_s == float("inf"):  # nobody else is asked: the slow one answers
            for call in calls:
                call.slow = False
            return list(calls)
        return ended

    def give_up(self, call):
        call.given_up = call.outcome is None


class Noted(Costs):
    def __init__(self) -> None:
        super().__init__()
        self.works: list[Work] = []

    def note(self, work: Work, took_s: float) -> None:
        self.works.append(work)


class Quiet:
    def token(self, token): ...
    def done(self, request, reason): ...
    def failed(self, request, error): ...


def request() -> Request:
    return Request("r", [1], 1, Quiet())


def routes(owners: dict[NodeId, set[int]], missing: int = 0, epoch: int = 1) -> RouteTable:
    lots = {
        Lot(0, expert): tuple(node for node in owners if expert in owners[node])
        for expert in range(EXPERTS)
    }
    return RouteTable(
        ModelHash("m"),
        epoch,
        {lot: nodes for lot, nodes in lots.items() if nodes},
        dict.fromkeys(owners, ("127.0.0.1", 1)),
        missing,
    )


def dispatcher(runner, peers, table, patience_s=5.0) -> Dispatcher:
    made = Dispatcher(
        me=ME,
        experts=EXPERTS,
        runner=runner,
        peers=peers,
        board=RouteBoard(),
        patience_s=patience_s,
        on_failure=lambda node, exc: None,
    )
    made.board.pin(table)
    return made


X = np.arange(3 * HIDDEN, dtype=np.float32).reshape(3, HIDDEN)
WHOLE = summed(0, range(EXPERTS), X, None)


def some_gates(rng: Random, rows: int = 3) -> np.ndarray:
    """Each row chooses two experts."""
    gates = np.zeros((rows, EXPERTS), np.float32)
    for row in gates:
        row[rng.sample(range(EXPERTS), 2)] = rng.random(), rng.random() + 0.1
    return gates


@pytest.mark.parametrize("seed", range(150))
def test_any_ownership_and_any_faults_give_the_whole_sum(seed: int) -> None:
    rng = Random(seed)
    here = {expert for expert in range(EXPERTS) if rng.random() < 0.4}
    owners = {node: {e for e in range(EXPERTS) if rng.random() < 0.6} for node in NODES}
    for expert in range(EXPERTS):
        owners[rng.choice(NODES)].add(expert)
    peers = Peers(owners)
    for node in NODES:
        kinds = [PeerGone("gone"), PeerSlow("slow"), PeerRefused("no"), None]
        peers.faults[node] = [rng.choice(kinds) for _ in range(rng.randint(0, 2))]
    gates = some_gates(rng) if seed % 2 else None
    total = dispatcher(Runner(here), peers, routes(owners)).run(0, X, gates, request())
    assert np.allclose(total, summed(0, range(EXPERTS), X, gates)), f"seed={seed}"


def test_only_rows_that_chose_its_experts_travel_to_an_owner_and_only_chosen_ones_are_asked() -> (
    None
):
    gates = np.zeros((3, EXPERTS), np.float32)
    gates[0, [0, 6]], gates[1, [1, 7]], gates[2, [6, 7]] = 0.5, 0.25, 0.125
    owners = {NODES[0]: {0, 1, 2}, NODES[1]: {3, 4, 5}}
    peers = Peers(owners)
    total = dispatcher(Runner({6, 7}), peers, routes(owners)).run(0, X, gates, request())
    assert np.allclose(total, summed(0, range(EXPERTS), X, gates))
    assert (peers.asked, peers.rows) == ([(NODES[0], (0, 1))], 2)


def test_experts_nobody_chose_need_no_owner() -> None:
    gates = np.zeros((1, EXPERTS), np.float32)
    gates[0, [2, 3]] = 0.5
    total = dispatcher(Runner({2, 3}), Peers({}), routes({})).run(0, X[:1], gates, request())
    assert np.allclose(total, summed(0, range(EXPERTS), X[:1], gates))


@pytest.mark.parametrize("here", [set(range(EXPERTS)), {2, 3, 4}])
def test_what_is_learned_of_lots_counts_those_that_the_row_chose(here: set[int]) -> None:
    gates = np.zeros((1, EXPERTS), np.float32)
    gates[0, [3, 4, 6]] = 0.5
    peers = Peers({NODES[0]: set(range(EXPERTS)) - here})
    made = dispatcher(Runner(here), peers, routes(peers.owners))
    made.costs = Noted()
    made.run(0, X[:1], gates, request())
    away = [lots_work(1, NODES[0])] if 6 not in here else []
    assert made.costs.works == [lots_work(len({3, 4, 6} & here)), *away]


def test_each_owner_gets_one_call_with_all_of_its_experts() -> None:
    owners = {NODES[0]: {0, 1, 2}, NODES[1]: {3, 4, 5}}
    peers = Peers(owners)
    dispatcher(Runner({6, 7}), peers, routes(owners)).run(0, X, None, request())
    assert peers.asked == [(NODES[0], (0, 1, 2)), (NODES[1], (3, 4, 5))]


def test_one_device_that_serves_the_whole_layer_is_preferred_to_several() -> None:
    owners = {NODES[0]: {0, 1, 2}, NODES[1]: set(range(EXPERTS))}
    peers = Peers(owners)
    dispatcher(Runner({6, 7}), peers, routes(owners)).run(0, X, None, request())
    assert peers.asked == [(NODES[1], tuple(range(EXPERTS)))]
    peers.asked.clear()
    dispatcher(Runner(set(range(EXPERTS))), peers, routes(owners)).run(0, X, None, request())
    assert peers.asked == []


def test_a_replica_is_asked_at_once_when_the_owner_fails() -> None:
    everything = set(range(EXPERTS))
    owners = {NODES[0]: everything, NODES[1]: everything}
    peers = Peers(owners)
    peers.faults[NODES[0]] = [PeerSlow("slow")]
    made = dispatcher(Runner(set()), peers, routes(owners), patience_s=0.0)
    assert np.allclose(made.run(0, X, None, request()), WHOLE)
    assert [node for node, _ in peers.asked] == [NODES[0], NODES[1]]


def test_an_owner_that_owes_answers_is_passed_over_and_nobody_is_told() -> None:
    first, second, third = NODES[:3]
    peers = Peers({node: set(range(EXPERTS)) for node in (first, second, third)})
    made = dispatcher(Runner(set()), peers, routes(peers.owners))
    made.on_failure = lambda node, exc: pytest.fail(f"{node} has not failed: {exc}")
    peers.faults = {first: [PeerOwes("12")] * 2, second: [PeerOwes("12")]}
    assert np.array_equal(made.run(0, X, None, request()), WHOLE)
    assert [node for node, _experts in peers.asked] == [first, second, third]
    peers.faults = {node: [PeerOwes("12")] for node in (first, second, third)}
    asked = request()
    assert np.array_equal(made.run(0, X, None, asked), WHOLE), "once one of them has answered"
    assert made.failures == 0
    assert len(asked.stalls_s) == 1


def measured(peers: Peers, rows: int = len(X)) -> None:
    """Every peer has answered calls within a millisecond."""
    for node in peers.owners:
        for _ in range(20):
            peers.paces.took(node, rows, 0.001, time.monotonic())


def test_a_late_owner_is_given_up_for_a_replica_and_nobody_is_told(monkeypatch) -> None:
    everything = set(range(EXPERTS))
    owners = {NODES[0]: everything, NODES[1]: everything}
    peers = Peers(owners)
    measured(peers)
    peers.slow = {NODES[0]}
    made = dispatcher(Runner(set()), peers, routes(owners))
    told: list[NodeId] = []
    made.on_failure = lambda node, exc: told.append(node)
    assert np.allclose(made.run(0, X, None, request()), WHOLE)
    assert [node for node, _ in peers.asked] == [NODES[0], NODES[1]]
    assert [call.given_up for call in peers.calls] == [True, False]
    assert (told, made.failures) == ([], 0)


def test_the_only_owner_is_waited_for_however_late_it_is() -> None:
    peers = Peers({NODES[0]: set(range(EXPERTS))})
    measured(peers)
    peers.slow = {NODES[0]}
    made = dispatcher(Runner(set()), peers, routes(peers.owners))
    assert np.allclose(made.run(0, X, None, request()), WHOLE)
    assert len(peers.asked) == 1


@pytest.mark.parametrize("count", [1, 2])
def test_where_packets_get_lost_owners_are_asked_by_turns_until_one_answers(count: int) -> None:
    nodes = NODES[:count]
    peers = Peers({node: set(range(EXPERTS)) for node in nodes})
    measured(peers)
    peers.slow, peers.slow_calls = set(nodes), 5
    peers.paces.losses.note(nodes[0], 1, time.monotonic())
    made = dispatcher(Runner(set()), peers, routes(peers.owners))
    assert np.allclose(made.run(0, X, None, request()), WHOLE)
    assert [node for node, _ in peers.asked] == (nodes * 6)[:6]
    assert [call.given_up for call in peers.calls] == [True] * 5 + [False]


def test_a_branch_is_asked_again_only_where_all_of_its_experts_are() -> None:
    owners = {
        NODES[0]: {0, 1, 2, 3},
        NODES[1]: {4, 5, 6, 7},
        NODES[2]: {0, 1},
        NODES[3]: {0, 1, 2, 3},
    }
    peers = Peers(owners)
    measured(peers)
    peers.slow = {NODES[0], NODES[1]}
    made = dispatcher(Runner(set()), peers, routes(owners))
    assert np.allclose(made.run(0, X, None, request()), WHOLE)
    assert [node for node, _ in peers.asked] == [NODES[0], NODES[1], NODES[3]]


def test_second_calls_are_a_share_of_the_first_when_everybody_is_late() -> None:
    everything = set(range(EXPERTS))
    owners = {NODES[0]: everything, NODES[1]: everything}
    peers = Peers(owners)
    measured(peers)
    peers.slow = set(NODES)
    made = dispatcher(Runner(set()), peers, routes(owners))
    for _ in range(100):
        made.run(0, X, None, request())
    assert len(peers.asked) <= 100 + 10 + 10


def test_a_failed_branch_leaves_no_call_behind_that_is_waited_for() -> None:
    owners = {NODES[0]: {0, 1, 2, 3}, NODES[1]: {4, 5, 6, 7}}
    peers = Peers(owners)
    peers.faults[NODES[0]] = [PeerRefused("no")]
    peers.slow = {NODES[1]}
    made = dispatcher(Runner(set()), peers, routes(owners))
    assert np.allclose(made.run(0, X, None, request()), WHOLE)
    assert peers.calls[1].given_up


def test_a_new_route_table_ends_the_wait_and_the_stall_is_recorded() -> None:
    everything = set(range(EXPERTS))
    peers = Peers({NODES[0]: everything})
    made = dispatcher(Runner(set()), peers, routes({}))
    asked = request()
    timer = threading.Timer(0.05, made.board.pin, [routes({NODES[0]: everything}, epoch=2)])
    timer.start()
    assert np.allclose(made.run(0, X, None, asked), WHOLE)
    timer.join()
    assert len(asked.stalls_s) == 1


def test_loading_the_experts_here_ends_the_wait() -> None:
    runner = Runner(set())
    made = dispatcher(runner, Peers({}), routes({}))

    def load() -> None:
        runner.experts = set(range(EXPERTS))
        made.board.nudge()

    timer = threading.Timer(0.05, load)
    timer.start()
    assert np.allclose(made.run(0, X, None, request()), WHOLE)
    timer.join()


def test_the_wait_begins_anew_whenever_the_swarm_comes_further_and_has_an_end() -> None:
    stall = Stall(began_s=100.0)
    assert stall.left_s(176, 10.0, now=100.0) == 10.0
    assert stall.left_s(176, 10.0, now=104.0) == 6.0
    assert stall.left_s(192, 10.0, now=109.0) == 10.0  # a batch was loaded
    assert stall.left_s(192, 10.0, now=119.5) < 0
    for step in range(1, 20):
        assert stall.left_s(192 + step % 2, 10.0, 109.0 + 5 * step) <= 160.0 - (109.0 + 5 * step)


def test_an_uncovered_layer_fails_with_the_missing_bytes() -> None:
    made = dispatcher(Runner({0}), Peers({}), routes({}, missing=70), patience_s=0.05)
    with pytest.raises(NotCovered, match="70 bytes") as caught:
        made.run(0, X, None, request())
    assert caught.value.missing_bytes == 70


def test_an_only_owner_that_never_answers_ends_a_request_too(monkeypatch) -> None:
    """Each call takes longer than a failure is remembered, so that it never has "just" failed."""
    monkeypatch.setattr(dispatch, "COOLDOWN_S", 0.0)
    peers = Peers({NODES[0]: set(range(EXPERTS))})
    peers.faults[NODES[0]] = [PeerGone("frozen")] * 1_000_000
    made = dispatcher(Runner(set()), peers, routes(peers.owners), patience_s=0.05)
    with pytest.raises(NotCovered, match="could not be reached"):
        made.run(0, X, None, request())
    assert peers.faults[NODES[0]]


def test_a_cancelled_request_does_not_wait() -> None:
    made = dispatcher(Runner(set()), Peers({}), routes({}), patience_s=60.0)
    asked = request()
    asked.cancelled.set()
    with pytest.raises(Cancelled):
        made.run(0, X, None, asked)


def test_what_a_request_may_lose_goes_with_its_rows_and_what_it_lost_is_counted() -> None:
    owners = {NODES[0]: {0, 1, 2, 3}, NODES[1]: {4, 5}}
    peers = Peers(owners)
    made = dispatcher(Runner({6, 7}), peers, routes(owners))
    asked = request()
    made.run(0, X, None, asked)
    assert peers.errors == EXACT
    asked.quality = Quality(0.02)
    asked.quality.begin(len(X), 10, made.shared(range(10)), 0)
    made.run(0, X, None, asked)
    expected = tuple((0.02 / (2 * 10 * c)) ** 0.5 for c in SENSITIVITY_FIRST)
    assert peers.errors == pytest.approx(expected)
    assert asked.quality.rows_bytes == 2 * (100 + 50)
    assert asked.quality.float32_bytes == 2 * 2 * X.nbytes
    # Two of three branches came from peers.
    spent = SENSITIVITY_FIRST[0] * 0.03**2 + SENSITIVITY_FIRST[1] * 0.04**2
    assert asked.quality.kl_estimate == pytest.approx(spent * 2 / 3)


def test_layers_that_are_wholly_here_need_none_of_what_may_be_lost() -> None:
    assert dispatcher(Runner(set(range(EXPERTS))), Peers({}), routes({})).shared(range(10)) == 0


def test_a_row_is_not_sent_for_an_expert_that_hardly_counts_unless_the_answer_is_exact() -> None:
    owners = {NODES[0]: {0, 1, 2, 3}, NODES[1]: {4, 5, 6, 7}}
    gates = np.zeros((len(X), EXPERTS), np.float32)
    gates[:, 0], gates[0, 5], gates[1, 5] = 1.0, 1e-4, 0.9
    for budget, pruned in ((0.0, 0), (0.02, 1)):
        made = dispatcher(Runner(set()), Peers(owners), routes(owners))
        asked = request()
        asked.quality = Quality(budget)
        asked.quality.begin(len(X), 10, 10 if budget else 0, 0)
        total = made.run(0, X, gates, asked)
        kept = gates.copy()
        kept[0, 5] *= not pruned
        exact = dispatcher(Runner(set(range(EXPERTS))), Peers({}), routes({}))
        assert np.allclose(total, exact.run(0, X, kept, request()))
        assert asked.quality.pruned_pairs == pruned
