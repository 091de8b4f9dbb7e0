"""The sizes of a model, without its weights: from a shape file, a config.json, or the store.

A shape file is TOML with the dimensions of a model; config.json is read by the families that import
such models, so what the plan believes is what an import would do. From the sizes follows what the
market needs to know (`demand`): bytes per expert and trunk at a width, stored as an import stores
them (blocks with float32 scales; embedding and head in 8 bits; routers in float32).
"""

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from coeld.errors import ConfigError, ModelError
from coeld.ids import ModelHash
from coeld.model.manifest import BLOCKS, HEAD_BLOCK
from coeld.model.narrow import NARROW_BITS, STORED_BITS, demand_of
from coeld.model.store import Store
from coeld.planning.toml_file import Table, parse
from coeld.view import ModelDemand

if TYPE_CHECKING:
    from collections.abc import Mapping

SIZE_MAX: Final = 1 << 20
WIDTHS: Final = (8, 4)
"""Tried in this order where nobody asks for one; fewer bits cost quality, so they are asked for."""
SLICES: Final = 8
"""Of a dense feed-forward block, as an import slices it."""
PUBLISHED_MAX: Final = 16
HUB: Final = "hf:"


@dataclass(frozen=True, slots=True)
class Published:
    """What others measured with this model."""

    what: str
    tokens_per_s: float
    source: str


@dataclass(frozen=True, slots=True)
class Shape:
    """Counts. A dense model has one expert, all of it used."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    top_k: int
    expert_width: int
    shared_width: int
    vocab: int
    tied: bool
    published: tuple[Published, ...] = ()

    def demand(self, bits: int, trunk_bits: int = 8) -> ModelDemand:
        """What the market needs to know, with experts stored in `bits` per weight."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        matrix = _bytes_per_weight(trunk_bits, self._block)
        attention = int((self.hidden * (q + 2 * kv) + q * self.hidden) * matrix)
        shared = int(3 * self.hidden * self.shared_width * matrix)
        router = 4 * self.hidden * self.experts if self.experts > 1 else 0
        layer = attention + shared + router + 8 * self.hidden
        head = int(self.vocab * self.hidden * _bytes_per_weight(8, HEAD_BLOCK))
        embedding = 0 if self.tied else head
        lots, width = self.experts, self.expert_width
        if lots == 1:
            lots = next(n for n in range(SLICES, 0, -1) if width % n == 0)
            width //= lots

        def lot_bytes(bits: int) -> int:
            return int(3 * self.hidden * width * _bytes_per_weight(bits, self._block))

        return ModelDemand(
            model=ModelHash("0" * 64),
            name=self.name,
            layers=self.layers,
            experts=lots,
            lot_bytes=lot_bytes(bits),
            trunk_bytes=layer * self.layers + head + embedding,
            top_k=self.top_k if self.experts > 1 else lots,
            hidden=self.hidden,
            embedding_bytes=embedding,
            head_bytes=head,
            kv_bytes_per_token=8 * self.layers * kv,
            narrow_lot_bytes=lot_bytes(NARROW_BITS) if bits == STORED_BITS else 0,
        )

    @property
    def _block(self) -> int:
        sizes = (self.hidden, self.heads * self.head_dim, self.expert_width, self.shared_width)
        return next((b for b in sorted(BLOCKS, reverse=True) if not any(s % b for s in sizes)), 32)


def _bytes_per_weight(bits: int, block: int) -> float:
    return 4.0 if bits == 32 else bits / 8 + 4 / block


def shipped() -> dict[str, str]:
    """Names of the shape files that come with coeld, and their text."""
    folder = resources.files("coeld.planning") / "shapes"
    found = [item for item in folder.iterdir() if item.name.endswith(".toml")]
    files = sorted(found, key=lambda item: item.name)
    return {file.name.removesuffix(".toml"): file.read_text("utf-8") for file in files}


def parse_shape(text: str, source: str) -> Shape:
    """Raises ConfigError that names the key and its range."""
    table = Table(parse(text, source), source)
    found = Shape(
        name=table.text("name"),
        layers=table.count("layers", 1, 1024),
        hidden=table.count("hidden", 16, SIZE_MAX),
        heads=table.count("heads", 1, 4096),
        kv_heads=table.count("kv_heads", 1, 4096),
        head_dim=table.count("head_dim", 8, 4096),
        experts=table.count("experts", 1, 4096, 1),
        top_k=table.count("top_k", 1, 4096, 1),
        expert_width=table.count("expert_width", 16, SIZE_MAX),
        shared_width=table.count("shared_width", 0, SIZE_MAX, 0),
        vocab=table.count("vocab", 1, 1 << 24),
        tied=table.flag("tied", False),
        published=tuple(_published(row) for row in table.tables("published", PUBLISHED_MAX)),
    )
    table.text("source", "")
    table.done()
    if found.top_k > found.experts:
        raise ConfigError(
            f"{source}: top_k = {found.top_k}, expected at most experts = {found.experts}."
        )
    return found


def _published(table: Table) -> Published:
    found = Published(
        table.text("what"), table.number("tokens_per_s", 0.001, 1e6), table.text("source")
    )
    table.done()
    return found


class _ConfigOnly:
    """A checkpoint of which only the configuration is there: enough for a family to read it."""

    kind = "huggingface"

    def __init__(self, config: "Mapping[str, Any]", source: str) -> None:
        self.config, self.source = config, source

    def names(self) -> frozenset[str]:
        return frozenset()


def from_config(config: "Mapping[str, Any]", source: str) -> Shape:
    """The shape a config.json of Hugging Face describes. Raises BadModelFile, UnsupportedModel."""
    from coeld.model.families import check_family  # numpy
    from coeld.model.families.settings import Settings

    family = check_family("huggingface", config, source)
    settings = Settings(_ConfigOnly(config, source), family.architecture)  # type: ignore[arg-type]
    traits = family.read(settings)
    hidden = settings.count("hidden_size", "")
    heads = settings.count("num_attention_heads", "")
    routed = traits.routing is not None
    return Shape(
        name=source.removeprefix(HUB).split("@")[0].split("/")[-1],
        layers=settings.count("num_hidden_layers", ""),
        hidden=hidden,
        heads=heads,
        kv_heads=settings.count("num_key_value_heads", "", heads),
        head_dim=settings.count("head_dim", "", max(1, hidden // heads)),
        experts=traits.experts if routed else 1,
        top_k=traits.top_k if routed else 1,
        expert_width=traits.width,
        shared_width=traits.shared_width,
        vocab=settings.count("vocab_size", ""),
        tied=settings.flag("tie_word_embeddings", "", default=True),
    )


def find_demand(model: str, store: Store) -> "ModelDemand | Shape":
    """What `--model` names: an installed model, a shipped shape, a file, a folder, or hf:ORG/NAME.

    Raises ConfigError or ModelError. Weights are never read or fetched.
    """
    if model.startswith(HUB):
        from coeld.model.hub import fetch_config

        return from_config(*fetch_config(model))
    if model in store.names():
        return demand_of(store.manifest(model))
    known = shipped()
    by_name = {name.lower(): name for name in known}
    if name := by_name.get(model.lower()):
        return parse_shape(known[name], f"the shipped shape {name}")
    path = Path(model)
    if path.is_dir() or path.name == "config.json":
        from coeld.model.hf_folder import read_config

        folder = path if path.is_dir() else path.parent
        return from_config(read_config(folder, str(folder)), str(folder.resolve()))
    if path.suffix == ".toml":
        try:
            return parse_shape(path.read_text("utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as exc:
            raise ConfigError(f"{path} cannot be read: {exc}.") from exc
    raise ModelError(
        f"{model!r} is no installed model and no known shape ({', '.join(known)}). Name one of "
        "these, a shape.toml, a folder with a config.json, or hf:ORG/NAME."
    )
