"""Bodies in, engine words out; and what is refused, by the name of the field."""

import json
from typing import Any

import pytest

from coeld.api.failures import failure
from coeld.api.openai import Kind, Reply, parse
from coeld.errors import (
    BadRequest,
    CoeldError,
    ContextTooLong,
    EngineGone,
    NotCovered,
    UnknownModel,
)

HELLO = [{"role": "user", "content": "hello"}]


def chat(**fields: Any) -> bytes:
    return json.dumps({"messages": HELLO} | fields).encode()


def test_a_plain_chat_takes_the_defaults_of_openai() -> None:
    ask = parse("chat", chat())
    assert ask.engine == {
        "messages": HELLO,
        "max_tokens": None,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "seed": None,
        "stop": [],
        "kl_budget": None,
    }
    assert (ask.stream, ask.include_usage, ask.model) == (False, False, None)


def test_everything_that_can_be_said_arrives() -> None:
    body = chat(
        model="m",
        stream=True,
        stream_options={"include_usage": True},
        max_completion_tokens=5,
        max_tokens=9,
        temperature=0,
        top_p=0.5,
        top_k=3,
        seed=-7,
        stop="END",
        n=1,
        unknown="fields are ignored",
    )
    ask = parse("chat", body)
    assert (ask.model, ask.stream, ask.include_usage) == ("m", True, True)
    assert ask.engine["max_tokens"] == 5
    assert ask.engine["temperature"] == 0.0
    assert (ask.engine["top_p"], ask.engine["top_k"], ask.engine["seed"]) == (0.5, 3, -7)
    assert ask.engine["stop"] == ["END"]


def test_text_parts_are_joined_and_developers_are_systems() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": parts}, {"role": "assistant", "content": None}]
    ask = parse("chat", chat(messages=messages))
    assert ask.engine["messages"] == [
        {"role": "system", "content": "ab"},
        {"role": "assistant", "content": ""},
    ]


def test_a_list_with_one_prompt_is_a_prompt() -> None:
    assert parse("text", b'{"prompt": ["hi"]}').engine["prompt"] == "hi"


def test_null_means_the_default() -> None:
    names = ("max_tokens", "temperature", "top_p", "seed", "stop", "n", "stream", "model")
    assert parse("chat", chat(**dict.fromkeys(names))) == parse("chat", chat())


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"{", None),
        (b"[]", None),
        (b"null", None),
        (b"\xff\xfe", None),
        (b"[" * 100_000, None),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', None),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}', "temperature"),
        (b'{"messages": [{"role": "user", "content": "x"}], "top_p": -Infinity}', None),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "messages[0].content"),
        (b"{}", "messages"),
        (chat(messages=[]), "messages"),
        (chat(messages="hello"), "messages"),
        (chat(messages={"role": "user"}), "messages"),
        (chat(messages=["hello"]), "messages[0]"),
        (chat(messages=HELLO * 5000), "messages"),
        (chat(messages=[{"content": "x"}]), "messages[0].role"),
        (chat(messages=[{"role": "king", "content": "x"}]), "messages[0].role"),
        (chat(messages=[{"role": ["user"], "content": "x"}]), "messages[0].role"),
        (chat(messages=[{"role": "user"}]), "messages[0].content"),
        (chat(messages=[{"role": "user", "content": 5}]), "messages[0].content"),
        (chat(messages=[{"role": "user", "content": ["x"]}]), "messages[0].content[0]"),
        (
            chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
            "messages[0].content[0]",
        ),
        (
            chat(messages=[{"role": "user", "content": [{"type": "text", "text": 1}]}]),
            "messages[0].content[0].text",
        ),
        (chat(max_tokens=0), "max_tokens"),
        (chat(max_tokens=-1), "max_tokens"),
        (chat(max_tokens=10**30), "max_tokens"),
        (chat(max_tokens=1.5), "max_tokens"),
        (chat(max_tokens=True), "max_tokens"),
        (chat(max_tokens="5"), "max_tokens"),
        (chat(max_completion_tokens=-5), "max_completion_tokens"),
        (chat(max_completion_tokens=0), "max_completion_tokens"),
        (chat(temperature=-0.1), "temperature"),
        (chat(temperature=2.1), "temperature"),
        (chat(temperature=10**400), "temperature"),
        (chat(temperature="hot"), "temperature"),
        (chat(temperature=True), "temperature"),
        (chat(top_p=1.1), "top_p"),
        (chat(top_k=-1), "top_k"),
        (chat(seed=1.0), "seed"),
        (chat(seed=2**63), "seed"),
        (chat(seed=-(2**63) - 1), "seed"),
        (chat(n=2), "n"),
        (chat(n=0), "n"),
        (chat(stop=5), "stop"),
        (chat(stop=["a"] * 5), "stop"),
        (chat(stop=[""]), "stop"),
        (chat(stop=["x" * 300]), "stop"),
        (chat(stop=["a", 1]), "stop"),
        (chat(stream="yes"), "stream"),
        (chat(stream_options={"include_usage": True}), "stream_options"),
        (chat(stream=True, stream_options="all"), "stream_options"),
        (chat(stream=True, stream_options={"include_usage": 1}), "stream_options.include_usage"),
        (chat(model=5), "model"),
    ],
)
def test_a_bad_chat_body_is_refused_by_the_name_of_the_field(
    body: bytes, param: str | None
) -> None:
    with pytest.raises(BadRequest) as caught:
        parse("chat", body)
    assert caught.value.param == param
    assert failure(caught.value).status == 400


UNSUPPORTED: dict[str, list[tuple[str, Any, list[Any]]]] = {
    "chat": [
        ("response_format", {"type": "json_object"}, [None, {"type": "text"}]),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x"}}, []),
        ("tools", [{"type": "function", "function": {"name": "f"}}], [None, []]),
        ("tool_choice", "required", [None, "none", "auto"]),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}, []),
        ("functions", [{"name": "f"}], [[]]),
        ("modalities", ["text", "audio"], [None, ["text"]]),
        ("logprobs", True, [None, False]),
        ("top_logprobs", 3, [None, 0]),
        ("logit_bias", {"5": 100}, [None, {}]),
        ("frequency_penalty", 0.5, [None, 0, 0.0]),
        ("presence_penalty", -2, [None, 0, 0.0]),
    ],
    "text": [
        ("echo", True, [None, False]),
        ("suffix", "!", [None, ""]),
        ("best_of", 2, [None, 1]),
        ("logprobs", 0, [None]),
        ("logprobs", 3, []),
        ("logit_bias", {"5": 100}, [None, {}]),
        ("presence_penalty", 1, [None, 0]),
    ],
}


@pytest.mark.parametrize(
    ("kind", "name", "wanted", "neutral"),
    [(kind, *row) for kind, rows in UNSUPPORTED.items() for row in rows],
)
def test_what_would_change_the_answer_and_is_not_supported_is_refused(
    kind: Kind, name: str, wanted: Any, neutral: list[Any]
) -> None:
    plain = {"messages": HELLO} if kind == "chat" else {"prompt": "x"}
    with pytest.raises(BadRequest, match="not supported") as caught:
        parse(kind, json.dumps(plain | {name: wanted}).encode())
    assert caught.value.param == name
    for value in neutral:
        with_it = parse(kind, json.dumps(plain | {name: value}).encode())
        assert with_it == parse(kind, json.dumps(plain).encode())


CALLS = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "tool", "tool_call_id": "1", "content": "42"}, "messages[1].role"),
        ({"role": "assistant", "content": None, "tool_calls": CALLS}, "messages[1].tool_calls"),
        ({"role": "assistant", "content": "x", "tool_calls": CALLS}, "messages[1].tool_calls"),
        ({"role": "assistant", "function_call": {"name": "f"}}, "messages[1].function_call"),
    ],
)
def test_a_history_with_tools_is_refused(message: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest, match="not supported") as caught:
        parse("chat", chat(messages=[*HELLO, message]))
    assert caught.value.param == param
    without = {"role": "assistant", "content": "x", "tool_calls": [], "function_call": None}
    assert parse("chat", chat(messages=[*HELLO, without])).engine["messages"][1]["content"] == "x"


@pytest.mark.parametrize("prompt", [None, "", 5, [], ["a", "b"], [1, 2], {"text": "x"}, ["\ud800"]])
def test_a_bad_prompt_is_refused(prompt: Any) -> None:
    with pytest.raises(BadRequest) as caught:
        parse("text", json.dumps({"prompt": prompt}).encode())
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ContextTooLong("x", "messages"), 400, "context_length_exceeded"),
        (UnknownModel("x"), 404, "model_not_found"),
        (NotCovered("x", 77), 503, "not_covered"),
        (EngineGone("x"), 503, "engine_gone"),
        (CoeldError("x"), 500, "coeld_error"),
    ],
)
def test_each_error_has_its_status_and_code(error: CoeldError, status: int, code: str) -> None:
    found = failure(error)
    assert (found.status, found.body["error"]["code"]) == (status, code)
    assert ("Retry-After" in found.headers) == (status == 503)
    if isinstance(error, NotCovered):
        assert found.body["error"]["missing_bytes"] == 77


DONE = {
    "finish_reason": "length",
    "prompt_tokens": 3,
    "completion_tokens": 5,
    "prefill_s": 0.1,
    "decode_s": 2.0,
    "decode_split": {"trunk_s": 0.4, "cuts": 3},
    "stalls": [0.5],
    "wire": {"rows_bytes": 7},
    "narrow": {"experts": 16, "of": 240, "bits": 4},
}


def test_a_whole_answer_has_the_shape_of_openai() -> None:
    value = Reply("chat", "chatcmpl-1", 9, "m").whole("hi", DONE)
    assert value["object"] == "chat.completion"
    assert value["choices"][0]["message"] == {"role": "assistant", "content": "hi"}
    assert value["choices"][0]["finish_reason"] == "length"
    assert value["usage"]["total_tokens"] == 8
    assert value["usage"]["x_coeld"]["decode_tokens_per_s"] == 2.0
    assert value["usage"]["x_coeld"]["decode_split"] == DONE["decode_split"]
    text = Reply("text", "cmpl-1", 9, "m").whole("hi", DONE)
    assert (text["object"], text["choices"][0]["text"]) == ("text_completion", "hi")


def test_one_token_has_no_speed() -> None:
    value = Reply("text", "c", 9, "m").whole("hi", DONE | {"completion_tokens": 1})
    assert value["usage"]["x_coeld"]["decode_tokens_per_s"] is None


def test_what_an_answer_may_lose_is_passed_on_and_checked() -> None:
    def budget(ours) -> float | None:
        body = {"prompt": "x", "x_coeld": ours}
        return parse("text", json.dumps(body).encode()).engine["kl_budget"]

    assert budget(None) is None
    assert budget({}) is None
    assert budget({"kl_budget": 0}) == 0.0
    assert budget({"kl_budget": 0.02}) == 0.02
    for wrong in (-0.1, 2, "0.02", True):
        with pytest.raises(BadRequest) as caught:
            budget({"kl_budget": wrong})
        assert caught.value.param == "x_coeld.kl_budget"
    with pytest.raises(BadRequest):
        budget([])
