"""Writes tiny llama models as GGUF, with everything a real one has: for tests that need a file.

The vocabulary is the 256 bytes, a few merged pairs and three control tokens; weights are random
but seeded, so the same arguments give the same file.
"""

from pathlib import Path

import gguf
import numpy as np

Type = gguf.GGMLQuantizationType

CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ t", "h e", "Ġt he", "i n", "e r", "a n", "Ġ a", "l l", "o n", "r e"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokens() -> list[str]:
    """The 256 characters that stand for bytes in a byte-level BPE vocabulary (GPT-2)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    table = {byte: chr(byte) for byte in shown}
    table |= {byte: chr(256 + index) for index, byte in enumerate(hidden)}
    return [table[byte] for byte in range(256)]


def vocabulary() -> list[str]:
    return CONTROL_TOKENS + byte_tokens() + [merge.replace(" ", "") for merge in MERGES]


def write_tiny_llama(
    path: Path,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    width: int = 512,
    seed: int = 0,
    kind: Type = Type.Q8_0,
    tied: bool = True,
    architecture: str = "llama",
    pre: str = "smollm",
    context: int = 256,
    extra_tensors: dict[str, np.ndarray] | None = None,
    extra_keys: dict[str, object] | None = None,
) -> Path:
    """Writes the file and returns its path. `kind` is the type of all matrices."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(layers)
    writer.add_context_length(context)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(width)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_license("apache-2.0")
    _add_vocabulary(writer, pre)
    for key, value in (extra_keys or {}).items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    _add_tensors(writer, layers, hidden, hidden // heads * kv_heads, width, seed, kind, tied)
    for name, value in (extra_tensors or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_vocabulary(writer: gguf.GGUFWriter, pre: str) -> None:
    tokens = vocabulary()
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(CONTROL_TOKENS) + [1] * (len(tokens) - len(CONTROL_TOKENS)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _add_tensors(
    writer: gguf.GGUFWriter,
    layers: int,
    hidden: int,
    kv: int,
    width: int,
    seed: int,
    kind: Type,
    tied: bool,
) -> None:
    rng = np.random.default_rng(seed)

    def matrix(name: str, rows: int, columns: int) -> None:
        values = rng.standard_normal((rows, columns), dtype=np.float32) * columns**-0.5
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    def norm(name: str) -> None:
        writer.add_tensor(name, rng.uniform(0.5, 1.5, hidden).astype(np.float32))

    vocab = len(vocabulary())
    matrix("token_embd.weight", vocab, hidden)
    norm("output_norm.weight")
    if not tied:
        matrix("output.weight", vocab, hidden)
    for layer in range(layers):
        norm(f"blk.{layer}.attn_norm.weight")
        matrix(f"blk.{layer}.attn_q.weight", hidden, hidden)
        matrix(f"blk.{layer}.attn_k.weight", kv, hidden)
        matrix(f"blk.{layer}.attn_v.weight", kv, hidden)
        matrix(f"blk.{layer}.attn_output.weight", hidden, hidden)
        norm(f"blk.{layer}.ffn_norm.weight")
        matrix(f"blk.{layer}.ffn_gate.weight", width, hidden)
        matrix(f"blk.{layer}.ffn_up.weight", width, hidden)
        matrix(f"blk.{layer}.ffn_down.weight", hidden, width)
