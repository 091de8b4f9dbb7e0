"""Block quantisation: error bounds, a slow search as oracle, the kernels' reading of the bytes."""

import hashlib

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from coeld.compression.quantize import dequantize, pack, quantize, unpack

LOW = [2, 3, 4]


def awkward(seed: int) -> np.ndarray:
    """Weights of very different sizes, with zeros, lone spikes and denormal numbers."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((24, 256)).astype(np.float32)
    weight *= np.float32(10.0) ** rng.integers(-30, 30, (24, 1)).astype(np.float32)
    weight[0] = 0
    weight[1, 1:] = 0
    weight[2] = np.float32(1e-44)
    weight[3, :64] = np.float32(3.4e38)
    return weight


def ordinary(seed: int, rows: int = 6, columns: int = 128) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_t(4, (rows, columns)) * rng.uniform(0.01, 1, (rows, 1))).astype(np.float32)


@pytest.mark.parametrize("block", [32, 64])
@pytest.mark.parametrize("seed", range(5))
def test_at_8_bits_no_weight_is_off_by_more_than_half_a_step(block: int, seed: int) -> None:
    weight = awkward(seed)
    with np.errstate(all="raise", under="ignore"):
        w, scale = quantize(weight, 8, block)
        back = dequantize(w, scale, 8)
    largest = np.abs(weight.reshape(24, -1, block)).max(axis=2).repeat(block, axis=1)
    rounding = np.float32(1e-6) * largest + np.float32(1e-43)
    assert (np.abs(back - weight) <= largest / 254 + rounding).all()


@pytest.mark.parametrize("bits", LOW)
@pytest.mark.parametrize("seed", range(5))
def test_a_searched_scale_is_never_worse_than_the_plain_one(bits: int, seed: int) -> None:
    weight, block = awkward(seed), 32
    importance = np.random.default_rng(seed).uniform(0, 1, 256).astype(np.float32)
    with np.errstate(all="raise", under="ignore"):
        back = dequantize(*quantize(weight, bits, block, importance), bits).astype(np.float64)
    blocks = weight.reshape(24, -1, block).astype(np.float64)
    top = 2 ** (bits - 1) - 1
    step = np.maximum(np.abs(blocks).max(axis=2, keepdims=True) / top, 1e-300)
    plain = np.clip(np.rint(blocks / step), -top - 1, top) * step
    channel = importance.reshape(-1, block)
    ours = (channel * (back.reshape(blocks.shape) - blocks) ** 2).sum(axis=2)
    theirs = (channel * (plain - blocks) ** 2).sum(axis=2)
    floor = 1e-6 * (channel * blocks**2).sum(axis=2) + 1e-80
    assert (ours <= theirs + floor).all()


def best_error(block: np.ndarray, channel: np.ndarray, bits: int) -> float:
    """The least weighted squared error over 4001 scales of both signs, each fitted once."""
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    errors = []
    for scale in np.linspace(-1, 1, 4001) * 1.2 * np.abs(block).max() / highest:
        if scale:
            steps = np.clip(np.rint(block / scale), lowest, highest)
            fitted = (channel * steps * block).sum() / max((channel * steps**2).sum(), 1e-30)
            errors.append((channel * (steps * fitted - block) ** 2).sum())
    return min(errors)


@pytest.mark.parametrize("bits", LOW)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_search_comes_close_to_an_exhaustive_one(bits: int, weighted: bool) -> None:
    weight = ordinary(bits).astype(np.float64)
    importance = np.ones(128)
    if weighted:
        importance = np.random.default_rng(7).uniform(0.01, 1, 128) ** 2
    w, s = quantize(weight.astype(np.float32), bits, 32, importance.astype(np.float32))
    blocks, channel = weight.reshape(-1, 32), np.tile(importance.reshape(-1, 32), (6, 1))
    back = dequantize(w, s, bits).reshape(-1, 32)
    ours = (channel * (back - blocks) ** 2).sum()
    best = sum(best_error(*pair, bits) for pair in zip(blocks, channel, strict=True))
    assert ours <= 1.05 * best


@pytest.mark.parametrize("bits", [8, *LOW])
def test_weights_on_the_grid_survive(bits: int) -> None:
    """Of a GGUF file in Q8_0 exactly, in Q4_0 but for rounding."""
    rng = np.random.default_rng(bits)
    lowest = -127 if bits == 8 else -(2 ** (bits - 1))
    steps = rng.integers(lowest, 2 ** (bits - 1), (8, 128))
    steps[:, ::32] = lowest
    scale = rng.uniform(0.01, 1, (8, 4)).astype(np.float16).astype(np.float32)
    grid = (steps * scale.repeat(32, axis=1)).astype(np.float32)
    back = dequantize(*quantize(grid, bits, 32), bits)
    assert np.abs(back - grid).max() <= (0 if bits == 8 else 1e-6) + 1e-7


@pytest.mark.parametrize("bits", [8, *LOW])
def test_shapes_and_types_are_what_the_kernels_read(bits: int) -> None:
    w, scale = quantize(ordinary(0), bits, 64)
    assert (w.shape, w.dtype) == ((6, 128 * bits // 8), np.uint8)
    assert (scale.shape, scale.dtype) == ((6, 2), np.float32)


@pytest.mark.parametrize("bits", [8, *LOW])
def test_packing_is_a_stream_of_bits_lowest_first(bits: int) -> None:
    levels = np.random.default_rng(0).integers(0, 2**bits, (3, 64)).astype(np.uint8)
    stream = [level >> bit & 1 for row in levels for level in row for bit in range(bits)]
    slow = [sum(stream[i + b] << b for b in range(8)) for i in range(0, len(stream), 8)]
    assert pack(levels, bits).tobytes() == bytes(slow)
    assert (unpack(pack(levels, bits), bits) == levels).all()


@pytest.mark.parametrize("bits", [8, *LOW])
def test_rows_give_the_same_bytes_alone_and_together(bits: int) -> None:
    weight = ordinary(3, rows=40)
    w, scale = quantize(weight, bits, 32)
    for row in range(40):
        alone = quantize(weight[row : row + 1], bits, 32)
        assert (alone[0] == w[row]).all()
        assert (alone[1] == scale[row]).all()


def test_every_machine_makes_the_same_bytes() -> None:
    """Of whole numbers, which every machine makes alike. The hash was taken on x86-64."""
    ring = np.arange(64 * 256, dtype=np.int64) * 7919 % 65521 - 32760
    weight = ring.reshape(64, 256).astype(np.float32)
    importance = (np.arange(256) % 7 + 1).astype(np.float32)
    digest = hashlib.sha256()
    for bits in (8, *LOW):
        for array in quantize(weight, bits, 32, importance):
            digest.update(array.tobytes())
    assert digest.hexdigest()[:16] == "cfc183b5a161bb00"


def test_a_width_that_is_no_multiple_of_the_block_is_a_programming_mistake() -> None:
    with pytest.raises(AssertionError, match="no multiple"):
        quantize(np.zeros((1, 48), np.float32), 8, 32)


def run(node: onnx.NodeProto, feeds: dict[str, np.ndarray], **weights: np.ndarray) -> np.ndarray:
    kind = helper.np_dtype_to_tensor_dtype(feeds["x"].dtype)
    info = [helper.make_tensor_value_info(name, kind, value.shape) for name, value in feeds.items()]
    out = [helper.make_tensor_value_info("y", kind, None)]
    initializers = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph([node], "g", info, out, initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.use_per_session_threads = False  # one pool per process, see conftest.py
    return ort.InferenceSession(model.SerializeToString(), options).run(None, feeds)[0]


def relative(found: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(found.astype(np.float64) - want) / np.linalg.norm(want))


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_matmulnbits_reads_these_bytes(bits: int) -> None:
    """On CPU it knows 2, 4 and 8 bits, and no 3."""
    weight = ordinary(bits, 32, 128)
    w, s = quantize(weight, bits, 32)
    x = np.random.default_rng(1).standard_normal((4, 128)).astype(np.float32)
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=128, N=32, bits=bits,
        block_size=32, accuracy_level=0,
    )  # fmt: skip
    y = run(node, {"x": x}, w=w.reshape(32, 4, 4 * bits), s=s)
    assert relative(y, x @ dequantize(w, s, bits).T) < 1e-5


@pytest.mark.parametrize("level", [0, 4])
@pytest.mark.parametrize(("bits", "kind"), [(8, "f4"), (4, "f4"), (2, "f4"), (3, "f2")])
def test_qmoe_reads_these_bytes(bits: int, kind: str, level: int) -> None:
    """3 bits only with half-precision rows and scales, and weights_prepacked=0."""
    hidden, width, experts = 64, 32, 3
    rng = np.random.default_rng(bits)
    fc1 = [quantize(ordinary(e, 2 * width, hidden), bits, 32) for e in range(experts)]
    fc2 = [quantize(ordinary(9 + e, hidden, width), bits, 32) for e in range(experts)]
    x = rng.standard_normal((5, hidden)).astype(kind)
    chosen = rng.integers(0, experts, 5)
    logits = np.where(np.arange(experts) == chosen[:, None], 0, -100).astype(kind)
    node = helper.make_node(
        "QMoE", ["x", "p", "f1", "s1", "", "f2", "s2"], ["y"], domain="com.microsoft", k=1,
        activation_type="swiglu", swiglu_fusion=1, expert_weight_bits=bits, block_size=32,
        normalize_routing_weights=1, accuracy_level=level, weights_prepacked=0,
    )  # fmt: skip
    f1, s1 = (np.stack(part) for part in zip(*fc1, strict=True))
    f2, s2 = (np.stack(part) for part in zip(*fc2, strict=True))
    y = run(node, {"x": x, "p": logits}, f1=f1, s1=s1.astype(kind), f2=f2, s2=s2.astype(kind))
    for row, expert in enumerate(chosen):
        both = x[row].astype(np.float64) @ dequantize(*fc1[expert], bits).T
        gate, up = both[0::2], both[1::2]
        want = (gate / (1 + np.exp(-gate)) * up) @ dequantize(*fc2[expert], bits).T
        exact = bits == 2 or (bits == 4 and level == 0)
        assert relative(y[row], want) < (1e-5 if exact else 0.03)
