"""The tokenizer made from a GGUF file: hand-checked on the tiny vocabulary of the tests."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from coeld.errors import BadModelFile, UnsupportedModel
from coeld.model.checkpoint import Vocabulary
from coeld.model.gguf_file import GgufFile
from coeld.model.manifest import Manifest
from coeld.model.store import Store
from coeld.model.tokenizer import PRE_TOKENIZERS, read_vocabulary
from tests.reference.tiny_gguf import CHAT_TEMPLATE, vocabulary, write_tiny_llama


@pytest.fixture(scope="module")
def tokenizer(imported: tuple[Store, Manifest]) -> Tokenizer:
    store, manifest = imported
    return Tokenizer.from_file(str(store.blob_path(manifest.tokenizer)))


def read(path: Path, **keys: Any) -> Vocabulary:
    write_tiny_llama(path, layers=1, **keys)
    with GgufFile(path) as file:
        return read_vocabulary(file, len(vocabulary()))


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("the", ["t", "he"]),
        (" the", ["Ġthe"]),
        ("in an inn", ["in", "Ġ", "an", "Ġ", "in", "n"]),
        ("1234", ["1", "2", "3", "4"]),
        ("a 12b", ["a", "Ġ", "1", "2", "b"]),
        ("a  b", ["a", "Ġ", "Ġ", "b"]),
        ("\n\n\t", ["Ċ", "Ċ", "ĉ"]),
        ("é", ["Ã", "©"]),
        ("🙂", ["ð", "Ł", "Ļ", "Ĥ"]),
        ("<|im_start|>user\nI<|im_end|>", ["<|im_start|>", "u", "s", "er", "Ċ", "I", "<|im_end|>"]),
        ("<|im_star", ["<", "|", "i", "m", "_", "s", "t", "a", "r"]),
        ("", []),
    ],
)
def test_hand_checked_encodings(tokenizer: Tokenizer, text: str, tokens: list[str]) -> None:
    assert tokenizer.encode(text).tokens == tokens
    assert tokenizer.encode(text).ids == [vocabulary().index(token) for token in tokens]


@pytest.mark.parametrize(
    "text",
    ["Hello, world", "  two  spaces ", "a\r\n\tb\n\n", "naïve 日本語 🙂 ½ ٣", "don't I'll", "\0"],
)
def test_decoding_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_control_tokens_can_be_left_out_when_decoding(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|im_start|>hi<|im_end|>").ids
    assert tokenizer.decode(ids) == "hi"


@pytest.mark.parametrize(
    ("pre", "tokens"),
    [
        ("smollm", ["a", "3", "4", "1", "2", "Ġ", "1", "2"]),  # every digit alone
        ("gpt-2", ["a", "3", "4", "12", "Ġ", "12"]),
        ("llama-bpe", ["a", "3", "4", "1", "2", "Ġ", "12"]),  # three digits at most: 341, 2
    ],
)
def test_each_pre_tokenizer_splits_in_its_own_way(
    tmp_path: Path, pre: str, tokens: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.reference.tiny_gguf.MERGES", ["1 2"])
    write_tiny_llama(tmp_path / "m.gguf", layers=1, pre=pre)
    with GgufFile(tmp_path / "m.gguf") as file:
        vocabulary_ = read_vocabulary(file, 3 + 256 + 1)
    assert Tokenizer.from_str(vocabulary_.json.decode()).encode("a3412 12").tokens == tokens


def test_what_the_manifest_says_about_tokens(tmp_path: Path) -> None:
    found = read(tmp_path / "m.gguf")
    assert (found.bos_token, found.add_bos) == (1, False)
    assert found.eos_tokens == (2, 0)  # <|endoftext|> ends an answer as well
    assert found.chat_template == CHAT_TEMPLATE


@pytest.mark.parametrize(
    ("padding", "set_"), [(1, '{% set pad_token = "<|im_start|>" +%}'), (999, "")]
)
def test_the_chat_template_is_checked_and_told_the_tokens_that_it_names(
    tmp_path: Path, padding: int, set_: str
) -> None:
    write_tiny_llama(tmp_path / "m.gguf", layers=1)
    with GgufFile(tmp_path / "m.gguf") as file:
        file.config["tokenizer.ggml.padding_token_id"] = padding
        file.config["tokenizer.chat_template"] = "{{ pad_token }}"
        found = read_vocabulary(file, len(vocabulary()))
        assert found.chat_template == set_ + "{{ pad_token }}"
        file.config["tokenizer.chat_template"] = "{% if %}"
        with pytest.raises(UnsupportedModel, match=r"chat template of m\.gguf"):
            read_vocabulary(file, len(vocabulary()))


def test_the_same_file_gives_the_same_bytes(tmp_path: Path) -> None:
    assert read(tmp_path / "a.gguf").json == read(tmp_path / "b.gguf").json


DIGITS = [
    "I",
    "'",
    "LL",
    " pay",
    " ",
    "1",
    "2",
    "3",
    "4",
    " €,",
    " HelloWorld",
    "()/",
    "\n",
    "/",
    "x",
]
GPT2 = ["I", "'", "LL", " pay", " 1234", " €,", " HelloWorld", "()/", "\n", "/", "x"]
LLAMA3 = ["I", "'LL", " pay", " ", "123", "4", " €,", " HelloWorld", "()/\n", "/x"]
QWEN2 = ["I", "'LL", " pay", " ", "1", "2", "3", "4", " €,", " HelloWorld", "()/\n", "/x"]
GPT4O = ["I'LL", " pay", " ", "123", "4", " €,", " Hello", "World", "()/\n/", "x"]
TEKKEN = ["I", "'LL", " pay", " ", "1", "2", "3", "4", " €,", " Hello", "World", "()/\n/", "x"]
WORDS = {
    **dict.fromkeys(("gpt-2", "olmo", "granite-docling"), GPT2),
    **dict.fromkeys(("smollm", "refact", "starcoder"), DIGITS),
    **dict.fromkeys(("llama-bpe", "dbrx"), LLAMA3),
    **dict.fromkeys(("qwen2", "stablelm2"), QWEN2),
    "gpt-4o": GPT4O,
    "tekken": TEKKEN,
}


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_each_pre_tokenizer_finds_its_words(tmp_path: Path, pre: str) -> None:
    """Contractions, digits, capitals in a word and slashes after a line's end tell them apart."""
    text = "I'LL pay 1234 €, HelloWorld()/\n/x"
    found = Tokenizer.from_str(read(tmp_path / "m.gguf", pre=pre).json.decode())
    places = [place for _, place in found.pre_tokenizer.pre_tokenize_str(text)]
    assert [text[start:stop] for start, stop in places] == WORDS[pre]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
@pytest.mark.parametrize("seed", range(10))
def test_no_pre_tokenizer_loses_a_character(tmp_path: Path, pre: str, seed: int) -> None:
    rng = random.Random(f"{pre}/{seed}")
    found = Tokenizer.from_str(read(tmp_path / "m.gguf", pre=pre).json.decode())
    alphabet = "aZ09 \t\r\n'’/.,()日ß🙂½\u0301\u3000"
    text = "".join(rng.choices(alphabet, k=200))
    assert found.decode(found.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("pre", ["deepseek-v3", "", "default"])
def test_an_unknown_pre_tokenizer_is_unsupported_and_the_known_are_listed(
    tmp_path: Path, pre: str
) -> None:
    with pytest.raises((UnsupportedModel, BadModelFile), match=r"gpt-2, olmo|cannot be"):
        read(tmp_path / "m.gguf", pre=pre)


def test_an_end_token_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadModelFile, match="eot_token_id"):
        read(tmp_path / "m.gguf", extra_keys={"tokenizer.ggml.eot_token_id": 100_000})


def test_merges_of_unknown_tokens_make_no_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_llama(tmp_path / "m.gguf", layers=1)
    with GgufFile(tmp_path / "m.gguf") as file:
        for merges in (["nothing known"], ["one"], ["a b c"]):
            file.config["tokenizer.ggml.merges"] = merges
            with pytest.raises(BadModelFile, match="makes no tokenizer"):
                read_vocabulary(file, len(vocabulary()))


def test_a_vocabulary_of_another_size_than_the_embedding_is_refused(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "m.gguf", layers=1)
    with GgufFile(tmp_path / "m.gguf") as file, pytest.raises(BadModelFile, match="269 tokens"):
        read_vocabulary(file, 270)


def test_user_defined_tokens_are_matched_but_not_hidden(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "m.gguf", layers=1)
    with GgufFile(tmp_path / "m.gguf") as file:
        file.config["tokenizer.ggml.token_type"][0] = 4
        found = json.loads(read_vocabulary(file, len(vocabulary())).json)
    assert [t["special"] for t in found["added_tokens"]] == [False, True, True]
