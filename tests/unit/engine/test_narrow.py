"""Experts held in fewer bits than they are stored in, made at load: what they compute."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from coeld.compression.quantize import dequantize
from coeld.compression.requantize import requantize
from coeld.engine.experts import ExpertSet, LotsDamaged
from coeld.engine.measure import ME, NoPeers, logits_of
from coeld.engine.open_model import OpenModel
from coeld.ids import Lot
from coeld.model.importer import Precision
from coeld.model.manifest import Manifest, tensor_bytes
from coeld.model.narrow import demand_of, narrow_experts, narrow_first, narrow_ref
from coeld.model.statistics import Statistics
from coeld.model.store import Store
from tests.harness.importing import import_file
from tests.harness.tiny_checkpoints import write_folder

TOKENS = [int(t) for t in np.random.default_rng(1).integers(3, 260, 40)]


@pytest.fixture(scope="module", params=["dense", "routed"])
def models(request, tmp_path_factory, tiny_gguf) -> tuple[Store, Manifest, Manifest]:
    """The same model stored in 8 and in 4 bits."""
    folder = tmp_path_factory.mktemp(request.param)
    source: Path = tiny_gguf
    if request.param == "routed":
        source = folder / "moe"
        write_folder(source, "qwen3_moe")
    store = Store(folder / "store")
    eight = import_file(store, source, "eight", precision=Precision(8, 8))
    four = import_file(store, source, "four", precision=Precision(4, 8))
    return store, eight, four


def opened(store: Store, manifest: Manifest, narrow=()) -> OpenModel:
    model = OpenModel(manifest, store, me=ME, peers=NoPeers(), context_tokens=64)
    model.hold_everything(narrow)
    return model


def off(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def slowly(store: Store, manifest: Manifest, lot: Lot, x: np.ndarray) -> np.ndarray:
    """One narrow expert in float32: rows (n, H) to (n, H)."""
    tensors = store.tensors(manifest.experts[lot.layer][lot.expert])
    fc1, fc2 = (
        dequantize(*requantize(tensors[f"{name}.w"][0], tensors[f"{name}.s"][0]), 4)
        for name in ("fc1", "fc2")
    )
    both = x @ fc1.T
    gate, up = both[:, 0::2], both[:, 1::2]
    hidden: np.ndarray = (gate / (1 + np.exp(-gate)) * up) @ fc2.T
    return hidden


def test_a_narrow_expert_computes_what_its_requantised_weights_say(models) -> None:
    store, eight, _ = models
    experts, lots = ExpertSet(eight, store), [Lot(1, 0), Lot(1, 3)]
    experts.load(lots, narrow=True)
    x = np.random.default_rng(2).standard_normal((6, eight.shape.hidden)).astype(np.float32)
    expected = sum(slowly(store, eight, lot, x) for lot in lots)
    assert off(experts.run(1, [0, 3], x, None), expected) < 0.02  # int8 activations


def test_it_is_as_good_as_one_imported_in_4_bits(models) -> None:
    store, eight, four = models
    rows = range(len(TOKENS))
    exact = logits_of(opened(store, eight), TOKENS, rows)
    narrow = logits_of(opened(store, eight, range(eight.shape.layers)), TOKENS, rows)
    imported = logits_of(opened(store, four), TOKENS, rows)
    assert 0 < off(narrow, exact) < 1.3 * off(imported, exact) + 0.01
    assert off(narrow, imported) < 2.5 * off(imported, exact) + 0.01


def test_a_layer_changes_its_width_and_back_and_then_gives_the_same_bits(models) -> None:
    store, eight, _ = models
    model = opened(store, eight)
    before = logits_of(model, TOKENS, range(8))
    assert "1 cut" not in model.plan
    wide_bytes = model.experts.bytes
    some = [lot for lot in eight.demand().lots() if lot.layer == 1]
    model.experts.load(some, narrow=True)
    model.refit()
    assert "1 cut" in model.plan  # spans are built from what is stored
    assert not np.array_equal(logits_of(model, TOKENS, range(8)), before)
    demand = demand_of(eight)
    saved = len(some) * (demand.lot_bytes - demand.narrow_lot_bytes)
    assert model.experts.bytes == wide_bytes - saved
    assert model.experts.lots == set(eight.demand().lots())
    model.experts.load(some)
    model.refit()
    assert np.array_equal(logits_of(model, TOKENS, range(8)), before)
    assert model.experts.bytes == wide_bytes


def test_a_layer_of_two_widths_sums_the_same(models) -> None:
    store, eight, _ = models
    x = np.random.default_rng(3).standard_normal((5, eight.shape.hidden)).astype(np.float32)
    mixed, narrow, wide = (ExpertSet(eight, store) for _ in range(3))
    mixed.load([Lot(0, 0), Lot(0, 2)])
    mixed.load([Lot(0, 1), Lot(0, 2)], narrow=True)  # 2 changes over
    narrow.load([Lot(0, 1), Lot(0, 2)], narrow=True)
    wide.load([Lot(0, 0)])
    expected = narrow.run(0, [1, 2], x, None) + wide.run(0, [0], x, None)
    assert off(mixed.run(0, [0, 1, 2], x, None), expected) < 0.01
    mixed.drop([Lot(0, 1), Lot(0, 2)])
    mixed.load([Lot(0, 2)])  # nothing remembers that it was narrow
    assert mixed.bytes == 2 * demand_of(eight).lot_bytes


@pytest.fixture
def rotten(tiny, tiny_store, tmp_path) -> Store:
    """A store in which the first blob of layer 0 is damaged."""
    shutil.copytree(tiny_store.root, tmp_path / "store")
    store = Store(tmp_path / "store")
    rot(store, tiny)
    return store


def rot(store: Store, manifest: Manifest) -> None:
    path = store.blob_path(manifest.experts[0][0])
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"!")


@pytest.mark.parametrize("narrow", [False, True])
def test_a_damaged_blob_costs_its_own_lot_only(tiny, rotten, narrow: bool) -> None:
    experts, others = ExpertSet(tiny, rotten), {Lot(0, 1), Lot(1, 0)}
    with pytest.raises(LotsDamaged, match="coeld model add") as found:
        experts.load([Lot(0, 0), *others], narrow)
    assert found.value.lots == {Lot(0, 0)}
    assert experts.lots == others
    assert experts.here(0).order == (1,)
    assert not rotten.has(tiny.experts[0][0])


def test_a_layer_whose_blob_is_damaged_answers_on_in_the_width_it_has(
    tiny, tiny_store, rotten
) -> None:
    blob = tiny.experts[0][0]
    rotten.damaged([blob])
    with rotten.lock():
        rotten.put(tiny_store.blob_path(blob).read_bytes())
    experts, lots = ExpertSet(tiny, rotten), [Lot(0, 0), Lot(0, 1)]
    experts.load(lots)
    rot(rotten, tiny)
    with pytest.raises(LotsDamaged) as found:
        experts.load([*lots, Lot(1, 0)], narrow=True)
    assert found.value.lots == set(lots)
    assert experts.here(0).order == (0, 1)
    assert experts.fusible == set(lots)
    assert experts.lots == {*lots, Lot(1, 0)}


def test_what_is_stored_in_few_bits_has_no_narrow_form(models) -> None:
    _, eight, four = models
    ref = eight.experts[0][0]
    assert tensor_bytes(narrow_ref(eight.shape, ref)) == demand_of(eight).narrow_lot_bytes
    assert demand_of(eight).narrow_lot_bytes < 0.6 * demand_of(eight).lot_bytes
    assert narrow_experts(eight, [0, 2]) == 2 * eight.shape.experts
    assert narrow_ref(four.shape, four.experts[0][0]) is four.experts[0][0]
    assert demand_of(four).narrow_lot_bytes == 0
    assert narrow_experts(four, [0, 2]) == 0


def test_the_middle_loses_bits_first_unless_an_import_has_measured_what_it_costs(tiny) -> None:
    assert narrow_first(tiny) == (1, 0, 2)
    cost = tuple((total / 8,) * 8 for total in (0.1, 0.3, 0.2))
    measured = replace(tiny, statistics=Statistics("text", 100, ((1.0,) * 8,) * 3, {4: cost}))
    assert narrow_first(measured) == (0, 2, 1)
