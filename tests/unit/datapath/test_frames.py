"""Frames: what goes in comes out, and nothing else gets in."""

from random import Random

import numpy as np
import pytest

from coeld.compression.prediction import Past, forecast
from coeld.compression.transfer import WIRED
from coeld.compression.wire import Codec, encode, loudness, relative_error
from coeld.datapath import frames
from coeld.datapath.frames import HEADER, Kind, SpanCall
from coeld.errors import CacheLost, FrameError, PeerRefused


def joined(pieces) -> bytes:
    return b"".join(bytes(piece) for piece in pieces)


def opened(data: bytes):
    header = frames.parse_header(data[: HEADER.size])
    payload = memoryview(data)[HEADER.size :]
    assert len(payload) == header.payload_bytes
    return header, payload


@pytest.mark.parametrize("seed", range(50))
def test_experts_and_rows_survive_the_journey(seed: int) -> None:
    rng = Random(seed)
    rows, hidden = rng.randint(1, 40), rng.choice([1, 7, 64])
    experts = tuple(rng.sample(range(200), rng.randint(1, 20)))
    gates = None
    if seed % 2:
        gates = np.random.default_rng(seed).random((rows, len(experts)), np.float32)
    x = np.random.default_rng(seed).standard_normal((rows, hidden), np.float32)
    header, payload = opened(joined(frames.pack_experts(seed, 3, experts, x, gates)))
    assert (header.kind, header.call_id, header.layer) == (Kind.EXPERTS, seed, 3)
    found, back, weights = frames.unpack_experts(header, payload)
    assert found == experts
    assert np.array_equal(back, x)
    assert (weights is None) == (gates is None)
    assert gates is None or np.array_equal(weights, gates)


@pytest.mark.parametrize("codec", [codec for codec in WIRED if codec is not Codec.FLOAT32])
def test_coded_rows_survive_the_journey_both_ways(codec: Codec) -> None:
    x = np.random.default_rng(codec).standard_normal((5, 72)).astype(np.float32)
    coded = codec, encode(codec, x, 0.05)
    gates = np.full((5, 2), 0.5, np.float32)
    header, payload = opened(joined(frames.pack_experts(7, 3, [4, 2], x, gates, coded, 0.25)))
    assert (header.codec, header.error) == (codec, 0.25)
    found, back, weights = frames.unpack_experts(header, payload)
    assert (found, np.array_equal(weights, gates)) == ((4, 2), True)
    assert relative_error(x, back) == pytest.approx(coded[1].error, rel=0.2)
    header, payload = opened(joined(frames.pack_result(7, 3, x, 9, coded)))
    assert header.error == pytest.approx(coded[1].error)
    again, computed_us = frames.unpack_result(header, payload)
    assert (np.array_equal(again, back), computed_us) == (True, 9)


def test_coded_rows_cut_short_or_too_long_are_refused() -> None:
    x = np.ones((3, 70), np.float32)
    for codec in WIRED:
        data = joined(frames.pack_result(1, 2, x, 0, (codec, encode(codec, x, 0.05))))
        for wrong in (data[:-1], data + b"\0"):
            bent = bytearray(wrong)
            bent[24:28] = (len(bent) - HEADER.size).to_bytes(4, "little")
            with pytest.raises(FrameError):
                frames.unpack_result(*opened(bytes(bent)))


def ahead(x, past: Past):
    told = forecast(past, x, loudness(x))
    assert told is not None
    return Codec.STEPS_AHEAD, encode(Codec.STEPS_AHEAD, x, 0.05, told)


def test_rows_that_refer_to_those_before_need_them() -> None:
    x, y, news = np.random.default_rng(1).standard_normal((3, 40, 64)).astype(np.float32)
    past, following = Past(x, y), x + y + 0.1 * news
    coded = ahead(following, past)
    data = joined(frames.pack_experts(7, 3, [4], following, None, coded, 0.1, keep=True))
    header, payload = opened(data)
    assert (header.codec, header.kept) == (Codec.STEPS_AHEAD, True)
    _found, back, _weights = frames.unpack_experts(header, payload, past)
    assert relative_error(following, back) == pytest.approx(coded[1].error, rel=1e-3)
    for other in (None, Past(x[1:], y[1:])):
        with pytest.raises(FrameError, match="did not go before"):
            frames.unpack_experts(header, payload, other)


def test_only_calls_of_experts_refer_to_rows_before_and_only_steps_are_kept() -> None:
    x, y, news = np.random.default_rng(1).standard_normal((3, 40, 64)).astype(np.float32)
    coded = ahead(x + 0.1 * news, Past(x, y))
    with pytest.raises(FrameError, match="limits"):
        opened(joined(frames.pack_result(7, 3, x, 0, coded)))
    with pytest.raises(FrameError, match="limits"):
        opened(joined(frames.pack_span(7, SpanCall(1, 0, 0, 2, 1), x, coded)))
    with pytest.raises(FrameError, match="limits"):
        opened(joined(frames.pack_experts(7, 3, [4], x, keep=True)))
    for pieces in (frames.pack_result(7, 3, x), frames.pack_free(7)):
        data = bytearray(joined(pieces))
        data[7] = frames.KEPT
        with pytest.raises(FrameError, match="limits"):
            frames.parse_header(bytes(data[: HEADER.size]))


@pytest.mark.parametrize("codec", [codec for codec in WIRED if codec is not Codec.FLOAT32])
def test_the_residual_stream_of_a_span_may_be_coded(codec: Codec) -> None:
    x = np.random.default_rng(codec).standard_normal((5, 72)).astype(np.float32)
    coded, asked = (codec, encode(codec, x, 0.05)), SpanCall(1, 0, 0, 2, 1)
    header, payload = opened(joined(frames.pack_span(6, asked, x, coded, 0.25)))
    assert (header.codec, header.error) == (codec, 0.25)
    found, back = frames.unpack_span(header, payload)
    assert found == asked
    assert relative_error(x, back) == pytest.approx(coded[1].error, rel=0.2)


def test_results_and_texts_survive_the_journey() -> None:
    y = np.arange(12, dtype=np.float32).reshape(3, 4)
    header, payload = opened(joined(frames.pack_result(9, 2, y, 77)))
    back, computed_us = frames.unpack_result(header, payload)
    assert np.array_equal(back, y)
    assert computed_us == 77
    header, payload = opened(joined(frames.pack_refusal(5, CacheLost("gone"))))
    assert isinstance(frames.refusal(payload), CacheLost)
    header, payload = opened(joined(frames.pack_refusal(5, PeerRefused("no"))))
    assert type(frames.refusal(payload)) is PeerRefused
    header, payload = opened(joined(frames.pack_text(Kind.ERROR, 5, {"message": "no"})))
    assert "no" in str(frames.refusal(payload))
    header, payload = opened(joined(frames.pack_text(Kind.ERROR, 5, {"message": "é" * 9999})))
    assert header.payload_bytes <= frames.TEXT_BYTES_MAX


def test_spans_survive_the_journey_and_freeing_is_a_header() -> None:
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    asked = SpanCall(number=1 << 31, position=99, first=4, stop=9, keep=2)
    header, payload = opened(joined(frames.pack_span(6, asked, x)))
    found, back = frames.unpack_span(header, payload)
    assert (header.kind, header.call_id, found) == (Kind.SPAN, 6, asked)
    assert np.array_equal(back, x)
    header, _payload = opened(joined(frames.pack_free(1 << 31)))
    assert (header.kind, header.call_id) == (Kind.FREE, 1 << 31)


def test_a_ping_is_a_header_and_no_more() -> None:
    frame = joined(frames.pack_ping(7))
    header, _payload = opened(frame)
    assert (header.kind, header.call_id, len(frame)) == (Kind.PING, 7, HEADER.size)
    for at in (6, 7, 12, 16, 24, 28):  # codec, flags, layer, rows, payload, error
        wrong = bytearray(frame)
        wrong[at] = 1
        with pytest.raises(FrameError):
            frames.parse_header(bytes(wrong))


@pytest.mark.parametrize(
    "wrong",
    [{"keep": 0}, {"keep": 4}, {"position": frames.POSITION_MAX - 2}],
    ids=lambda wrong: str(wrong),
)
def test_spans_that_cannot_be_are_refused(wrong) -> None:
    asked = SpanCall(**{"number": 1, "position": 0, "first": 0, "stop": 2, "keep": 1, **wrong})
    data = joined(frames.pack_span(6, asked, np.zeros((3, 4), np.float32)))
    with pytest.raises(FrameError, match="span"):
        frames.unpack_span(*opened(data))


def test_layers_beyond_any_model_are_refused_with_the_header() -> None:
    asked = SpanCall(1, 0, 1000, 1025, 1)
    with pytest.raises(FrameError, match="limits"):
        opened(joined(frames.pack_span(6, asked, np.zeros((1, 4), np.float32))))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_numbers_are_refused(value: float) -> None:
    x = np.full((2, 4), value, np.float32)
    header, payload = opened(joined(frames.pack_experts(1, 0, [0], x)))
    with pytest.raises(FrameError, match="NaN"):
        frames.unpack_experts(header, payload)


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.5])
def test_gate_weights_that_cannot_be_are_refused(value: float) -> None:
    x, gates = np.ones((2, 4), np.float32), np.array([[0.5], [value]], np.float32)
    header, payload = opened(joined(frames.pack_experts(1, 0, [3], x, gates)))
    with pytest.raises(FrameError, match="gate"):
        frames.unpack_experts(header, payload)


def test_an_expert_named_twice_is_refused() -> None:
    data = bytearray(joined(frames.pack_experts(1, 0, [1, 2], np.zeros((1, 4), np.float32))))
    data[HEADER.size : HEADER.size + 4] = b"\1\0\1\0"
    with pytest.raises(FrameError, match="twice"):
        frames.unpack_experts(*opened(bytes(data)))


def test_every_limit_is_enforced_before_anything_is_allocated() -> None:
    good = (b"CoEL", frames.VERSION, Kind.EXPERTS, 1, 0, 7, 0, 1, 1, 4, 4 + 16, 0.0)
    frames.parse_header(HEADER.pack(*good))
    for index, bad in (
        (0, b"HTTP"),
        (1, 1),
        (2, 77),
        (3, 9),
        (4, 1),
        (6, 65535),
        (7, 0),
        (7, 65535),
        (8, 0),
        (8, frames.ROWS_MAX + 1),
        (9, frames.HIDDEN_MAX + 1),
        (10, 4),
        (10, 0xFFFFFFFF),
        (11, -0.1),
        (11, 1.5),
        (11, float("nan")),
    ):
        values = list(good)
        values[index] = bad
        with pytest.raises(FrameError):
            frames.parse_header(HEADER.pack(*values))


def test_ten_thousand_mutated_frames_raise_nothing_but_frame_errors() -> None:
    rng = Random(7)
    x = np.ones((2, 8), np.float32)
    seeds = [
        joined(frames.pack_experts(1, 2, [3, 4], x)),
        joined(frames.pack_experts(1, 2, [3, 4], x, np.ones((2, 2), np.float32))),
        joined(frames.pack_result(1, 2, x)),
        joined(frames.pack_span(1, SpanCall(1, 5, 0, 8, 1), x)),
        joined(frames.pack_free(3)),
        joined(frames.pack_text(Kind.HELLO, 0, {"swarm": "s"})),
    ]
    accepted = 0
    for _ in range(10_000):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            header, payload = (
                frames.parse_header(data[: HEADER.size]),
                memoryview(data)[HEADER.size :],
            )
            if header.payload_bytes != len(payload):
                continue
            if header.kind is Kind.EXPERTS:
                frames.unpack_experts(header, payload)
            elif header.kind is Kind.RESULT:
                frames.unpack_result(header, payload)
            elif header.kind is Kind.SPAN:
                frames.unpack_span(header, payload)
            elif header.kind not in (Kind.FREE, Kind.PING):
                frames.unpack_text(payload)
            accepted += 1
        except FrameError:
            pass
    assert 0 < accepted < 10_000
