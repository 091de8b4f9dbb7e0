"""The imported real model against a slow fp32 reference that reads the same GGUF by itself.

What may differ: weights rounded once more to int8, activations rounded to int8 per block.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from coeld.compression.transfer import LinkSpeed
from coeld.datapath.quality import Quality
from coeld.datapath.request import PREFILL_CHUNK_TOKENS, Request
from coeld.engine.measure import ME, NoPeers, Silent, logits_of, perplexity
from coeld.engine.open_model import OpenModel
from coeld.errors import BadRequest
from coeld.ids import Lot, NodeId
from coeld.model.catalogue import find
from coeld.model.fetch import fetched
from coeld.model.store import Store
from coeld.net import expert_calls, peers
from coeld.net.peers import Introduction, PeerPool, PeerServer
from coeld.routes import Leg, RouteTable
from tests.conftest import REAL_MODEL
from tests.harness.engine import swarm_of, swarm_with_table
from tests.reference import gguf_numpy

pytestmark = pytest.mark.model
TEXT = Path(__file__).with_name("text.txt").read_text()
NODES = [NodeId(letter * 16) for letter in "abc"]
PROMPTS = [
    "What is the capital of France?",
    "Name three colours.",
    "Write one sentence about the sea.",
    "How many legs does a spider have?",
    "Explain what a magnet does.",
    "Give me a recipe for pancakes.",
    "Who wrote Romeo and Juliet?",
    "What is two plus two?",
    "Describe a cat in a few words.",
    "Why do leaves fall in autumn?",
]


@pytest.fixture(scope="module")
def model(real_store) -> OpenModel:
    manifest = real_store.manifest(REAL_MODEL)
    opened = OpenModel(manifest, real_store, me=ME, peers=NoPeers(), context_tokens=512)
    opened.hold_everything()
    return opened


@pytest.fixture(scope="module")
def reference(tmp_path_factory, real_store) -> gguf_numpy.Reference:
    store = Store(tmp_path_factory.mktemp("download"))
    with store.lock(), fetched(store, find(REAL_MODEL), lambda *_progress: None) as path:
        return gguf_numpy.load(path)


def log_softmax(logits):
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def test_logits_agree_with_the_reference_over_512_tokens(model, reference) -> None:
    tokens = model.text.encode(TEXT)[:512]
    assert len(tokens) == 512
    expected = log_softmax(reference.logits(tokens))
    found = log_softmax(logits_of(model, tokens, range(512)))
    top1 = float((found.argmax(-1) == expected.argmax(-1)).mean())
    kl = float((np.exp(expected) * (expected - found)).sum(-1).mean())
    print(f"top-1 agreement {top1:.4f}, mean KL {kl:.5f}")
    assert top1 >= 0.97
    assert kl <= 0.01


def test_perplexity_is_that_of_the_reference(model, reference) -> None:
    """The same windows and the same scored tokens, computed the obvious way."""
    tokens = model.text.encode(TEXT)[:512]
    losses = []
    for window in (tokens[:256], tokens[256:512]):
        logs = log_softmax(reference.logits(window))
        losses += [-logs[at, window[at + 1]] for at in range(128, 255)]
    expected = float(np.exp(np.mean(losses)))
    found, _error, scored = perplexity(model, tokens, 256, 2, lambda *_progress: None)
    print(f"perplexity {found:.4f}, reference {expected:.4f}")
    assert scored == len(losses)
    assert abs(found / expected - 1) < 0.015


def test_perplexity_of_too_short_a_text_says_how_many_tokens_there_are(model) -> None:
    with pytest.raises(BadRequest, match="has 3 tokens"):
        perplexity(model, [1, 2, 3], 256, 2, lambda *_progress: None)


def shared(lots) -> dict[NodeId, list[Lot]]:
    """A third of the layers each, every third one: whole, as the auction shares them out."""
    return {
        node: [lot for lot in lots if lot.layer % 3 == index] for index, node in enumerate(NODES)
    }


def test_three_devices_say_what_one_device_says(real_store) -> None:
    """64 greedy tokens of ten prompts: all the same, because all the bits are the same."""
    manifest = real_store.manifest(REAL_MODEL)
    lots = manifest.demand().lots()
    alone = swarm_of(real_store.root, manifest, {NODES[0]: lots})
    three = swarm_of(real_store.root, manifest, shared(lots))
    try:
        for index, prompt in enumerate(PROMPTS):
            asked = {"prompt": prompt, "max_tokens": 64}
            one, _done = alone[NODES[0]].answer(f"one {index}", **asked)
            many, done = three[NODES[index % 3]].answer(f"many {index}", **asked)
            assert done["ev"] == "done", done
            assert one == many, prompt
    finally:
        for engine in [*alone.values(), *three.values()]:
            engine.close()


def chain(store, spans=True):
    """Three engines, ten layers each, and the first decodes through the legs of all; each layer is
    also the next device's, so that one may go."""
    manifest = store.manifest(REAL_MODEL)
    layers = manifest.shape.layers
    legs = tuple(
        Leg(node, index * layers // 3, (index + 1) * layers // 3)
        for index, node in enumerate(NODES)
    )
    shares = {
        leg.node: [
            lot
            for lot in manifest.demand().lots()
            if leg.first <= lot.layer < leg.stop or before.first <= lot.layer < before.stop
        ]
        for leg, before in zip(legs, (legs[-1], *legs), strict=False)
    }
    table, engines = swarm_with_table(store.root, manifest, shares)
    for engine in engines.values():
        engine.say("routes", table=replace(table, legs=legs, spans=legs if spans else ()).to_json())
    return engines


@pytest.mark.parametrize("spans", [True, False], ids=["fused", "cut"])
def test_a_chain_of_three_devices_says_what_one_device_says(real_store, spans) -> None:
    """And goes on saying it when the one in the middle is killed."""
    manifest = real_store.manifest(REAL_MODEL)
    alone = swarm_of(real_store.root, manifest, {NODES[0]: manifest.demand().lots()})
    three = chain(real_store, spans)
    try:
        if spans:
            for node, engine in three.items():
                fused = engine.stats_when(lambda stats: "20 cuts" in stats["steps"], 30)["steps"]
                assert "20 cuts" in fused, (node, fused)
        long = TEXT[:700]  # two chunks, at two devices at a time
        for index, prompt in enumerate((PROMPTS[0], long)):
            asked = {"prompt": prompt, "max_tokens": 32}
            one, _done = alone[NODES[0]].answer(f"one {index}", **asked)
            first = three[NODES[0]]
            first.generate(f"many {index}", **asked)
            words = []
            while (message := first.hear("token", "done", "error"))["ev"] == "token":
                words.append(message["text"])
                if index == 1 and len(words) == 12:
                    three[NODES[1]].process.kill()
            assert (message["ev"], "".join(words)) == ("done", one), prompt
            assert (message["prompt_tokens"] > PREFILL_CHUNK_TOKENS) == (prompt is long)
            if index == 0:
                first.say("stats")
                calls = {n: peer["calls"] for n, peer in first.hear("stats")["peers"].items()}
                assert calls[NODES[1]] == calls[NODES[2]] > 0
    finally:
        for engine in [*alone.values(), *three.values()]:
            engine.close()


@pytest.fixture
def decoder_of(real_store):
    """Opens the model here with some lots, and real engines beside it with the others."""
    manifest, opened_here = real_store.manifest(REAL_MODEL), []

    def opened(shares: dict[NodeId, list[Lot]]) -> OpenModel:
        others = {node: lots for node, lots in shares.items() if node != ME}
        table, started = swarm_with_table(real_store.root, manifest, others)
        pool = PeerPool(Introduction("s", manifest.hash, ME), 5.0)
        opened_here.extend([pool, *started.values()])
        model = OpenModel(manifest, real_store, me=ME, peers=pool, context_tokens=512)
        model.experts.load(shares[ME])
        model.board.pin(table)
        model.refit()
        return model

    yield opened
    for each in opened_here:
        each.close()


def test_logits_of_three_devices_are_those_of_one_bit_for_bit(model, decoder_of) -> None:
    tokens = model.text.encode(TEXT)[:64]
    lots = model.manifest.demand().lots()
    alone = logits_of(model, tokens, range(64))
    whole = shared(lots)
    together = decoder_of(dict(zip([ME, *NODES[1:]], whole.values(), strict=True)))
    assert together.plan == "31 graphs, 30 cuts"
    assert np.array_equal(logits_of(together, tokens, range(64)), alone)


def test_logits_with_split_layers_stay_within_the_error_of_int8(model, decoder_of) -> None:
    """Where memory forces a layer apart, sums differ in their last bits, and rounding shows it."""
    tokens = model.text.encode(TEXT)[:64]
    lots = model.manifest.demand().lots()
    alone = logits_of(model, tokens, range(64))
    apart = {
        node: [lot for lot in lots if lot.expert % 3 == index]
        for index, node in enumerate([ME, NODES[1], NODES[2]])
    }
    found = logits_of(decoder_of(apart), tokens, range(64))
    difference = np.abs(found - alone)
    kl = (np.exp(log_softmax(alone)) * (log_softmax(alone) - log_softmax(found))).sum(-1).mean()
    print(f"logits differ by {np.median(difference):.3f} (median), {difference.max():.3f} (max)")
    print(f"mean KL {kl:.5f}")
    assert kl <= 0.01


def test_what_a_slow_link_loses_is_within_the_budget_and_about_what_was_estimated(
    model, real_store, monkeypatch
) -> None:
    """Every layer at a peer, rows and answers in steps, told ahead from layer to layer: all is
    real but the link, which is on this machine and believed to be slow."""
    slow = LinkSpeed(0.02, 1e6)
    monkeypatch.setattr(peers, "link_of", lambda _sock: slow)
    monkeypatch.setattr(expert_calls, "link_of", lambda _sock: slow)
    manifest, owner, budget = real_store.manifest(REAL_MODEL), NODES[1], 0.02
    lots = manifest.demand().lots()
    serving = OpenModel(manifest, real_store, me=owner, peers=NoPeers(), context_tokens=512)
    serving.experts.load(lots)
    server = PeerServer("127.0.0.1", 0)
    introduction = Introduction("s", manifest.hash, owner)
    server.serve(introduction, manifest.shape.hidden, serving.experts.run)
    pool = PeerPool(Introduction("s", manifest.hash, ME), 5.0)
    pool.links[owner] = slow
    asking = OpenModel(manifest, real_store, me=ME, peers=pool, context_tokens=512)
    owners = dict.fromkeys(manifest.demand().lots(), (owner,))
    asking.board.pin(RouteTable(manifest.hash, 1, owners, {owner: (server.host, server.port)}))
    asking.refit()
    tokens = model.text.encode(TEXT)[:256]
    request = Request("lossy", tokens, 0, Silent(), quality=Quality(budget))
    try:
        journey = asking.decoder.depart()
        found = log_softmax(asking.decoder.forward(journey, tokens, range(256), request))
    finally:
        pool.close()
        server.close()
    expected = log_softmax(logits_of(model, tokens, range(256)))
    kl = float((np.exp(expected) * (expected - found)).sum(-1).mean())
    quality = request.quality
    share = 2 * quality.rows_bytes / quality.float32_bytes
    print(f"KL {kl:.4f}, estimated {quality.kl_estimate:.4f}, {share:.1%} of the bytes of fp16")
    assert 0.4 * quality.kl_estimate < kl < 1.5 * quality.kl_estimate
    assert quality.kl_estimate <= budget
    assert share < 0.27
