"""Lines between agent and engine: what the API takes in fits into one and comes out the same."""

import json

import pytest

from coeld.api.openai import MESSAGES_MAX, parse
from coeld.api.server import BODY_BYTES_MAX
from coeld.engine.protocol import LINE_BYTES_MAX, decode, encode


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le"])
@pytest.mark.parametrize("character", ["x", "é", "漢", "😀", "\\", "\x01", "\x7f", "\u2028"])
def test_the_largest_prompt_that_the_api_takes_fits_into_a_line(
    character: str, encoding: str
) -> None:
    each = len(json.dumps(character, ensure_ascii=False)[1:-1].encode(encoding))
    prompt = character * ((BODY_BYTES_MAX - 100) // each)
    body = json.dumps({"prompt": prompt}, ensure_ascii=False).encode(encoding)
    assert BODY_BYTES_MAX - 100 < len(body) <= BODY_BYTES_MAX
    order = {"op": "generate", "id": "1", **parse("text", body).engine}
    line = encode(order)
    assert len(line) <= LINE_BYTES_MAX
    assert line.count(b"\n") == 1
    assert decode(line) == order


def test_as_many_short_messages_as_the_api_takes_fit_into_a_line() -> None:
    silent = {"role": "assistant"}
    spoken = {"role": "user", "content": "é" * ((BODY_BYTES_MAX - (100 << 10)) // 2)}
    messages = [silent] * (MESSAGES_MAX - 1) + [spoken]
    body = json.dumps({"messages": messages}, ensure_ascii=False).encode()
    assert len(body) <= BODY_BYTES_MAX
    assert len(encode({"op": "generate", **parse("chat", body).engine})) <= LINE_BYTES_MAX


def test_names_of_files_that_are_no_utf8_come_through() -> None:
    message = {
        "ev": "load_failed",
        "lots": [],
        "why": b"/st\xffore".decode(errors="surrogateescape"),
    }
    assert decode(encode(message)) == message
