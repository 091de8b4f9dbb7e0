"""GGUF file to store: dequantise, smooth, slice, quantise to int8, write blobs, then the manifest.

One layer is in memory at a time. The dense feed-forward block of a layer becomes equal slices of
its neurons, which add up to it exactly. A journal in `partial/`, named after the content of the
source, records each finished part, so an interrupted import goes on where it was; everything is
deterministic, so it ends with the same model hash.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coeld.compression.quantize import quantize
from coeld.errors import ModelError, UnsupportedModel
from coeld.model import onnx_blobs
from coeld.model.calibration import Calibration, calibration_tokens
from coeld.model.families import llama
from coeld.model.gguf_file import GgufFile, expect
from coeld.model.manifest import FORMAT, HEAD_BLOCK, BlobRef, Manifest, Shape, parse_blob
from coeld.model.store import Store, check_name, disk_errors, file_sha256
from coeld.model.tokenizer import Vocabulary, read_vocabulary

Progress = Callable[[int, int, str], None]
"""(done bytes, total bytes, what): called often, with rising `done`."""

ROWS: Final = 4096
"""Rows of the vocabulary matrices converted at a time."""
FRAMING_BYTES: Final = 8 << 10
"""More than what ONNX adds around the weights of a blob."""

Weights = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Origin:
    """What people want to know about a model besides its weights."""

    source: str
    licence: str


def import_gguf(
    store: Store, path: Path, name: str, origin: Origin | None, progress: Progress
) -> Manifest:
    """Install a GGUF file under `name`. Without `origin`, the file speaks for itself.

    Raises ModelError (name taken or impossible, store busy), BadModelFile, UnsupportedModel,
    DiskFull. Whatever stops it, no manifest is left, and the next call goes on.
    """
    require_new(store, name)
    try:
        file = GgufFile(path)
    except OSError as exc:
        raise ModelError(f"cannot open {path}: {exc.strerror}.") from exc
    with file, store.lock():
        require_new(store, name)
        return _Import(store, file, name, origin, progress).run()


def require_new(store: Store, name: str) -> None:
    """Raises ModelError when a model of that name is installed."""
    if check_name(name) in store.names():
        raise ModelError(
            f"a model {name!r} is installed already. Choose another --name, or remove it first: "
            f"coeld model rm {name}"
        )


class _Import:
    """One run of an import; the store is locked."""

    def __init__(
        self, store: Store, file: GgufFile, name: str, origin: Origin | None, progress: Progress
    ) -> None:
        self._store, self._file, self._name, self._progress = store, file, name, progress
        self._origin = origin or _origin(file)
        family = expect(file, "general.architecture", str, bool)
        if family != llama.ARCHITECTURE:
            raise UnsupportedModel(
                f"{file.path} has the architecture {family!r}. coeld runs "
                f"{llama.ARCHITECTURE!r} models."
            )
        self._shape = llama.read_shape(file)
        self._vocabulary = read_vocabulary(file, self._shape.vocab)
        self._tied = llama.HEAD not in file.tensors
        self._done_bytes = 0
        tokens = calibration_tokens(self._vocabulary.json)
        embedded = [file.rows(llama.EMBEDDING, token, token + 1) for token in tokens]
        self._calibration = Calibration(self._shape, np.concatenate(embedded))

    def run(self) -> Manifest:
        self._progress(0, self._file.bytes, "checking the file")
        digest = file_sha256(self._file.path)
        path = self._store.partial / f"{digest}.{FORMAT}.journal"
        journal = read_journal(path, self._store)
        self._store.require_free(self._wanted_bytes(journal))
        with path.open("ab", buffering=0) as log:
            refs = {part: self._finish(part, journal, log) for part in self._parts()}
        manifest = self._manifest(refs)
        self._store.save(manifest)
        path.unlink()
        self._progress(self._file.bytes, self._file.bytes, "done")
        return manifest

    def _parts(self) -> Iterator[str]:
        yield "head"
        if not self._tied:
            yield "embedding"
        for index in range(self._shape.layers):
            yield f"layer {index}"

    def _finish(self, part: str, journal: dict[str, list[BlobRef]], log: FileIO) -> list[BlobRef]:
        """The blobs of a part, made now unless the journal has them."""
        self._progress(self._done_bytes, self._file.bytes, part)
        layer = self._layer(part)
        refs = journal.get(part)
        if refs is None:
            refs = [self._put(*blob) for blob in self._build(part, layer)]
            with disk_errors(self._store.partial):
                line = json.dumps({"part": part, "refs": [asdict(ref) for ref in refs]}) + "\n"
                log.write(line.encode())
        self._done_bytes += self._source_bytes(part)
        self._progress(self._done_bytes, self._file.bytes, part)
        return refs

    def _put(self, data: bytes, tensors: dict[str, Any]) -> BlobRef:
        return BlobRef(self._store.put(data), len(data), tensors)

    def _layer(self, part: str) -> llama.Layer | None:
        """The smoothed layer if the part is one; read even when it is finished, for the next."""
        if not part.startswith("layer "):
            return None
        index = int(part.removeprefix("layer "))
        return self._calibration.smooth(llama.read_layer(self._file, self._shape, index))

    def _build(
        self, part: str, layer: llama.Layer | None
    ) -> Iterator[tuple[bytes, dict[str, Any]]]:
        shape = self._shape
        if part == "head":
            name = llama.EMBEDDING if self._tied else llama.HEAD
            weights = self._vocabulary_matrix(name, "head") | {"norm": self._file.rows(llama.NORM)}
            yield onnx_blobs.head_blob(weights, shape)
        elif part == "embedding":
            weights = self._vocabulary_matrix(llama.EMBEDDING, "embedding")
            yield onnx_blobs.embedding_blob(weights, shape)
        elif layer is not None:
            yield onnx_blobs.attention_blob(attention_weights(layer, shape), shape)
            for expert in range(shape.experts):
                yield onnx_blobs.expert_blob(expert_weights(layer, shape, expert), shape)

    def _vocabulary_matrix(self, tensor: str, name: str) -> Weights:
        """Some rows at a time: as float32 it would be the largest thing in memory."""
        shape = self._shape
        blocks = shape.hidden // HEAD_BLOCK
        w = np.empty((shape.vocab, blocks, HEAD_BLOCK), np.uint8)
        s = np.empty((shape.vocab, blocks), np.float32)
        for start in range(0, shape.vocab, ROWS):
            rows = slice(start, start + ROWS)
            w[rows], s[rows] = quantize(self._file.rows(tensor, start, start + ROWS), HEAD_BLOCK)
        return {f"{name}.w": w, f"{name}.s": s}

    def _source_bytes(self, part: str) -> int:
        """Bytes of the file that a part is made of, for the progress bar."""
        if part == "head":
            prefixes = ("output", "token_embd") if self._tied else ("output",)
        else:
            own = "token_embd" if part == "embedding" else part.replace("layer ", "blk.") + "."
            prefixes = (own,)
        return sum(t.bytes for name, t in self._file.tensors.items() if name.startswith(prefixes))

    def _wanted_bytes(self, journal: dict[str, list[BlobRef]]) -> int:
        """Bytes still to be written, at most."""
        shape = self._shape
        weights = sum(
            rows * columns[0] * (1 + 4 / HEAD_BLOCK) if columns else rows * 4
            for rows, *columns in llama.tensor_shapes(shape).values()
        )
        if not self._tied:
            weights += shape.vocab * shape.hidden * (1 + 4 / HEAD_BLOCK)
        blobs = 4 + shape.layers * (1 + shape.experts)
        finished = sum(ref.bytes for refs in journal.values() for ref in refs)
        total = int(weights) + blobs * FRAMING_BYTES + len(self._vocabulary.json)
        return max(0, total - finished)

    def _manifest(self, refs: dict[str, list[BlobRef]]) -> Manifest:
        vocabulary: Vocabulary = self._vocabulary
        layers = [refs[f"layer {index}"] for index in range(self._shape.layers)]
        (head,) = refs["head"]
        (embedding,) = refs.get("embedding", [head])
        template = vocabulary.chat_template
        return Manifest(
            name=self._name,
            source=self._origin.source,
            licence=self._origin.licence,
            shape=self._shape,
            tied=self._tied,
            embedding=embedding,
            head=head,
            attention=tuple(layer[0] for layer in layers),
            experts=tuple(tuple(layer[1:]) for layer in layers),
            tokenizer=self._put(vocabulary.json, {}),
            chat_template=self._put(template.encode(), {}) if template else None,
            bos_token=vocabulary.bos_token,
            eos_tokens=vocabulary.eos_tokens,
            add_bos=vocabulary.add_bos,
        )


def _origin(file: GgufFile) -> Origin:
    licence = expect(file, "general.license", str, lambda _: True, "unknown")
    return Origin(source=file.path.name, licence=licence)


def attention_weights(layer: llama.Layer, shape: Shape) -> Weights:
    """The attention part of a layer, quantised, under the names of the manifest."""
    norms = {"attention_norm": layer.attention_norm, "ffn_norm": layer.ffn_norm}
    return norms | _matrix("qkv", layer.qkv, shape) | _matrix("o", layer.o, shape)


def expert_weights(layer: llama.Layer, shape: Shape, expert: int) -> Weights:
    """One slice of the feed-forward block: its neurons' rows of gate and up, columns of down."""
    neurons = slice(expert * shape.expert_width, (expert + 1) * shape.expert_width)
    return (
        _matrix("gate", layer.gate[neurons], shape)
        | _matrix("up", layer.up[neurons], shape)
        | _matrix("down", layer.down[:, neurons], shape)
    )


def _matrix(name: str, weight: NDArray[np.float32], shape: Shape) -> Weights:
    w, s = quantize(np.ascontiguousarray(weight), shape.block)
    return {f"{name}.w": w, f"{name}.s": s}


def read_journal(path: Path, store: Store) -> dict[str, list[BlobRef]]:
    """Finished parts whose blobs are still here. A line that a crash cut short is ignored."""
    parts = {}
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    for line in lines:
        try:
            value = json.loads(line)
            refs = [parse_blob(ref) for ref in value["refs"]]
            parts[str(value["part"])] = refs
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return {part: refs for part, refs in parts.items() if all(map(store.has, refs))}
