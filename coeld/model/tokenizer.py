"""Builds a `tokenizers` file from the byte-pair vocabulary inside a GGUF file.

The JSON is written here rather than by the library's own serialiser, so that the same GGUF gives
the same bytes, hence the same model hash, whatever version of the library a device has.

Pre-tokenizers as in llama.cpp, src/llama-vocab.cpp (LLAMA_VOCAB_PRE_TYPE_*).
"""

import json
from typing import Any, Final

from tokenizers import Tokenizer

from coeld.errors import BadModelFile, UnsupportedModel
from coeld.model.checkpoint import Vocabulary, expect
from coeld.model.gguf_file import GgufFile

CONTROL: Final = 3
USER_DEFINED: Final = 4
"""Token types of GGUF."""

LLAMA3_SPLIT: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END_OF_TURN: Final = {
    "<|endoftext|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|end|>",
    "</s>",
}
"""Control tokens that end an answer even where the file names only one (as in llama.cpp)."""


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


PRE_TOKENIZERS: Final[dict[str, list[dict[str, Any]]]] = {
    "gpt-2": [_byte_level(use_regex=True)],
    "smollm": [{"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)],
    "llama-bpe": [
        {
            "type": "Split",
            "pattern": {"Regex": LLAMA3_SPLIT},
            "behavior": "Isolated",
            "invert": False,
        },
        _byte_level(use_regex=False),
    ],
}


def read_vocabulary(file: GgufFile, vocab: int) -> Vocabulary | None:
    """`vocab` is the number of rows of the embedding. None when the file has no tokenizer.

    Raises BadModelFile or UnsupportedModel.
    """
    kind = expect(file, "tokenizer.ggml.model", str, bool, "no_vocab")
    if kind == "no_vocab":
        return None
    pre = expect(file, "tokenizer.ggml.pre", str, bool, "default")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        raise UnsupportedModel(
            f"{file.source} has the tokenizer {kind!r} with pre-tokenizer {pre!r}. coeld knows "
            f"'gpt2' with {', '.join(PRE_TOKENIZERS)}."
        )
    tokens = _texts(file, "tokenizer.ggml.tokens")
    if len(tokens) != vocab or len(set(tokens)) != vocab:
        raise BadModelFile(
            f"{file.source} has {len(tokens)} tokens ({len(set(tokens))} different ones) for "
            f"{vocab} rows of the embedding. The file is damaged; get it again."
        )
    types = expect(
        file, "tokenizer.ggml.token_type", list, lambda value: len(value) == vocab, [1] * vocab
    )
    control = {index for index in range(vocab) if types[index] == CONTROL}
    return Vocabulary(
        json=_tokenizer_json(file, pre, tokens, types),
        bos_token=_token(file, "bos", vocab),
        eos_tokens=_eos_tokens(file, tokens, control),
        add_bos=expect(
            file, "tokenizer.ggml.add_bos_token", bool, lambda _: True, pre == "llama-bpe"
        ),
        chat_template=expect(file, "tokenizer.chat_template", str, lambda _: True, "") or None,
    )


def _texts(file: GgufFile, key: str) -> list[str]:
    return expect(file, key, list, lambda value: all(isinstance(item, str) for item in value))


def _token(file: GgufFile, name: str, vocab: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    if key not in file.config:
        return None
    return expect(file, key, int, lambda value: 0 <= value < vocab)


def _eos_tokens(file: GgufFile, tokens: list[str], control: set[int]) -> tuple[int, ...]:
    named = {_token(file, name, len(tokens)) for name in ("eos", "eot", "eom")} - {None}
    usual = {index for index in control if tokens[index] in END_OF_TURN}
    return tuple(sorted(index for index in named | usual if index is not None))


def _tokenizer_json(file: GgufFile, pre: str, tokens: list[str], types: list[int]) -> bytes:
    merges = [tuple(merge.split(" ")) for merge in _texts(file, "tokenizer.ggml.merges")]
    steps = PRE_TOKENIZERS[pre]
    value = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": index,
                "content": tokens[index],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": types[index] == CONTROL,
            }
            for index in range(len(tokens))
            if types[index] in (CONTROL, USER_DEFINED)
        ],
        "normalizer": None,
        "pre_tokenizer": steps[0]
        if len(steps) == 1
        else {"type": "Sequence", "pretokenizers": steps},
        "post_processor": None,
        "decoder": _byte_level(use_regex=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre == "llama-bpe",
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": merges,
        },
    }
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    try:
        Tokenizer.from_str(text)
    except Exception as exc:  # the library raises nothing narrower
        raise BadModelFile(
            f"the vocabulary of {file.source} makes no tokenizer ({exc}). The file is damaged; get "
            "it again."
        ) from exc
    return text.encode()
