"""Streaming text: what the user sees is what the tokens say, minus the stop string."""

from random import Random

import pytest

from coeld.engine.text import Text, _overlap
from coeld.errors import BadRequest


@pytest.fixture(scope="module")
def text(tiny, tiny_store) -> Text:
    return Text(tiny, tiny_store)


def shown(text: Text, tokens: list[int], stop: list[str]) -> tuple[str, bool]:
    stream, out = text.stream(stop), ""
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


def test_a_conversation_is_rendered_by_the_models_template(text) -> None:
    tokens = text.encode_chat([{"role": "user", "content": "hi"}])
    assert shown(text, tokens, []) == ("user\nhi\nassistant\n", False)


def test_messages_the_template_refuses_are_the_callers_mistake(tiny, tiny_store) -> None:
    text = Text(tiny, tiny_store)
    text._template = text._template.environment.from_string("{{ raise_exception('no system') }}")
    with pytest.raises(BadRequest, match="no system"):
        text.encode_chat([{"role": "system", "content": "x"}])


def test_a_hostile_template_cannot_reach_python(tiny, tiny_store) -> None:
    text = Text(tiny, tiny_store)
    source = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    text._template = text._template.environment.from_string(source)
    with pytest.raises(BadRequest):
        text.encode_chat([{"role": "user", "content": "x"}])
