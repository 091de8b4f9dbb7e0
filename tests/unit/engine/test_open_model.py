"""The engine on a tiny model: every way to cut it gives the logits of the uncut graph."""

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest

from coeld.datapath.plan import compile_plan
from coeld.datapath.request import Request
from coeld.engine.experts import ExpertSet
from coeld.engine.kvcache import KVCache
from coeld.engine.measure import ME, NoPeers, Silent, logits_of, resident_bytes
from coeld.engine.open_model import OpenModel
from coeld.errors import ContextTooLong, PeerRefused
from coeld.ids import Lot, NodeId
from coeld.model.manifest import Manifest
from coeld.model.store import Store
from coeld.routes import RouteTable
from tests.harness.importing import import_file
from tests.harness.tiny_checkpoints import write_folder
from tests.reference import gguf_numpy

TOKENS = [int(t) for t in np.random.default_rng(1).integers(3, 260, 40)]


def opened(tiny, tiny_store, context_tokens=256) -> OpenModel:
    return OpenModel(tiny, tiny_store, me=ME, peers=NoPeers(), context_tokens=context_tokens)


@pytest.fixture
def whole(tiny, tiny_store) -> OpenModel:
    model = opened(tiny, tiny_store)
    model.hold_everything()
    return model


@pytest.fixture
def cut(tiny, tiny_store) -> OpenModel:
    model = opened(tiny, tiny_store)
    cut_all(model, tiny)
    return model


def cut_all(model: OpenModel, manifest: Manifest) -> None:
    """Everything here, but each layer's experts in a session of their own, as peers need it."""
    model.experts.load(manifest.demand().lots())
    other = NodeId("b" * 16)
    model.board.pin(RouteTable(manifest.hash, 1, {}, {other: ("127.0.0.1", 1)}))
    model.refit()


def close(a, b, tolerance=0.02) -> bool:
    return float(np.abs(a - b).max()) <= tolerance * float(np.abs(b).max())


def test_one_graph_agrees_with_plain_numpy(whole, tiny_gguf) -> None:
    expected = gguf_numpy.load(tiny_gguf).logits(TOKENS)
    found = logits_of(whole, TOKENS, range(len(TOKENS)))
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < 0.06, error  # int8 activations on random weights


def test_cut_layers_give_the_logits_of_one_graph(whole, cut) -> None:
    assert (whole.plan, cut.plan) == ("1 graph, 0 cuts", "4 graphs, 3 cuts")
    rows = range(len(TOKENS))
    assert close(logits_of(cut, TOKENS, rows), logits_of(whole, TOKENS, rows))


@pytest.mark.parametrize("fused", [{0}, {1}, {2}, {0, 2}, {0, 1}])
def test_partly_fused_plans_give_the_logits_of_one_graph(whole, cut, fused) -> None:
    expected = logits_of(whole, TOKENS, [39])
    steps = compile_plan(3, fused)
    cut.trunk.adopt(steps, cut.trunk.compile(steps))
    assert close(logits_of(cut, TOKENS, [39]), expected)


@pytest.mark.parametrize("sizes", [(1,) * 40, (7, 1, 1, 20, 11), (39, 1), (16, 24)])
def test_any_chunks_of_a_prompt_end_in_the_same_logits(whole, sizes) -> None:
    expected = logits_of(whole, TOKENS, [39])
    cache, at = whole.decoder.depart(), 0
    request = Request("r", TOKENS, 0, Silent())
    for size in sizes:
        logits = whole.decoder.forward(cache, TOKENS[at : at + size], [size - 1], request)
        at += size
    assert close(logits, expected)


def test_a_growing_cache_keeps_what_it_holds(tiny, tiny_store) -> None:
    model = opened(tiny, tiny_store)
    model.hold_everything()
    tokens = (TOKENS * 7)[:256]
    journey, request = model.decoder.depart(), Request("r", tokens, 0, Silent())
    cache = journey.stages[0].cache
    cache._move(32)  # far below the usual room, so that it grows several times
    for token in tokens:
        cache_before = cache.capacity
        if cache.length == cache_before:
            cache._move(min(2 * cache_before, 256))
        logits = model.decoder.forward(journey, [token], [0], request)
    assert close(logits, logits_of(model, tokens, [255]))


@pytest.mark.parametrize("whole", [True, False])
def test_experts_that_tokens_use_are_counted_at_cuts(tmp_path, whole: bool) -> None:
    write_folder(tmp_path / "mixtral", "mixtral")
    store = Store(tmp_path / "store")
    routed = import_file(store, tmp_path / "mixtral", "routed")
    model = opened(routed, store, 64)
    if whole:
        model.hold_everything()
    else:
        cut_all(model, routed)
    request = Request("r", TOKENS[:30], 0, Silent())
    journey = model.decoder.depart()
    for tokens in (TOKENS[:29], TOKENS[29:30]):
        model.decoder.forward(journey, tokens, [0], request)
    counted = model.decoder.uses.take()
    shape = routed.shape
    assert sorted(counted) == ([] if whole else list(range(shape.layers)))
    assert all(sum(rows) == 30 * shape.top_k for rows in counted.values())


def test_room_in_a_cache_becomes_memory_only_when_it_is_written(tiny) -> None:
    shape = replace(tiny.shape, kv_heads=8, head_dim=64)
    cache = KVCache(shape, 2048, range(32))
    room = 32 * 2 * 8 * 2048 * 64 * 4
    before = resident_bytes()
    cache.reserve(100)
    for layer in range(32):
        for value in cache.values(layer):
            value.numpy()[:, :, :100] = 1
    grown = resident_bytes() - before
    assert cache.capacity == 2048
    assert cache.bytes == cache.bytes_for(100) == 32 * 2 * 8 * 7 * 4096  # 16 tokens a page
    assert grown < room / 4, f"{grown} of {room} bytes"
    assert cache.bytes_for(2048) == room
    cache.free()
    assert cache.bytes == 0


def test_two_requests_in_turn_do_not_disturb_each_other(whole) -> None:
    alone = []
    for prompt in (TOKENS[:9], TOKENS[9:30]):
        listener = Silent()
        whole.scheduler.submit(Request("r", prompt, 12, listener))
        while whole.scheduler.active:
            whole.scheduler.turn()
        alone.append(listener.tokens)
    together = [Silent(), Silent()]
    whole.scheduler.submit(Request("a", TOKENS[:9], 12, together[0]))
    whole.scheduler.submit(Request("b", TOKENS[9:30], 12, together[1]))
    while whole.scheduler.active:
        whole.scheduler.turn()
    assert [listener.tokens for listener in together] == alone


def test_an_answer_that_ended_leaves_no_kv_cache_behind(whole) -> None:
    request = Request("r", TOKENS[:9], 3, Silent())
    whole.scheduler.submit(request)
    whole.scheduler.turn()
    keys = weakref.ref(request.journey.stages[0].cache._arrays[0])
    while whole.scheduler.active:
        whole.scheduler.turn()
    gc.collect()
    assert keys() is None


def test_recompiling_in_mid_answer_changes_nothing_but_the_plan(tiny, tiny_store, whole) -> None:
    expected = Silent()
    whole.scheduler.submit(Request("r", TOKENS[:9], 12, expected))
    while whole.scheduler.active:
        whole.scheduler.turn()
    found = Silent()
    whole.scheduler.submit(Request("r", TOKENS[:9], 12, found))
    for _ in range(5):
        whole.scheduler.turn()
    other = NodeId("b" * 16)
    whole.board.pin(RouteTable(tiny.hash, 1, {}, {other: ("127.0.0.1", 1)}))
    whole.refit()
    assert whole.plan == "4 graphs, 3 cuts"
    for _ in range(4):
        whole.scheduler.turn()
    whole.board.pin(RouteTable(tiny.hash, 2, {}, {ME: ("127.0.0.1", 1)}))
    whole.refit()
    assert whole.plan == "1 graph, 0 cuts"
    while whole.scheduler.active:
        whole.scheduler.turn()
    assert found.tokens == expected.tokens


def test_any_subset_of_resident_experts_can_be_summed(tiny, tiny_store) -> None:
    rng = np.random.default_rng(0)
    experts = ExpertSet(tiny, tiny_store)
    experts.load([Lot(1, expert) for expert in (0, 2, 3, 7)])
    x = rng.standard_normal((5, tiny.shape.hidden)).astype(np.float32)
    parts = {expert: experts.run(1, [expert], x, None) for expert in (0, 2, 3, 7)}
    for subset in ([0, 2], [7, 3], [0, 2, 3, 7], [7]):
        expected = sum(parts[expert] for expert in subset)
        assert close(experts.run(1, subset, x, None), expected, 1e-3)
    with pytest.raises(PeerRefused, match="layer 1"):
        experts.run(1, [0, 1], x, None)
    with pytest.raises(PeerRefused, match="layer 2"):
        experts.run(2, [0], x, None)


def test_dropped_experts_are_gone_and_kept_ones_still_run(tiny, tiny_store) -> None:
    experts = ExpertSet(tiny, tiny_store)
    experts.load([Lot(0, 0), Lot(0, 1), Lot(2, 5)])
    x = np.ones((1, tiny.shape.hidden), np.float32)
    kept = experts.run(0, [1], x, None)
    experts.drop([Lot(0, 0), Lot(2, 5)])
    assert experts.lots == {Lot(0, 1)}
    assert close(experts.run(0, [1], x, None), kept, 1e-4)
    with pytest.raises(PeerRefused):
        experts.run(0, [0], x, None)
    assert not experts.here(2).experts


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(whole) -> None:
    request = Request("r", [5] * 300, 0, Silent())
    with pytest.raises(ContextTooLong, match=r"300 tokens.*256"):
        whole.admit(request, None)


def test_an_answer_is_cut_to_the_room_that_is_left(whole) -> None:
    request = Request("r", [5] * 250, 0, Silent())
    whole.admit(request, 100)
    assert request.tokens_max == 6
    whole.admit(request, 2)
    assert request.tokens_max == 2
