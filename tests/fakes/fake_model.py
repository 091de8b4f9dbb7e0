"""A model of a few kilobytes in a real store: right in shape, zero in every weight."""

from pathlib import Path

from coeld.model.manifest import BlobRef, Manifest, Shape, TensorRef
from coeld.model.store import Store

LAYERS, EXPERTS, HIDDEN, WIDTH, VOCAB, BLOCK = 4, 6, 64, 32, 96, 32


def install(root: Path, name: str = "tiny", salt: int = 0) -> Manifest:
    """Put the model into the store at `root`."""
    store = Store(root)

    def blob(*weights: tuple[str, int, int], norms: tuple[str, ...] = ()) -> BlobRef:
        tensors = {norm: TensorRef("float32", (HIDDEN,), 0) for norm in norms}
        offset = 4 * HIDDEN
        for weight, n, k in weights:
            for suffix, dtype, shape in (
                ("w", "uint8", (n, k // BLOCK, BLOCK)),
                ("s", "float32", (n, k // BLOCK)),
            ):
                tensor = TensorRef(dtype, shape, offset)
                tensors[f"{weight}.{suffix}"] = tensor
                offset += -(-tensor.bytes // 64) * 64
        return BlobRef(store.put(bytes([salt]) * offset), offset, tensors)

    with store.lock():
        head = blob(("head", VOCAB, HIDDEN), norms=("norm",))
        text = BlobRef(store.put(b"{}"), 2, {})
        expert = blob(("gate", WIDTH, HIDDEN), ("up", WIDTH, HIDDEN), ("down", HIDDEN, WIDTH))
        norms = ("attention_norm", "ffn_norm")
        attention = blob(("qkv", 128, HIDDEN), ("o", HIDDEN, 64), norms=norms)
        manifest = Manifest(
            name=name,
            source="made by a test",
            licence="Apache-2.0",
            shape=Shape(
                family="llama",
                layers=LAYERS,
                hidden=HIDDEN,
                heads=2,
                kv_heads=1,
                head_dim=32,
                experts=EXPERTS,
                top_k=EXPERTS,
                expert_width=WIDTH,
                vocab=VOCAB,
                context_max=512,
                rope_base=10000.0,
                norm_epsilon=1e-5,
                block=BLOCK,
            ),
            tied=True,
            embedding=head,
            head=head,
            attention=(attention,) * LAYERS,
            experts=((expert,) * EXPERTS,) * LAYERS,
            tokenizer=text,
            chat_template=None,
            bos_token=None,
            eos_tokens=(0,),
            add_bos=False,
        )
        store.save(manifest)
    return manifest
