"""How a checkpoint becomes a model: its shape, and where each tensor of the manifest is read from.

A family says what it does differently (`Traits`); what all have in common is here: the names of
attention and norms in both kinds of source, the slices of a dense feed-forward block, and the
check of every tensor's presence and shape before anything is read or written.

llama.cpp stores the rows of q and k of some families for interleaved rotary embedding (pairs 2i,
2i+1); they are put back into the half-rotated order (pairs i, i + dim/2) that the engine's kernel
is given. Names and meanings: transformers, models/*/modeling_*.py; llama.cpp, conversion/*.py and
src/models/*.cpp.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from coeld.errors import BadModelFile, UnsupportedModel
from coeld.model.checkpoint import Checkpoint
from coeld.model.families.rope import FACTORS, read_rope
from coeld.model.families.settings import COUNT_MAX, Settings
from coeld.model.manifest import HEAD_BLOCK, Activation, Routing, Shape

Floats = NDArray[np.float32]

SILU: Final = Activation()
SLICES_WANTED: Final = 8
"""Neuron slices per dense feed-forward block: eight let up to eight devices share a layer."""
BLOCKS_WANTED: Final = (128, 64, 32, 16)
"""Weights that share one scale in layers: the largest that divides all widths."""
HEAD_DIM_STEP: Final = 16
"""Of the attention kernel."""
IGNORED: Final = (".rotary_emb.inv_freq", ".attn_rot_embd")
"""Ends of tensors that old files hold and that follow from the configuration."""


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor of the checkpoint, and how it becomes one of the model."""

    name: str
    shape: tuple[int, ...]
    """The whole tensor's, as it must be in the checkpoint."""
    index: int | None = None
    """Read only this one of the first dimension (an expert of many)."""
    change: Callable[..., Floats] | None = None
    """Of what was read; and of what `beside` gives, where there is that."""
    beside: "Source | None" = None
    """Another tensor that is needed for this one: the scales of packed weights."""

    def read(self, checkpoint: Checkpoint) -> Floats:
        """Raises BadModelFile."""
        if self.index is None:
            value = checkpoint.read(self.name)
        else:
            value = checkpoint.read(self.name, self.index, self.index + 1)[0]
        if self.change is None:
            return value
        if self.beside is None:
            return self.change(value)
        value = self.change(value, self.beside.read(checkpoint))
        if not np.isfinite(value).all():
            raise BadModelFile(
                f"tensor {self.name} of {checkpoint.source} holds numbers beyond all bounds: the "
                "file is damaged. Get it again."
            )
        return value

    def below(self, prefix: str) -> "Source":
        """The same with `prefix` before all names."""
        beside = self.beside and self.beside.below(prefix)
        return replace(self, name=prefix + self.name, beside=beside)


Expert = dict[str, Source]
"""`gate`, `up` (I, H), `down` (H, I); with biases also `gate.b`, `up.b` (I,), `down.b` (H,)."""


@dataclass(frozen=True, slots=True)
class Layer:
    """Where one layer's tensors are. As in the manifest, but for what follows."""

    trunk: dict[str, tuple[Source, ...]]
    """Several sources follow each other along the first dimension."""
    experts: tuple[Expert, ...]
    """In a dense model one, with the whole feed-forward block, to be sliced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What a family does differently."""

    theta: float = 10_000.0
    """The rotary base where the configuration names none."""
    yarn_truncate: bool = True
    permuted: bool = False
    """GGUF files hold q and k for interleaved rotary embedding."""
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: Literal["none", "head", "all"] = "none"
    sinks: bool = False
    windows: tuple[int, ...] = ()
    attention_scale: float | None = None
    """None: 1 / sqrt(head_dim)."""
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    """What attention and experts add to the residual is multiplied by this."""
    logits_scale: float = 1.0
    activation: Activation = SILU
    width: int
    """Neurons of an expert, or of the dense feed-forward block."""
    routing: Routing | None = None
    experts: int = 1
    top_k: int = 1
    shared_width: int = 0
    shared_score: bool = False
    """The shared expert's output is times a sigmoid of a score of its own."""
    ffn_norm: tuple[str, str] = ("post_attention_layernorm", "ffn_norm")
    router: str = "mlp.gate"
    """The router's name in Hugging Face folders."""
    router_bias: bool = False
    packed: bool = False
    """Hugging Face: the experts' matrices are packed, in a way their family knows."""


Feed = Callable[["Sizes", Traits, int], Expert]
"""(sizes, traits, expert) to that expert's tensors, named relative to the layer."""
Shared = Callable[["Sizes", Traits], dict[str, tuple[Source, ...]]]


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of model. Adding one touches nothing but its own file and the list of families."""

    name: str
    """The `model_type` of Hugging Face's config.json."""
    architecture: str
    """GGUF's `general.architecture`."""
    read: Callable[[Settings], Traits]
    """Raises BadModelFile or UnsupportedModel."""
    expert: Feed
    """For Hugging Face folders; GGUF files name them alike in all families."""
    shared: Shared | None = None
    """For Hugging Face folders, where there is a shared expert."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Dimensions that tensors have."""

    hidden: int
    q: int
    kv: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A checked checkpoint: every tensor named here is in it, with that shape."""

    checkpoint: Checkpoint
    shape: Shape
    tied: bool
    embedding: Source
    head: Source
    norm: Source
    layers: tuple[Layer, ...]
    block: int
    """Weights that share one scale in the layers."""

    def trunk(self, layer: int) -> dict[str, Floats]:
        """A layer without its routed experts, named as in the manifest. Raises BadModelFile."""
        return {
            name: np.concatenate([source.read(self.checkpoint) for source in sources])
            for name, sources in self.layers[layer].trunk.items()
        }

    def expert(self, layer: int, index: int) -> dict[str, Floats]:
        """One expert, or a dense layer's whole block, named as `Expert`. Raises BadModelFile."""
        sources = self.layers[layer].experts[index].items()
        return {name: source.read(self.checkpoint) for name, source in sources}


def draw(checkpoint: Checkpoint, family: Family) -> Blueprint:
    """Read the configuration and check all tensors. Raises BadModelFile or UnsupportedModel."""
    settings = Settings(checkpoint, family.architecture)
    traits = family.read(settings)
    shape = _shape(settings, family, traits)
    drafter = _Drafter(settings, family, traits, shape)
    block = _block(shape)
    if traits.routing is None:
        slices = _slices(shape.expert_width, block)
        shape = replace(
            shape, experts=slices, top_k=slices, expert_width=shape.expert_width // slices
        )
    blueprint = drafter.blueprint(shape, block)
    settings.refuse_what_nobody_asked_for()
    _check(blueprint)
    return blueprint


def _shape(settings: Settings, family: Family, traits: Traits) -> Shape:
    """In a dense model as if the feed-forward block were one expert."""
    hidden = settings.count("hidden_size", "embedding_length")
    heads = settings.count("num_attention_heads", "attention.head_count")
    kv_heads = settings.count("num_key_value_heads", "attention.head_count_kv", heads)
    head_dim = settings.count("head_dim", "attention.key_length", max(1, hidden // heads))
    for name in ("attention.value_length", "rope.dimension_count"):
        if settings.gguf and settings.count("", name, head_dim) != head_dim:
            settings.refuse(name, settings.value("", name))
    if traits.top_k > traits.experts:
        settings.bad("num_experts_per_tok", "expert_used_count", traits.top_k)
    if heads % kv_heads or head_dim % HEAD_DIM_STEP:
        raise UnsupportedModel(
            f"{heads} heads of {head_dim} values over {kv_heads} key-value heads: coeld needs a "
            f"whole number of heads for each, and a multiple of {HEAD_DIM_STEP} values per head."
        )
    name = "token_embd.weight" if settings.gguf else "model.embed_tokens.weight"
    vocab = settings.checkpoint.shape(name)[0] if settings.has(name) else 0
    if not 0 < vocab <= COUNT_MAX:
        raise BadModelFile(
            f"{settings.checkpoint.source} has no tensor {name!r}: it is not a complete model."
        )
    if settings.count("vocab_size", "vocab_size", vocab) != vocab:
        raise BadModelFile(
            f"tensor {name!r} of {settings.checkpoint.source} has {vocab} rows, expected "
            f"{settings.value('vocab_size', 'vocab_size')} (vocab_size). The file is damaged."
        )
    return Shape(
        family=family.name,
        layers=settings.count("num_hidden_layers", "block_count"),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        experts=traits.experts,
        top_k=traits.top_k,
        expert_width=traits.width,
        vocab=vocab,
        context_max=settings.count("max_position_embeddings", "context_length"),
        norm_epsilon=settings.number("rms_norm_eps", "attention.layer_norm_rms_epsilon"),
        rope=read_rope(settings, head_dim, traits.theta, traits.yarn_truncate),
        attention_scale=traits.attention_scale or head_dim**-0.5,
        routing=traits.routing,
        activation=traits.activation,
        qk_norm=traits.qk_norm,
        windows=traits.windows,
        shared_width=traits.shared_width,
        embedding_scale=traits.embedding_scale,
    )


def _block(shape: Shape) -> int:
    widths = (shape.hidden, shape.heads * shape.head_dim, shape.expert_width, shape.shared_width)
    for block in BLOCKS_WANTED:
        if all(width % block == 0 for width in widths) and shape.hidden % HEAD_BLOCK == 0:
            return block
    raise UnsupportedModel(
        f"widths {widths} (embedding, attention, feed-forward, shared expert) are not all "
        f"multiples of {BLOCKS_WANTED[-1]} (the first: of {HEAD_BLOCK}); coeld stores weights in "
        "blocks of that many."
    )


def _slices(width: int, block: int) -> int:
    return next(count for count in range(SLICES_WANTED, 0, -1) if width % (count * block) == 0)


class _Drafter:
    """Names the tensors of one checkpoint."""

    def __init__(self, settings: Settings, family: Family, traits: Traits, shape: Shape) -> None:
        self._settings, self._family, self._traits = settings, family, traits
        self._layers, self._heads, self._kv_heads = shape.layers, shape.heads, shape.kv_heads
        self._vocab = shape.vocab
        d = shape.head_dim
        self._sizes = Sizes(shape.hidden, shape.heads * d, shape.kv_heads * d, d)

    def blueprint(self, shape: Shape, block: int) -> Blueprint:
        settings, h, scale = self._settings, shape.hidden, self._traits.logits_scale
        gguf = settings.gguf
        matrix = (self._vocab, h)
        embedding = Source("token_embd.weight" if gguf else "model.embed_tokens.weight", matrix)
        head = Source("output.weight" if gguf else "lm_head.weight", matrix)
        tied = settings.flag("tie_word_embeddings", "", default=not settings.has(head.name))
        norm = Source("output_norm.weight" if gguf else "model.norm.weight", (h,))
        return Blueprint(
            checkpoint=settings.checkpoint,
            shape=shape,
            tied=tied,
            embedding=embedding,
            head=embedding if tied else head,
            norm=norm if scale == 1 else _scale(norm, scale),
            layers=tuple(self._layer(index) for index in range(self._layers)),
            block=block,
        )

    def _layer(self, index: int) -> Layer:
        traits, sizes = self._traits, self._sizes
        gguf = self._settings.gguf
        prefix = f"blk.{index}." if gguf else f"model.layers.{index}."
        trunk = self._attention()
        if traits.routing is not None:
            trunk |= self._router()
        if traits.shared_width:
            trunk |= self._shared()
        feed = gguf_expert if gguf else self._family.expert
        experts = [feed(sizes, traits, expert) for expert in range(traits.experts)]
        if traits.residual_scale != 1:
            for name in ("o", "o.b", "shared_down"):
                if name in trunk:
                    trunk[name] = tuple(_scale(s, traits.residual_scale) for s in trunk[name])
            for expert in experts:
                for name in expert.keys() & {"down", "down.b"}:
                    expert[name] = _scale(expert[name], traits.residual_scale)
        return Layer(
            trunk={
                name: tuple(source.below(prefix) for source in sources)
                for name, sources in trunk.items()
            },
            experts=tuple(
                {name: source.below(prefix) for name, source in expert.items()}
                for expert in experts
            ),
        )

    def _attention(self) -> dict[str, tuple[Source, ...]]:
        traits, sizes, gguf = self._traits, self._sizes, self._settings.gguf
        h, q, kv = sizes.hidden, sizes.q, sizes.kv
        norm = ("input_layernorm", "attn_norm")
        trunk = {
            "attention_norm": (self._named(norm, "weight", (h,)),),
            "ffn_norm": (self._named(traits.ffn_norm, "weight", (h,)),),
            "qkv": self._qkv("weight", (h,)),
            "o": (self._named(("self_attn.o_proj", "attn_output"), "weight", (h, q)),),
        }
        if traits.qkv_bias:
            trunk["qkv.b"] = self._qkv("bias", ())
        if traits.o_bias:
            trunk["o.b"] = (self._named(("self_attn.o_proj", "attn_output"), "bias", (h,)),)
        if traits.qk_norm != "none":
            wide = traits.qk_norm == "all"
            for name, width in (("q", q), ("k", kv)):
                names = (f"self_attn.{name}_norm", f"attn_{name}_norm")
                shape = (width if wide else sizes.head_dim,)
                trunk[f"{name}_norm"] = (self._named(names, "weight", shape),)
        if traits.sinks:
            name = "attn_sinks.weight" if gguf else "self_attn.sinks"
            trunk["sinks"] = (Source(name, (self._heads,)),)
        return trunk

    def _qkv(self, end: str, columns: tuple[int, ...]) -> tuple[Source, ...]:
        sizes = self._sizes
        parts = []
        for name, rows, heads in (
            ("q", sizes.q, self._heads),
            ("k", sizes.kv, self._kv_heads),
            ("v", sizes.kv, 0),
        ):
            source = self._named((f"self_attn.{name}_proj", f"attn_{name}"), end, (rows, *columns))
            if self._traits.permuted and self._settings.gguf and heads:
                source = replace(source, change=_half_rotation(heads))
            parts.append(source)
        return tuple(parts)

    def _router(self) -> dict[str, tuple[Source, ...]]:
        traits, names = self._traits, (self._traits.router, "ffn_gate_inp")
        shape = (traits.experts, self._sizes.hidden)
        router: dict[str, tuple[Source, ...]] = {"router.w": (self._named(names, "weight", shape),)}
        if traits.router_bias:
            router["router.b"] = (self._named(names, "bias", (traits.experts,)),)
        return router

    def _shared(self) -> dict[str, tuple[Source, ...]]:
        if not self._settings.gguf:
            assert self._family.shared is not None, "a shared expert needs its names"
            return self._family.shared(self._sizes, self._traits)
        h, width = self._sizes.hidden, self._traits.shared_width
        shared: dict[str, tuple[Source, ...]] = {
            "shared_gate": (Source("ffn_gate_shexp.weight", (width, h)),),
            "shared_up": (Source("ffn_up_shexp.weight", (width, h)),),
            "shared_down": (Source("ffn_down_shexp.weight", (h, width)),),
        }
        if self._traits.shared_score:
            name, settings = "ffn_gate_inp_shexp.weight", self._settings
            first = f"blk.0.{name}"
            flat = settings.has(first) and len(settings.checkpoint.shape(first)) == 1  # older files
            row = Source(name, (h,), None, lambda x: x[None]) if flat else Source(name, (1, h))
            shared["shared_score"] = (row,)
        return shared

    def _named(self, names: tuple[str, str], end: str, shape: tuple[int, ...]) -> Source:
        return Source(f"{names[self._settings.gguf]}.{end}", shape)


def gguf_expert(sizes: Sizes, traits: Traits, expert: int) -> Expert:
    """GGUF's names: one tensor for all experts of a layer, or one block in a dense layer."""
    h, width = sizes.hidden, traits.width
    shapes = {"gate": (width, h), "up": (width, h), "down": (h, width)}
    if traits.routing is None:
        return {name: Source(f"ffn_{name}.weight", shape) for name, shape in shapes.items()}
    found = {
        name: Source(f"ffn_{name}_exps.weight", (traits.experts, *shape), expert)
        for name, shape in shapes.items()
    }
    if traits.router_bias:
        found |= {
            f"{name}.b": Source(f"ffn_{name}_exps.bias", (traits.experts, shape[0]), expert)
            for name, shape in shapes.items()
        }
    return found


def named_experts(gate: str, up: str, down: str) -> Feed:
    """Hugging Face's way in most families: a matrix of its own each, `{}` is the expert."""

    def expert(sizes: Sizes, traits: Traits, index: int) -> Expert:
        h, width = sizes.hidden, traits.width
        return {
            "gate": Source(gate.format(index), (width, h)),
            "up": Source(up.format(index), (width, h)),
            "down": Source(down.format(index), (h, width)),
        }

    return expert


DENSE: Final = named_experts("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")


def half_rotated(weight: Floats, heads: int) -> Floats:
    """Rows of each head from order 0, d/2, 1, d/2+1, … back to 0, 1, …, d-1."""
    rows, *columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, *columns)
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _half_rotation(heads: int) -> Callable[[Floats], Floats]:
    return lambda weight: half_rotated(weight, heads)


def _scale(source: Source, factor: float) -> Source:
    """The source, with what it gives multiplied by `factor`."""
    before = source.change or (lambda value: value)
    return replace(source, change=lambda *values: before(*values) * np.float32(factor))


def _sources(blueprint: Blueprint) -> Iterator[Source]:
    yield from (blueprint.embedding, blueprint.head, blueprint.norm)
    for layer in blueprint.layers:
        for sources in layer.trunk.values():
            yield from sources
        for expert in layer.experts:
            for source in expert.values():
                yield source
                if source.beside is not None:
                    yield source.beside


def _check(blueprint: Blueprint) -> None:
    """Every tensor that is needed is there with its shape, and no other is."""
    checkpoint, known = blueprint.checkpoint, set()
    names = checkpoint.names()
    for source in _sources(blueprint):
        if source.name in known:
            continue
        known.add(source.name)
        found = checkpoint.shape(source.name) if source.name in names else "no such tensor"
        if found != source.shape:
            raise BadModelFile(
                f"tensor {source.name!r} of {checkpoint.source}: {found}, expected {source.shape}. "
                "The file is incomplete or damaged; get it again."
            )
    if blueprint.tied:
        known.add("lm_head.weight")  # some tools write the embedding twice
    if checkpoint.kind == "gguf":
        known.add(FACTORS)
    for name in sorted(set(names) - known):
        if not name.endswith(IGNORED):
            raise UnsupportedModel(
                f"{checkpoint.source} has a tensor {name!r} that models of the family "
                f"{blueprint.shape.family!r} do not have here: coeld would compute something else."
            )
