"""The sentencepiece vocabulary of GGUF files against sentencepiece itself, trained here."""

import io
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from coeld.errors import BadModelFile
from coeld.model.tokenizer import read_vocabulary

TEXT = Path(__file__).parents[2] / "golden/text.txt"
VOCAB = 900
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6


def train(prefix: bool) -> sentencepiece.SentencePieceProcessor:
    """As Llama's: byte pairs, bytes for unknown characters, text not normalised."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.read_text().splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        split_digits=True,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def as_gguf(model: sentencepiece.SentencePieceProcessor, **changes: Any) -> Any:
    """What a GGUF file of it says."""
    ids = range(model.get_piece_size())

    def kind(index: int) -> int:
        if model.is_control(index):
            return CONTROL
        return UNKNOWN if model.is_unknown(index) else BYTE if model.is_byte(index) else NORMAL

    keys = {
        "model": "llama",
        "tokens": [model.id_to_piece(index) for index in ids],
        "scores": [model.get_score(index) for index in ids],
        "token_type": [kind(index) for index in ids],
        "bos_token_id": model.bos_id(),
        "eos_token_id": model.eos_id(),
    }
    config = {f"tokenizer.ggml.{key}": value for key, value in (keys | changes).items()}
    return SimpleNamespace(config=config, source="m.gguf")


@pytest.fixture(scope="module", params=[True, False], ids=["prefix", "bare"])
def both(request) -> tuple[sentencepiece.SentencePieceProcessor, Tokenizer]:
    model = train(request.param)
    found = read_vocabulary(as_gguf(model, add_space_prefix=request.param), VOCAB)
    return model, Tokenizer.from_str(found.json.decode())


def texts(seed: int) -> list[str]:
    """Of many kinds: pieces of the corpus, its words in any order, letters, any characters."""
    rng, corpus = random.Random(seed), TEXT.read_text()
    words = corpus.split()
    start = rng.randrange(len(corpus))
    return [
        corpus[start : start + rng.randrange(300)],
        " ".join(rng.choices(words, k=12)),
        "".join(rng.choices("aabeeinorst  ", k=40)),
        "".join(rng.choices(words, k=6)) + "   \n\t" + rng.choice(words),
        "".join(
            chr(rng.choice([rng.randrange(1, 128), rng.randrange(160, 0xD800)])) for _ in "x" * 20
        ),
        "naïve 日本語 🙂 ½ ٣",
    ]


@pytest.mark.parametrize("seed", range(50))
def test_texts_become_the_tokens_that_sentencepiece_finds(both, seed: int) -> None:
    model, tokenizer = both
    for text in texts(seed):
        if "\u2581" in text:
            continue
        found = tokenizer.encode(text, add_special_tokens=False).ids
        assert found == model.encode(text), f"seed={seed} {text!r}"


@pytest.mark.parametrize("seed", range(10))
def test_tokens_become_the_text_again_also_one_by_one(both, seed: int) -> None:
    _model, tokenizer = both
    for text in texts(seed):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text, f"seed={seed} {text!r}"
        stream = DecodeStream()
        pieces = [stream.step(tokenizer, index) or "" for index in ids]
        assert "".join(pieces) in (text, text.removeprefix(" "), " " + text)


def test_what_the_manifest_says_about_tokens() -> None:
    found = read_vocabulary(as_gguf(train(prefix=True)), VOCAB)
    assert (found.bos_token, found.eos_tokens, found.add_bos) == (1, (2,), True)
    tokenizer = Tokenizer.from_str(found.json.decode())
    assert tokenizer.encode("a</s>b").tokens == ["▁a", "</s>", "▁b"]
    assert tokenizer.decode(tokenizer.encode("a</s>").ids) == "a"


@pytest.mark.parametrize(
    "scores", [None, [], [0.0] * (VOCAB - 1), [float("nan")] * VOCAB, ["0"] * VOCAB, 7]
)
def test_scores_that_are_none_are_refused(scores: Any) -> None:
    with pytest.raises(BadModelFile, match=r"tokenizer\.ggml\.scores"):
        read_vocabulary(as_gguf(train(prefix=True), scores=scores), VOCAB)


def test_without_all_bytes_unknown_characters_become_the_unknown_token() -> None:
    file = as_gguf(train(prefix=True))
    tokens = file.config["tokenizer.ggml.tokens"]
    file.config["tokenizer.ggml.tokens"] = [
        f"<gone {index}>" if token.startswith("<0x") else token
        for index, token in enumerate(tokens)
    ]
    found = json.loads(read_vocabulary(file, VOCAB).json)
    assert found["model"]["byte_fallback"] is False
    assert "<unk>" in Tokenizer.from_str(json.dumps(found)).encode("日本").tokens
