"""Builds a `tokenizers` file from the vocabulary inside a GGUF file: byte pairs, or sentencepiece.

The JSON is written here rather than by the library's own serialiser, so that the same GGUF gives
the same bytes, hence the same model hash, whatever version of the library a device has.

Pre-tokenizers as in llama.cpp, src/llama-vocab.cpp (LLAMA_VOCAB_PRE_TYPE_*).
"""

import json
from collections.abc import Mapping
from typing import Any, Final

from tokenizers import Tokenizer

from coeld.errors import BadModelFile, UnsupportedModel
from coeld.model.chat_template import checked
from coeld.model.checkpoint import Vocabulary, expect
from coeld.model.gguf_file import GgufFile

UNKNOWN: Final = 2
CONTROL: Final = 3
USER_DEFINED: Final = 4
BYTE: Final = 6
"""Token types of GGUF."""

SPM: Final = "llama"
"""What GGUF calls sentencepiece's byte-pair model."""
SPACE: Final = "\u2581"
"""Stands for a space in sentencepiece."""

BPE: Final = {
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}
"""The library's byte-pair model."""

_CONTRACTION: Final = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST: Final = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT: Final = (
    _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _REST
)
QWEN2_SPLIT: Final = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER: Final = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER: Final = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED: Final = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
)
_SLASHED: Final = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _REST
GPT4O_SPLIT: Final = _CASED % (_CONTRACTION + "?", _CONTRACTION + "?") + r"|\p{N}{1,3}" + _SLASHED
TEKKEN_SPLIT: Final = _CASED % ("", "") + r"|\p{N}" + _SLASHED
END_OF_TURN: Final = {
    "<|endoftext|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
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


def _split(regex: str) -> list[dict[str, Any]]:
    pattern = {"Regex": regex}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    return [split, _byte_level(use_regex=False)]


_DIGITS: Final = [{"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)]
_GPT2: Final = [_byte_level(use_regex=True)]
PRE_TOKENIZERS: Final[dict[str, list[dict[str, Any]]]] = {
    "gpt-2": _GPT2,
    "olmo": _GPT2,
    "granite-docling": _GPT2,
    "smollm": _DIGITS,
    "refact": _DIGITS,
    "starcoder": _DIGITS,
    "llama-bpe": _split(LLAMA3_SPLIT),
    "dbrx": _split(LLAMA3_SPLIT),
    "qwen2": _split(QWEN2_SPLIT),
    "stablelm2": _split(QWEN2_SPLIT),
    "gpt-4o": _split(GPT4O_SPLIT),
    "tekken": _split(TEKKEN_SPLIT),
}
WHOLE_WORDS_FIRST: Final = frozenset({"llama-bpe", "tekken"})
"""Words that are tokens are taken whole, whatever the merges say; and texts begin with BOS."""


def read_vocabulary(file: GgufFile, vocab: int) -> Vocabulary | None:
    """`vocab` is the number of rows of the embedding. None when the file has no tokenizer.

    Raises BadModelFile or UnsupportedModel.
    """
    kind = expect(file, "tokenizer.ggml.model", str, bool, "no_vocab")
    if kind == "no_vocab":
        return None
    pre = expect(file, "tokenizer.ggml.pre", str, bool, "default")
    if kind != SPM and (kind != "gpt2" or pre not in PRE_TOKENIZERS):
        raise UnsupportedModel(
            f"{file.source} has the tokenizer {kind!r} with pre-tokenizer {pre!r}. coeld knows "
            f"{SPM!r} (sentencepiece) and 'gpt2' with {', '.join(PRE_TOKENIZERS)}."
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
    control = {tokens[index]: index for index in range(vocab) if types[index] == CONTROL}
    model = _spm(file, tokens, types) if kind == SPM else _byte_pairs(file, pre, tokens)
    begins = kind == SPM or pre in WHOLE_WORDS_FIRST
    eos = _token(file, "eos", vocab)
    named = {eos, _token(file, "eot", vocab), _token(file, "eom", vocab)} - {None}
    template = expect(file, "tokenizer.chat_template", str, lambda _: True, "")
    return Vocabulary(
        json=_tokenizer_json(file, {**model, "added_tokens": _added(tokens, types)}),
        bos_token=_token(file, "bos", vocab),
        eos_tokens=end_tokens({index for index in named if index is not None}, control, eos),
        add_bos=expect(file, "tokenizer.ggml.add_bos_token", bool, lambda _: True, begins),
        chat_template=checked(template, _others(file, tokens), file.source) or None,
    )


def _others(file: GgufFile, tokens: list[str]) -> dict[str, str]:
    """Texts of the special tokens besides BOS and EOS, where they are tokens."""
    keys = {"pad_token": "padding", "unk_token": "unknown"}
    found = {name: file.config.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    return {
        name: tokens[index]
        for name, index in found.items()
        if type(index) is int and 0 <= index < len(tokens)
    }


def _texts(file: GgufFile, key: str) -> list[str]:
    return expect(file, key, list, lambda value: all(isinstance(item, str) for item in value))


def _token(file: GgufFile, name: str, vocab: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    if key not in file.config:
        return None
    return expect(file, key, int, lambda value: 0 <= value < vocab)


def end_tokens(named: set[int], control: Mapping[str, int], first: int | None) -> tuple[int, ...]:
    """Those the source names, and control tokens that are known to end an answer.

    `first`: the tokenizer's own, one of `named`."""
    usual = END_OF_TURN
    if "<|return|>" in control:  # gpt-oss, where <|end|> ends a message, and the answer goes on
        usual = usual - {"<|end|>"}
    found = named | {control[text] for text in usual & control.keys()}
    return tuple(sorted(found, key=lambda token: (token != first, token)))


def _byte_pairs(file: GgufFile, pre: str, tokens: list[str]) -> dict[str, Any]:
    merges = [tuple(merge.split(" ")) for merge in _texts(file, "tokenizer.ggml.merges")]
    steps = PRE_TOKENIZERS[pre]
    return {
        "normalizer": None,
        "pre_tokenizer": steps[0]
        if len(steps) == 1
        else {"type": "Sequence", "pretokenizers": steps},
        "decoder": _byte_level(use_regex=True),
        "model": {
            **BPE,
            "ignore_merges": pre in WHOLE_WORDS_FIRST,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": merges,
        },
    }


def _spm(file: GgufFile, tokens: list[str], types: list[int]) -> dict[str, Any]:
    """Sentencepiece's byte-pair model as the library's: merges in the order of the pieces' scores.

    Sentencepiece joins the neighbours whose join has the highest score, the leftmost of equals. So
    each way to put a piece together from two others becomes a merge, ranked by the piece's score.
    (The only difference: where the same piece can be made of overlapping neighbours in two ways,
    the library prefers one way to the other, not the left to the right.) Characters that are no
    piece become their bytes, if the vocabulary has them.
    """
    count = len(tokens)
    scores = expect(
        file,
        "tokenizer.ggml.scores",
        list,
        lambda value: len(value) == count and all(isinstance(s, float) and s == s for s in value),
    )
    vocabulary = {token: index for index, token in enumerate(tokens)}
    pieces = {
        token: index
        for token, index in vocabulary.items()
        if types[index] not in (UNKNOWN, CONTROL, BYTE)
    }
    ways = [
        (-scores[index], index, -cut, (piece[:cut], piece[cut:]))
        for piece, index in pieces.items()
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
    prefix = expect(file, "tokenizer.ggml.add_space_prefix", bool, lambda _: True, True)
    space = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    begin = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*begin, space]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            **BPE,
            "unk_token": next(
                (t for t, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None
            ),
            "fuse_unk": True,
            "byte_fallback": all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)),
            "vocab": vocabulary,
            "merges": [way for *_, way in sorted(ways)],
        },
    }


def _added(tokens: list[str], types: list[int]) -> list[dict[str, Any]]:
    """Tokens that are found in a text before everything else."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [
        {"id": index, "content": token, **flags, "special": kind == CONTROL}
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]


def _tokenizer_json(file: GgufFile, parts: dict[str, Any]) -> bytes:
    keys = ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "model")
    value: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None}
    value |= {key: parts.get(key) for key in keys}
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    try:
        Tokenizer.from_str(text)
    except Exception as exc:  # the library raises nothing narrower
        raise BadModelFile(
            f"the vocabulary of {file.source} makes no tokenizer ({exc}). The file is damaged; get "
            "it again."
        ) from exc
    return text.encode()
