"""Footprint: how many bytes each part of a model has, and how many of them a token reads. Pure.

Decode is a race against memory: every token reads the whole trunk, one row of the embedding and
the experts its router chose. So bytes per token, times tokens per second, against what the memory
can deliver, says how good an engine is, whatever the machine.
"""

from collections import Counter
from dataclasses import dataclass

from coeld.model.manifest import BlobRef, Manifest, expert_matrices, matrix_form, tensor_bytes


@dataclass(frozen=True, slots=True)
class Part:
    """One kind of blob."""

    name: str
    blobs: int
    bytes: int
    read_bytes: int
    """Per token of decode, on average; of routed experts as if all were chosen equally often."""


def footprint(manifest: Manifest) -> list[Part]:
    """The parts of a model: embedding, head, trunk layers, and the experts of each width."""
    shape = manifest.shape
    head = tensor_bytes(manifest.head)
    embedding = [] if manifest.tied else [manifest.embedding]
    parts = [
        Part("embedding", 1, tensor_bytes(ref), tensor_bytes(ref) // shape.vocab)
        for ref in embedding
    ]
    name = "head and embedding" if manifest.tied else "head"
    parts.append(Part(name, 1, head, head))
    trunk = sum(map(tensor_bytes, manifest.trunk))
    parts.append(Part("trunk layers", shape.layers, trunk, trunk))
    counts: Counter[int] = Counter()
    sizes: Counter[int] = Counter()
    for ref in (ref for layer in manifest.experts for ref in layer):
        bits = _bits(manifest, ref)
        counts[bits] += 1
        sizes[bits] += tensor_bytes(ref)
    for bits in sorted(counts):
        read = sizes[bits] * shape.top_k // shape.experts
        parts.append(Part(f"experts, {bits} bits", counts[bits], sizes[bits], read))
    return parts


def token_bytes(manifest: Manifest, cached_tokens: int) -> int:
    """Bytes that one token of decode reads, with so many tokens in its float32 KV cache."""
    shape = manifest.shape
    cache = 2 * shape.layers * shape.kv_heads * shape.head_dim * 4 * cached_tokens
    return cache + sum(part.read_bytes for part in footprint(manifest))


def _bits(manifest: Manifest, ref: BlobRef) -> int:
    return matrix_form(ref, *expert_matrices(manifest.shape)[0]).bits
