"""Blobs are valid ONNX models that run alone, and the manifest points at their weights."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from coeld.compression.quantize import dequantize
from coeld.model import onnx_blobs
from coeld.model.families import blueprint
from coeld.model.importer import expert_weights, trunk_weights
from coeld.model.manifest import PAGE, Activation, BlobRef, Form, Manifest
from coeld.model.store import Store
from tests.fakes.memory_checkpoint import huggingface
from tests.reference import gguf_numpy

Imported = tuple[Store, Manifest]
INT8_NOISE = 0.03
"""Relative error that quantising activations to int8 may cause in one block."""


def session(data: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.use_per_session_threads = False  # one pool per process, see conftest.py
    return ort.InferenceSession(data, options)


def open_blob(store: Store, ref: BlobRef) -> ort.InferenceSession:
    return session(store.blob_path(ref).read_bytes())


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def weight_blobs(manifest: Manifest) -> list[BlobRef]:
    return [ref for ref in manifest.blobs() if ref.tensors]


def test_every_blob_is_an_onnx_model_whose_initializers_are_the_views(imported: Imported) -> None:
    store, manifest = imported
    for ref in weight_blobs(manifest):
        model = onnx.load(str(store.blob_path(ref)))
        onnx.checker.check_model(model)
        found = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
        views = store.tensors(ref)
        assert found.keys() >= views.keys()
        assert all((found[name] == views[name]).all() for name in views)


def test_every_weight_is_aligned_and_framing_is_small(imported: Imported) -> None:
    for ref in weight_blobs(imported[1]):
        assert all(tensor.offset % 64 == 0 for tensor in ref.tensors.values())
        paged = [tensor for tensor in ref.tensors.values() if is_paged(tensor.bytes)]
        assert all(tensor.offset % PAGE == 0 for tensor in paged)
        weights = sum(tensor.bytes for tensor in ref.tensors.values())
        assert ref.bytes - weights < 4096 + PAGE * len(paged)


def is_paged(size: int) -> bool:
    return size >= PAGE and size % PAGE == 0


@pytest.mark.parametrize("size", [1, 63, 64, 127, 128, 16_383, 16_384, 2_097_151, 3 << 14])
def test_alignment_holds_for_any_length_of_graph_and_weight(size: int) -> None:
    for length in (*range(0, 130, 13), *range(16_000, 16_500, 41)):
        model = onnx.ModelProto(producer_name="x" * length).SerializeToString()
        weights = {"a": np.full(size, 7, np.uint8), "b": np.ones((2, 3), np.float32)}
        blob = onnx_blobs.append_weights(model, weights)
        data = b"".join(blob.pieces)
        back = onnx.load_from_string(data)
        assert len(back.graph.initializer) == 2
        for tensor in back.graph.initializer:
            ref = blob.tensors[tensor.name]
            assert ref.offset % (PAGE if is_paged(ref.bytes) else 64) == 0
            assert data[ref.offset : ref.offset + ref.bytes] == weights[tensor.name].tobytes()


def test_padding_takes_every_place_to_every_alignment() -> None:
    for align in (64, PAGE):
        for at in range(align + 5):
            pad = onnx_blobs._padding(at, align)
            assert (at + len(pad)) % align == 0
            assert onnx.ModelProto.FromString(pad).doc_string.strip(" ") == ""


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 32])
@pytest.mark.parametrize("activation", [Activation(), Activation(1.702, 1.0, 7.0)])
@pytest.mark.parametrize("biased", [False, True])
def test_an_expert_runs_alone_and_agrees_with_numpy(
    tiny: Manifest, bits: int, activation: Activation, biased: bool
) -> None:
    rng = np.random.default_rng(bits)
    h, i = 64, 96
    shape = replace(tiny.shape, hidden=h, expert_width=i, activation=activation)
    expert = {
        "gate": rng.standard_normal((i, h), dtype=np.float32),
        "up": rng.standard_normal((i, h), dtype=np.float32),
        "down": rng.standard_normal((h, i), dtype=np.float32),
    }
    if biased:
        sizes = {"gate.b": i, "up.b": i, "down.b": h}
        expert |= {name: rng.standard_normal(n, dtype=np.float32) for name, n in sizes.items()}
    weights = expert_weights(expert, Form(bits, 32))
    blob = onnx_blobs.expert_blob(weights, shape)
    x = rng.standard_normal((5, h), dtype=np.float32)
    gate = rng.random((5, 1), dtype=np.float32)
    (found,) = session(b"".join(blob.pieces)).run(None, {"x": x, "gate": gate})
    fc1, fc2 = (
        weights[f"{name}.w"][0]
        if bits == 32
        else dequantize(weights[f"{name}.w"][0], weights[f"{name}.s"][0], bits)
        for name in ("fc1", "fc2")
    )
    g = x @ fc1[0::2].T + expert.get("gate.b", 0)
    u = x @ fc1[1::2].T + expert.get("up.b", 0)
    if activation.limit:
        g, u = np.minimum(g, 7), np.clip(u, -7, 7)
    hidden = g / (1 + np.exp(-activation.alpha * g)) * (u + activation.beta)
    wanted = (hidden @ fc2.T + expert.get("down.b", 0)) * gate
    assert relative_error(found, wanted) < (1e-5 if bits == 32 else INT8_NOISE)


def test_the_slices_of_a_layer_add_up_to_its_feed_forward_block(
    imported: Imported, tiny_gguf: Path
) -> None:
    store, manifest = imported
    reference = gguf_numpy.load(tiny_gguf)
    x = np.random.default_rng(1).standard_normal((5, manifest.shape.hidden)).astype(np.float32)
    one = np.ones((5, 1), np.float32)
    for layer, experts in enumerate(manifest.experts):
        norm = store.tensors(manifest.trunk[layer])["ffn_norm"]
        inputs = {"x": x * (norm / reference.tensors[f"blk.{layer}.ffn_norm.weight"]), "gate": one}
        found = sum(open_blob(store, ref).run(None, inputs)[0] for ref in experts)
        assert relative_error(found, reference.feed_forward(x, layer)) < INT8_NOISE


@pytest.mark.parametrize("bits", [4, 8, 32])
def test_a_trunk_applies_its_matrices(bits: int) -> None:
    """One with everything in it: biases, sinks, a router, norms."""
    plan = blueprint(huggingface("gpt_oss"))
    form = Form(bits, plan.block)
    weights = trunk_weights(plan.trunk(0), plan.shape, form)
    runner = session(b"".join(onnx_blobs.linear_blob("trunk", weights, form).pieces))
    rng = np.random.default_rng(3)
    for name in ("qkv", "o", "router"):
        w = weights[f"{name}.w"]
        if f"{name}.s" in weights:
            w = dequantize(w.reshape(len(w), -1), weights[f"{name}.s"], bits)
        feeds = {
            item.name: np.zeros((3, item.shape[1]), np.float32) for item in runner.get_inputs()
        }
        x = feeds[f"{name}.in"] = rng.standard_normal((3, w.shape[1]), dtype=np.float32)
        (found,) = runner.run([f"{name}.out"], feeds)
        exact = bits == 32 or name == "router"
        wanted = x @ w.T + weights[f"{name}.b"]
        assert relative_error(found, wanted) < (1e-5 if exact else INT8_NOISE)
    for name in ("sinks", "attention_norm"):
        (found,) = runner.run([f"{name}.out"], feeds)
        np.testing.assert_array_equal(found, weights[name])


def test_the_head_gives_the_logits_of_normed_states(imported: Imported) -> None:
    store, manifest = imported
    views = store.tensors(manifest.head)
    x = np.random.default_rng(4).standard_normal((3, manifest.shape.hidden), dtype=np.float32)
    (logits,) = open_blob(store, manifest.head).run(["head.out"], {"head.in": x})
    w = views["head.w"]
    wanted = x @ dequantize(w.reshape(len(w), -1), views["head.s"], 8).T
    assert relative_error(logits, wanted) < INT8_NOISE
