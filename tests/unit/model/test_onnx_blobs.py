"""Blobs are valid ONNX models that run alone, and the manifest points at their weights."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from coeld.compression.quantize import dequantize
from coeld.model import onnx_blobs
from coeld.model.manifest import BlobRef, Manifest
from coeld.model.store import Store
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


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


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
        assert ref.bytes - sum(tensor.bytes for tensor in ref.tensors.values()) < 4096


@pytest.mark.parametrize("size", [1, 63, 64, 127, 128, 16_383, 2_097_151])
def test_alignment_holds_for_any_length_of_graph_and_weight(size: int) -> None:
    for length in range(0, 130, 13):
        model = onnx.ModelProto(producer_name="x" * length).SerializeToString()
        weights = {"a": np.full(size, 7, np.uint8), "b": np.ones((2, 3), np.float32)}
        data, refs = onnx_blobs.append_weights(model, weights)
        back = onnx.load_from_string(data)
        assert all(ref.offset % 64 == 0 for ref in refs.values())
        for tensor in back.graph.initializer:
            ref = refs[tensor.name]
            assert data[ref.offset : ref.offset + ref.bytes] == weights[tensor.name].tobytes()


def test_an_expert_runs_alone_and_agrees_with_numpy(imported: Imported) -> None:
    store, manifest = imported
    x = np.random.default_rng(0).standard_normal((5, manifest.shape.hidden)).astype(np.float32)
    for ref in manifest.experts[0]:
        views = store.tensors(ref)
        gate, up, down = (
            dequantize(views[f"{name}.w"], views[f"{name}.s"]) for name in ("gate", "up", "down")
        )
        wanted = (silu(x @ gate.T) * (x @ up.T)) @ down.T
        (found,) = open_blob(store, ref).run(None, {"x": x})
        assert relative_error(found, wanted) < INT8_NOISE


def test_the_slices_of_a_layer_add_up_to_its_feed_forward_block(
    imported: Imported, tiny_gguf: Path
) -> None:
    store, manifest = imported
    reference = gguf_numpy.load(tiny_gguf)
    x = np.random.default_rng(1).standard_normal((5, manifest.shape.hidden)).astype(np.float32)
    for layer, experts in enumerate(manifest.experts):
        smoothed = x * smoothed_norm(store, manifest, reference, layer)
        found = sum(open_blob(store, ref).run(None, {"x": smoothed})[0] for ref in experts)
        assert relative_error(found, reference.feed_forward(x, layer)) < INT8_NOISE


def smoothed_norm(
    store: Store, manifest: Manifest, reference: gguf_numpy.Reference, layer: int
) -> np.ndarray:
    """What smoothing multiplied the inputs of a feed-forward block by, per channel."""
    found = store.tensors(manifest.attention[layer])["ffn_norm"]
    factors: np.ndarray = found / reference.tensors[f"blk.{layer}.ffn_norm.weight"]
    return factors


def rotary(manifest: Manifest, positions: int) -> dict[str, np.ndarray]:
    dim = manifest.shape.head_dim
    angle = np.outer(
        np.arange(positions), manifest.shape.rope_base ** (-np.arange(0, dim, 2) / dim)
    )
    return {"cos": np.cos(angle).astype(np.float32), "sin": np.sin(angle).astype(np.float32)}


def attend(
    store: Store, manifest: Manifest, layer: int, residual: np.ndarray, x: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """normed and residual_out for a whole sequence, without a past."""
    shape, n = manifest.shape, residual.shape[1]
    empty = np.zeros((1, shape.kv_heads, 0, shape.head_dim), np.float32)
    inputs = {
        "residual": residual,
        "x": x,
        "past_key": empty,
        "past_value": empty,
        "seqlens_k": np.array([n - 1], np.int32),
        "total_sequence_length": np.array([n], np.int32),
        **rotary(manifest, shape.context_max),
    }
    names = ["normed", "residual_out"]
    normed, out = open_blob(store, manifest.attention[layer]).run(names, inputs)
    return normed, out


def test_attention_runs_alone_and_agrees_with_the_reference(
    imported: Imported, tiny_gguf: Path
) -> None:
    store, manifest = imported
    reference = gguf_numpy.load(tiny_gguf)
    rng = np.random.default_rng(2)
    residual, x = rng.standard_normal((2, 1, 40, manifest.shape.hidden)).astype(np.float32)
    total = (residual + x)[0]
    wanted = total + reference.attention(reference.norm(total, "blk.1.attn_norm"), 1)
    normed, out = attend(store, manifest, 1, residual, x)
    assert relative_error(out[0], wanted) < INT8_NOISE
    smoothed = reference.norm(wanted, "blk.1.ffn_norm")
    smoothed *= smoothed_norm(store, manifest, reference, 1)
    assert relative_error(normed[0], smoothed) < INT8_NOISE


def test_the_blobs_chained_are_the_whole_model(imported: Imported, tiny_gguf: Path) -> None:
    store, manifest = imported
    tokens = [3, 100, 20, 42, 250, 7, 7, 1, 66]
    views = store.tensors(manifest.head)
    residual = dequantize(views["head.w"], views["head.s"])[tokens][None]
    x = np.zeros_like(residual)
    for layer, experts in enumerate(manifest.experts):
        normed, residual = attend(store, manifest, layer, residual, x)
        x = sum(open_blob(store, ref).run(None, {"x": normed[0]})[0] for ref in experts)[None]
    (logits,) = open_blob(store, manifest.head).run(None, {"hidden": (residual + x)[0]})
    assert relative_error(logits, gguf_numpy.load(tiny_gguf).logits(tokens)) < 2 * INT8_NOISE
