"""Streaming text: what the user sees is what the tokens say, minus the stop string."""

import threading
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from coeld.engine.text import Text, _overlap
from coeld.errors import BadRequest
from coeld.model.manifest import BlobRef, Manifest
from coeld.model.store import Store


@pytest.fixture(scope="module")
def text(tiny, tiny_store) -> Text:
    return Text(tiny, tiny_store)


def shown(
    text: Text, tokens: list[int], stop: list[str], prompt: list[int] | None = None
) -> tuple[str, bool]:
    stream, out = text.stream(stop, prompt), ""
    for token in tokens:
        piece, stopped = stream.push(token)
        out += piece
        if stopped:
            return out, True
    return out + stream.flush(), False


@pytest.mark.parametrize("seed", range(60))
def test_streamed_text_equals_the_whole_cut_at_the_first_stop(text, seed: int) -> None:
    rng = Random(seed)
    words = ["the", " other", "日本", "é", "\n", "aab", "ab", " ", "🎉", "12"]
    whole = "".join(rng.choice(words) for _ in range(30))
    stop = [rng.choice(["ab\n", "日", "12 ", "aabab", "zzz", "\n\n"]) for _ in range(2)]
    at = min((whole.find(s) for s in stop if s in whole), default=None)
    expected = whole if at is None else whole[:at]
    assert shown(text, text.encode(whole), stop) == (expected, at is not None), f"seed={seed}"


def test_no_half_character_is_ever_shown(text) -> None:
    stream = text.stream()
    pieces = [stream.push(token)[0] for token in text.encode("🎉")]
    assert pieces[:-1] == [""] * (len(pieces) - 1)
    assert pieces[-1] == "🎉"


def test_the_overlap_is_the_longest_end_that_may_become_a_stop() -> None:
    assert _overlap("abcab", ["abx", "cabz"]) == 3
    assert _overlap("abc", ["x"]) == 0
    assert _overlap("aaa", ["aaaa"]) == 3


HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|constrain|>")
THOUGHT = "<|channel|>analysis<|message|>The user greets. Stop?<|end|>"
TURN = "<|start|>assistant<|channel|>"


@pytest.fixture(scope="module")
def harmony(text, tiny, tmp_path_factory) -> Text:
    """Of a model that speaks in channels."""
    tokenizer = Tokenizer.from_str(text._tokenizer.to_str())
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in HARMONY])
    return text_of(tokenizer, tiny, tmp_path_factory.mktemp("harmony"))


def text_of(tokenizer: Tokenizer, tiny: Manifest, folder: Path) -> Text:
    """The tiny model's, with another tokenizer."""
    store, source = Store(folder), tokenizer.to_str().encode()
    with store.lock():
        ref = BlobRef(store.put(source), len(source), {})
    return Text(replace(tiny, tokenizer=ref, chat_template=None), store)


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (f"{THOUGHT}{TURN}final<|message|>Hello!", "Hello!"),
        (f"{THOUGHT}{TURN}final <|constrain|>json<|message|>{{}}<|return|>", "{}"),
        (f"{THOUGHT}{TURN}commentary to=functions.f <|constrain|>json<|message|>{{}}", ""),
        ("<|channel|>final<|message|>a<|end|>" + TURN + "final<|message|>b", "ab"),
        (f"<|channel|>finally<|message|>a<|end|>{TURN}final<|message|>b", "b"),
        (THOUGHT[:-15], ""),
        (f"{THOUGHT}{TURN}fin", ""),
        ("Hello!", "Hello!"),
        ("", ""),
    ],
)
def test_of_what_is_said_in_channels_only_the_final_one_is_shown(harmony, said, answer) -> None:
    assert shown(harmony, harmony.encode(said), ["Stop"]) == (answer, False)


def test_a_stop_text_counts_in_the_answer_alone(harmony) -> None:
    said = harmony.encode(f"{THOUGHT}{TURN}final<|message|>Yes. Stop? No.")
    assert shown(harmony, said, ["Stop"]) == ("Yes. ", True)
    assert shown(harmony, said, ["analysis", "user", "final"]) == ("Yes. Stop? No.", False)


def test_what_continues_a_plain_prompt_is_shown_with_its_reasoning(harmony) -> None:
    said = harmony.encode(f"{THOUGHT}{TURN}final")
    raw = "analysisThe user greets. Stop?assistantfinal"
    assert shown(harmony, said, [], harmony.encode("Hi")) == (raw, False)


@pytest.fixture(scope="module")
def sentences(tiny, tmp_path_factory) -> Text:
    """Of a model with sentencepiece: a text begins with a space that is not shown."""
    tokens = ["<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abc", "\u2581a"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    bpe = models.BPE(vocabulary, [("\u2581", "a")], byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    return text_of(tokenizer, tiny, tmp_path_factory.mktemp("sentences"))


@pytest.mark.parametrize("prompt", ["a", "b a ", "日本", "<s>", "a<s>", "🎉", "\ufffdb", "   "])
@pytest.mark.parametrize("said", [" a", "  b", "c", "日", "🎉 a", " "])
def test_a_continuation_keeps_its_first_space(sentences, prompt: str, said: str) -> None:
    before, whole = (sentences.encode(text) for text in (prompt, prompt + said))
    if whole[: len(before)] != before:  # the border is within a token
        return
    found, _ = shown(sentences, whole[len(before) :], [], before)
    everything = sentences._tokenizer.decode(whole)
    assert found == everything[len(sentences._tokenizer.decode(before)) :]


def test_an_answer_to_a_conversation_begins_without_a_space(sentences) -> None:
    assert shown(sentences, sentences.encode("a b"), []) == ("a b", False)


def test_of_text_that_is_far_too_long_only_the_beginning_is_looked_at(text, monkeypatch) -> None:
    long = "the other 12 ab " * 500
    whole = text.encode(long)
    first = text.encode(long, 50)
    assert 2 * 50 < len(first) < len(whole)
    assert first[:-1] == whole[: len(first) - 1]
    assert text.encode(long, len(whole)) == whole
    monkeypatch.setattr("coeld.engine.text.LOOK_CHARS", 1)
    assert text.encode(long, 50) == whole, "the beginning says nothing"
    message = [{"role": "user", "content": long}]
    monkeypatch.setattr("coeld.engine.text.LOOK_CHARS", 32)
    assert 2 * 50 < len(text.encode_chat(message, 50)) < len(text.encode_chat(message))


def test_other_threads_run_while_a_text_becomes_tokens(text) -> None:
    encoding = threading.Thread(target=text.encode, args=("the other " * 20_000,))
    encoding.start()
    turns = 0
    while encoding.is_alive():
        encoding.join(0.001)
        turns += 1
    assert turns > 20


def test_a_conversation_is_rendered_by_the_models_template(text) -> None:
    tokens = text.encode_chat([{"role": "user", "content": "hi"}])
    assert shown(text, tokens, []) == ("user\nhi\nassistant\n", False)


def test_a_template_is_told_the_end_token_and_that_there_are_no_tools(tiny, tiny_store) -> None:
    text = Text(tiny, tiny_store)
    source = "{{ eos_token }}{{ [tools is none, documents is none] }}"
    text._template = text._template.environment.from_string(source)
    assert text.encode_chat([]) == text.encode("<|im_end|>[True, True]")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('no system') }}", "no system"),
        ("{{ 1 / (messages | length - 1) }}", "division"),
        ("{% for i in range(200000) %}{% endfor %}", "[Rr]ange"),
        ("{{ (messages[0].content | list).pop(7) }}", "pop"),
    ],
)
def test_messages_the_template_refuses_are_the_callers_mistake(
    tiny, tiny_store, template: str, said: str
) -> None:
    text = Text(tiny, tiny_store)
    text._template = text._template.environment.from_string(template)
    with pytest.raises(BadRequest, match=said):
        text.encode_chat([{"role": "system", "content": "x"}])


def test_a_hostile_template_cannot_reach_python(tiny, tiny_store) -> None:
    text = Text(tiny, tiny_store)
    source = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    text._template = text._template.environment.from_string(source)
    with pytest.raises(BadRequest):
        text.encode_chat([{"role": "user", "content": "x"}])
