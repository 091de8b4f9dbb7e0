"""Checkpoint to store: read, smooth, quantise, write blobs, then the manifest.

Everything streams: experts are read, quantised and written one by one, so that the largest thing
in memory is one layer without its routed experts, or one expert. A dense feed-forward block becomes
equal slices of its neurons, which add up to it exactly. A journal in `partial/`, named after the
content of the source and the precision, records each finished part, so an interrupted import goes
on where it was; everything is deterministic, so it ends with the same model hash.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coeld.compression.quantize import quantize
from coeld.errors import ModelError, UnsupportedModel
from coeld.model import onnx_blobs
from coeld.model.calibration import Calibration, calibration_tokens, neurons
from coeld.model.checkpoint import Checkpoint
from coeld.model.families import blueprint
from coeld.model.families.blueprint import Blueprint, Source
from coeld.model.manifest import (
    FORMAT,
    PAGE,
    BlobRef,
    Form,
    Manifest,
    Shape,
    expert_matrices,
    head_block,
    parse_blob,
    parse_manifest,
    trunk_matrices,
)
from coeld.model.onnx_blobs import FLOAT_BITS, Blob
from coeld.model.statistics import Statistics
from coeld.model.store import Store, check_name, disk_errors

Progress = Callable[[int, int, str], None]
"""(done bytes, total bytes, what): called often, with rising `done`."""

ROWS: Final = 4096
"""Rows of the vocabulary matrices converted at a time."""
FRAMING_BYTES: Final = 8 << 10
"""More than what ONNX adds around the weights of a blob, without the padding to pages."""
EXPERT_BITS: Final = (2, 3, 4, 8, FLOAT_BITS)
TRUNK_BITS: Final = (4, 8, FLOAT_BITS)
BLOCK_OF_3_BITS: Final = 32
"""At least, for the kernel."""

Floats = NDArray[np.float32]
Weights = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Origin:
    """What people want to know about a model besides its weights."""

    source: str
    licence: str


@dataclass(frozen=True, slots=True)
class Precision:
    """Bits per weight: 32 is float32."""

    bits: int | Callable[[int, int], int] = 8
    """Of experts; or of each, by (layer, expert)."""
    trunk_bits: int = 8
    """Of attention and shared experts. Embedding and head have 8 bits at least."""
    statistics: Statistics | None = None
    """From which `bits` follow; kept in the manifest."""

    def table(self, shape: Shape) -> tuple[tuple[int, ...], ...]:
        """Per layer, the bits of each expert. Raises ModelError."""
        found = tuple(
            tuple(
                self.bits if isinstance(self.bits, int) else self.bits(layer, expert)
                for expert in range(shape.experts)
            )
            for layer in range(shape.layers)
        )
        for bits, known, what in (
            *((bits, EXPERT_BITS, "experts") for row in found for bits in row),
            (self.trunk_bits, TRUNK_BITS, "the trunk"),
        ):
            if bits not in known:
                raise ModelError(
                    f"{bits} bits for {what}: use one of {', '.join(map(str, known))}."
                )
        return found


def widths(block: int) -> tuple[int, ...]:
    """The bits that experts may have whose weights lie in blocks of that many."""
    return tuple(bits for bits in EXPERT_BITS if bits != 3 or block >= BLOCK_OF_3_BITS)


def import_checkpoint(
    store: Store,
    checkpoint: Checkpoint,
    name: str,
    progress: Progress,
    *,
    origin: Origin | None = None,
    precision: Precision | None = None,
    update: bool = False,
) -> Manifest:
    """Install a checkpoint under `name`. Without `origin`, the source speaks for itself. With
    `update`, as the next version of the model of that name, if there is one.

    Raises ModelError (name taken or impossible, store busy), BadModelFile, UnsupportedModel,
    DiskFull. Whatever stops it, no manifest is left, and the next call goes on.
    """
    require_new(store, name, update)
    with store.lock():
        before = require_new(store, name, update)
        origin = origin or Origin(checkpoint.source, checkpoint.licence)
        precision = precision or Precision()
        return _Import(store, checkpoint, name, origin, precision, progress, before).run()


def require_new(store: Store, name: str, update: bool = False) -> Manifest | None:
    """The model of that name, which an `update` is to replace. Raises ModelError when there is one
    and it is no update."""
    if check_name(name) not in store.names():
        return None
    if update:
        return store.manifest(name)
    raise ModelError(
        f"a model {name!r} is installed already. Choose another --name; or make this its next "
        f"version, with --update; or remove it first: coeld model rm {name}"
    )


class _Import:
    """One run of an import; the store is locked."""

    def __init__(
        self,
        store: Store,
        checkpoint: Checkpoint,
        name: str,
        origin: Origin,
        precision: Precision,
        progress: Progress,
        before: Manifest | None,
    ) -> None:
        self._store, self._checkpoint, self._name = store, checkpoint, name
        self._before = before
        self._origin, self._progress = origin, progress
        self._blueprint: Blueprint = blueprint(checkpoint)
        self._shape = self._blueprint.shape
        self._vocabulary = checkpoint.vocabulary(self._shape.vocab)
        self._bits, self._trunk_bits = precision.table(self._shape), precision.trunk_bits
        if 3 in {bits for row in self._bits for bits in row} - set(widths(self._blueprint.block)):
            raise UnsupportedModel(
                f"experts of 3 bits need blocks of {BLOCK_OF_3_BITS} weights at least, and the "
                f"widths of this model are multiples of {self._blueprint.block} only: add it with "
                "--bits 8, 4 or 2."
            )
        self._statistics = precision.statistics
        self._calibration = self._calibrate()
        self._done = 0
        self._total = sum(sum(map(_count, self._sources(part))) for part in self._parts())

    def _calibrate(self) -> Calibration | None:
        """None where nothing is rounded, or no text can be fed: nothing is smoothed then."""
        exact = {FLOAT_BITS} == {self._trunk_bits, *(bits for row in self._bits for bits in row)}
        if exact or self._vocabulary is None:
            return None
        return Calibration(self._blueprint, calibration_tokens(self._vocabulary.json))

    def run(self) -> Manifest:
        self._progress(0, self._checkpoint.bytes, "checking the source")
        path = self._store.partial / f"{self._key()}.journal"
        journal = read_journal(path, self._store)
        self._store.require_free(self._wanted_bytes(journal))
        with path.open("ab", buffering=0) as log:
            refs = {part: self._finish(part, journal, log) for part in self._parts()}
        manifest = self._manifest(refs)
        if self._before and replace(manifest, version=self._before.version) == self._before:
            path.unlink()
            raise ModelError(
                f"this is what version {self._before.version} of {self._name} consists of: there "
                "is nothing to update."
            )
        parse_manifest(manifest.to_json())  # what could not be opened must not be installed
        self._store.save(manifest)
        path.unlink()
        self._progress(self._checkpoint.bytes, self._checkpoint.bytes, "done")
        return manifest

    def _key(self) -> str:
        """Of everything that the blobs depend on."""
        parts = (FORMAT, self._checkpoint.fingerprint(), self._bits, self._trunk_bits)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _parts(self) -> Iterator[str]:
        yield "head"
        if not self._blueprint.tied:
            yield "embedding"
        for index in range(self._shape.layers):
            yield f"layer {index}"

    def _finish(self, part: str, journal: dict[str, list[BlobRef]], log: FileIO) -> list[BlobRef]:
        """The blobs of a part, made now unless the journal has them."""
        self._advance(part)
        refs = journal.get(part)
        if refs is None:
            refs = [self._put(blob) for blob in self._build(part)]
            with disk_errors(self._store.partial):
                line = json.dumps({"part": part, "refs": [asdict(ref) for ref in refs]}) + "\n"
                log.write(line.encode())
        elif part.startswith("layer ") and self._calibration is not None:
            for _ in self._weights(part):  # for the hidden states that the next layer needs
                pass
        else:
            self._advance(part, *self._sources(part))
        return refs

    def _advance(self, part: str, *finished: Source) -> None:
        self._done += sum(map(_count, finished))
        total = self._checkpoint.bytes
        self._progress(total * self._done // self._total, total, part)

    def _put(self, blob: Blob) -> BlobRef:
        size = sum(map(len, blob.pieces))
        return BlobRef(self._store.put(*blob.pieces), size, blob.tensors)

    def _build(self, part: str) -> Iterator[Blob]:
        plan = self._blueprint
        if part == "head":
            weights = self._vocabulary_matrix(plan.head, "head", part)
            weights["norm"] = plan.norm.read(self._checkpoint)
            self._advance(part, plan.norm)
            yield onnx_blobs.linear_blob("head", weights, self._head_form())
        elif part == "embedding":
            weights = self._vocabulary_matrix(plan.embedding, "embedding", part)
            yield onnx_blobs.linear_blob("embedding", weights, self._head_form())
        else:
            yield from self._build_layer(part)

    def _build_layer(self, part: str) -> Iterator[Blob]:
        shape, block = self._shape, self._blueprint.block
        several = self._weights(part)
        form = Form(self._trunk_bits, block)
        yield onnx_blobs.linear_blob("trunk", trunk_weights(next(several), shape, form), form)
        slices = shape.experts if shape.routing is None else 1
        widths = iter(self._bits[_layer(part)])
        for expert in several:
            for own in range(slices):
                form = Form(next(widths), block)
                weights = expert_weights(neurons(expert, own, slices), form, *self._carried(own))
                yield onnx_blobs.expert_blob(weights, shape)

    def _carried(self, own: int) -> tuple[Floats | None, Floats | None]:
        """Mean squares of what fc1 and fc2 of the last expert read, or of its slice `own`."""
        if self._calibration is None:
            return None, None
        width = self._shape.expert_width
        into_down = self._calibration.into_down[own * width : (own + 1) * width]
        return self._calibration.into_gate, into_down

    def _weights(self, part: str) -> Iterator[dict[str, Floats]]:
        """A layer's trunk, then its experts (or dense block), smoothed, as float32."""
        plan, calibration, layer = self._blueprint, self._calibration, _layer(part)
        trunk = plan.trunk(layer)
        yield trunk if calibration is None else calibration.trunk(trunk)
        del trunk
        self._advance(part, *(s for several in plan.layers[layer].trunk.values() for s in several))
        for index, sources in enumerate(plan.layers[layer].experts):
            expert = plan.expert(layer, index)
            if calibration is not None:
                expert = calibration.expert(index, expert, spend=True)
            yield expert
            self._advance(part, *sources.values())

    def _head_form(self) -> Form:
        return Form(
            FLOAT_BITS if self._trunk_bits == FLOAT_BITS else 8, head_block(self._shape.hidden)
        )

    def _vocabulary_matrix(self, source: Source, name: str, part: str) -> Weights:
        """Some rows at a time: as float32 it would be the largest thing in memory."""
        vocab, hidden = source.shape
        if self._head_form().bits == FLOAT_BITS:
            return {f"{name}.w": source.read(self._checkpoint)}
        block = self._head_form().block
        w = np.empty((vocab, hidden // block, block), np.uint8)
        s = np.empty((vocab, hidden // block), np.float32)
        for start in range(0, vocab, ROWS):
            stop = min(start + ROWS, vocab)
            rows = self._checkpoint.read(source.name, start, stop)
            found, s[start:stop] = quantize(rows, 8, block)
            w[start:stop] = found.reshape(stop - start, -1, block)
            self._advance(part, Source(source.name, rows.shape))
        return {f"{name}.w": w, f"{name}.s": s}

    def _sources(self, part: str) -> Iterator[Source]:
        """What a part is made of, for the progress bar."""
        plan = self._blueprint
        if part == "head":
            yield from (plan.head, plan.norm)
        elif part == "embedding":
            yield plan.embedding
        else:
            layer = plan.layers[_layer(part)]
            for sources in layer.trunk.values():
                yield from sources
            for expert in layer.experts:
                yield from expert.values()

    def _wanted_bytes(self, journal: dict[str, list[BlobRef]]) -> int:
        """Bytes still to be written, at most."""
        shape, block = self._shape, self._blueprint.block
        head = _stored_bytes(shape.vocab, shape.hidden, self._head_form())
        total = head if self._blueprint.tied else 2 * head
        trunk = Form(self._trunk_bits, block)
        # Norms, biases and routers are float32: more than there are.
        rest = 4 * shape.hidden * (8 + shape.experts)
        for row in self._bits:
            total += rest
            for _, n, k in trunk_matrices(shape):
                total += _stored_bytes(n, k, trunk) + 4 * n
            for bits in row:
                for _, n, k in expert_matrices(shape):
                    total += _stored_bytes(n, k, Form(bits, block)) + 4 * n
        total += (4 + shape.layers * (1 + shape.experts)) * FRAMING_BYTES
        if self._vocabulary is not None:
            total += len(self._vocabulary.json)
        return max(0, total - sum(ref.bytes for refs in journal.values() for ref in refs))

    def _manifest(self, refs: dict[str, list[BlobRef]]) -> Manifest:
        vocabulary = self._vocabulary
        layers = [refs[f"layer {index}"] for index in range(self._shape.layers)]
        (head,) = refs["head"]
        (embedding,) = refs.get("embedding", [head])
        template = vocabulary.chat_template if vocabulary else None
        return Manifest(
            name=self._name,
            source=self._origin.source,
            licence=self._origin.licence,
            shape=self._shape,
            tied=self._blueprint.tied,
            embedding=embedding,
            head=head,
            trunk=tuple(layer[0] for layer in layers),
            experts=tuple(tuple(layer[1:]) for layer in layers),
            tokenizer=self._put(Blob([vocabulary.json], {})) if vocabulary else None,
            chat_template=self._put(Blob([template.encode()], {})) if template else None,
            bos_token=vocabulary.bos_token if vocabulary else None,
            eos_tokens=vocabulary.eos_tokens if vocabulary else (),
            add_bos=vocabulary.add_bos if vocabulary else False,
            statistics=self._statistics,
            version=self._before.version + 1 if self._before else 1,
        )


def _layer(part: str) -> int:
    return int(part.removeprefix("layer "))


def trunk_weights(layer: dict[str, Floats], shape: Shape, form: Form) -> Weights:
    """A layer without its routed experts, quantised, under the names of the manifest."""
    matrices = {name for name, _, _ in trunk_matrices(shape)}
    weights: Weights = {}
    for name, value in layer.items():
        if name in matrices:
            weights |= onnx_blobs.matrix(value, name, form.bits, form.block)
        else:
            weights[name] = value
    return weights


def expert_weights(
    expert: dict[str, Floats],
    form: Form,
    into_gate: Floats | None = None,
    into_down: Floats | None = None,
) -> Weights:
    """An expert, quantised, under the names of the manifest: rows of gate and up alternate.

    `into_gate` (H,) and `into_down` (I,) are the mean squares of what the matrices read.
    """

    def woven(gate: Floats, up: Floats) -> Floats:
        return np.stack([gate, up], 1).reshape(2 * len(gate), *gate.shape[1:])

    fc1 = woven(expert["gate"], expert["up"])
    weights: Weights = dict(onnx_blobs.expert_matrix(fc1, "fc1", form.bits, form.block, into_gate))
    if "gate.b" in expert:
        weights["fc1.b"] = woven(expert["gate.b"], expert["up.b"])[None]
    down = np.ascontiguousarray(expert["down"])
    weights |= onnx_blobs.expert_matrix(down, "fc2", form.bits, form.block, into_down)
    if "down.b" in expert:
        weights["fc2.b"] = expert["down.b"][None]
    return weights


def _count(source: Source) -> int:
    """Numbers that are read for it."""
    return prod(source.shape if source.index is None else source.shape[1:])


def _stored_bytes(n: int, k: int, form: Form) -> int:
    """Of a matrix (n, k), with the padding to pages."""
    exact = form.bits == FLOAT_BITS
    parts = (4 * n * k,) if exact else (n * k * form.bits // 8, 4 * n * k // form.block)
    return sum(part + PAGE if part >= PAGE else part for part in parts)


def read_journal(path: Path, store: Store) -> dict[str, list[BlobRef]]:
    """Finished parts whose blobs are still here. A line that a crash cut short is ignored."""
    parts = {}
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    for line in lines:
        try:
            value = json.loads(line)
            refs = [parse_blob(ref) for ref in value["refs"]]
            parts[str(value["part"])] = refs
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            continue
    return {part: refs for part, refs in parts.items() if all(map(store.has, refs))}
