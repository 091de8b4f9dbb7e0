"""A manifest edited by hand is refused, with an error that says what is wrong."""

import json
import random
from dataclasses import replace
from typing import Any

import pytest

from coeld.errors import BadModelFile
from coeld.model.manifest import Manifest, parse_manifest
from coeld.model.store import Store

Imported = tuple[Store, Manifest]


def edited(manifest: Manifest, path: list[Any], value: Any) -> str:
    tree = json.loads(manifest.to_json())
    inner = tree
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return json.dumps(tree)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["format"], 1),
        (["shape", "expert_width"], 32),
        (["shape", "shared_width"], -1),
        (["shape", "qk_norm"], "some"),
        (["shape", "windows"], [1]),
        (["shape", "activation", "alpha"], "1"),
        (["shape", "routing"], {"score": "softmax", "renormalise": True, "scale": 1.0}),
        (["shape", "hidden"], 128),
        (["shape", "hidden"], 64.0),
        (["shape", "layers"], True),
        (["shape", "rope", "scale"], float("nan")),
        (["shape", "rope", "inverse_frequencies"], [1.0]),
        (["shape", "kv_heads"], 3),
        (["shape", "top_k"], 9),
        (["experts"], []),
        (["head", "sha256"], "../../../etc/passwd"),
        (["head", "bytes"], 10),
        (["head", "tensors", "norm", "offset"], -64),
        (["head", "tensors", "norm", "offset"], 1),
        (["head", "tensors", "norm", "shape"], [1 << 62]),
        (["head", "tensors", "head.w", "dtype"], "float64"),
        (["head", "tensors", "head.w", "dtype"], "float32"),
        (["head", "tensors"], {}),
        (["trunk", 0, "tensors", "ffn_norm", "shape"], [1]),
        (["eos_tokens"], [-1]),
        (["bos_token"], "1"),
        (["tied"], 1),
        (["name"], 3),
        (["surprise"], 1),
    ],
)
def test_a_wrong_value_is_refused(imported: Imported, path: list[Any], value: Any) -> None:
    with pytest.raises(BadModelFile, match=r"damaged|another version"):
        parse_manifest(edited(imported[1], path, value))


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", "3", '{"format": 1}', "[" * 2000])
def test_something_else_than_a_manifest_is_refused(imported: Imported, text: str) -> None:
    with pytest.raises((BadModelFile, RecursionError)):
        parse_manifest(text)


def test_random_edits_never_raise_anything_else(imported: Imported) -> None:
    text = imported[1].to_json()
    rng = random.Random(1)
    for _ in range(300):
        at = rng.randrange(len(text))
        damaged = text[:at] + rng.choice('0{}[]",:-eX') + text[at + 1 :]
        try:
            parse_manifest(damaged)
        except BadModelFile:
            continue


def test_the_hash_is_of_the_content_not_of_the_name(imported: Imported) -> None:
    manifest = imported[1]
    renamed = parse_manifest(edited(manifest, ["name"], "other"))
    retrained = parse_manifest(edited(manifest, ["add_bos"], True))
    assert renamed.hash == manifest.hash
    assert retrained.hash != manifest.hash


def test_the_hash_says_nothing_of_the_order_of_end_tokens(imported: Imported) -> None:
    """There are models in stores that were imported when it was another."""
    manifest = imported[1]
    assert manifest.eos_tokens == (2, 0)
    older = parse_manifest(edited(manifest, ["eos_tokens"], [0, 2]))
    assert older.hash == manifest.hash
    assert parse_manifest(edited(manifest, ["eos_tokens"], [0])).hash != manifest.hash


def test_what_a_model_demands_is_its_weights(imported: Imported) -> None:
    manifest = imported[1]
    lots = sum(len(layer) for layer in manifest.experts)
    demand = manifest.demand()
    assert demand.lot_bytes * lots + demand.trunk_bytes == manifest.weights_bytes


def test_the_hash_is_worked_out_once(tiny: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Daemons ask for it all the time, and a large model takes half a second."""
    fresh = replace(tiny, name="other")
    assert fresh.hash == tiny.hash
    monkeypatch.setattr(Manifest, "_value", lambda _self: pytest.fail("worked out again"))
    assert fresh.hash == tiny.hash
    assert fresh.release.model == tiny.hash
