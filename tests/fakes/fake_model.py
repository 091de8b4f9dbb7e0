"""A model of a few kilobytes in a real store: right in shape, zero in every weight."""

from pathlib import Path

from coeld.model.manifest import BlobRef, Manifest, Rope, Shape, TensorRef
from coeld.model.store import Store

LAYERS, EXPERTS, HIDDEN, WIDTH, VOCAB, BLOCK = 4, 6, 64, 32, 96, 32


def install(root: Path, name: str = "tiny", salt: int = 0) -> Manifest:
    """Put the model into the store at `root`."""
    store = Store(root)

    def blob(
        *weights: tuple[str, int, int], norms: tuple[str, ...] = (), expert: bool = False
    ) -> BlobRef:
        tensors = {norm: TensorRef("float32", (HIDDEN,), 0) for norm in norms}
        offset = 4 * HIDDEN
        for weight, n, k in weights:
            scales = (n, k // BLOCK)
            for suffix, dtype, shape in (
                ("w", "uint8", (1, n, k) if expert else (*scales, BLOCK)),
                ("s", "float32", (1, *scales) if expert else scales),
            ):
                tensor = TensorRef(dtype, shape, offset)
                tensors[f"{weight}.{suffix}"] = tensor
                offset += -(-tensor.bytes // 64) * 64
        return BlobRef(store.put(bytes([salt]) * offset), offset, tensors)

    with store.lock():
        head = blob(("head", VOCAB, HIDDEN), norms=("norm",))
        text = BlobRef(store.put(b"{}"), 2, {})
        expert = blob(("fc1", 2 * WIDTH, HIDDEN), ("fc2", HIDDEN, WIDTH), expert=True)
        norms = ("attention_norm", "ffn_norm")
        trunk = blob(("qkv", 128, HIDDEN), ("o", HIDDEN, 64), norms=norms)
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
                norm_epsilon=1e-5,
                rope=Rope(tuple(10000.0 ** (-i / 16) for i in range(16))),
                attention_scale=32**-0.5,
            ),
            tied=True,
            embedding=head,
            head=head,
            trunk=(trunk,) * LAYERS,
            experts=((expert,) * EXPERTS,) * LAYERS,
            tokenizer=text,
            chat_template=None,
            bos_token=None,
            eos_tokens=(0,),
            add_bos=False,
        )
        store.save(manifest)
    return manifest
