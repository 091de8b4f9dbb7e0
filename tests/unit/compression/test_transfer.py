"""Choosing a codec: never worse than allowed, small where it pays, fine where it does not."""

import numpy as np
import pytest

from coeld.compression.prediction import Past
from coeld.compression.transfer import (
    SENSITIVITY,
    WIRED,
    LinkSpeed,
    bits_expected,
    encode_for,
    encode_within,
    error_allowed,
    fuse_within,
    leaves_past,
    ranked,
    received,
    sensitivity,
)
from coeld.compression.wire import EXACT, STEPS, Codec, decode, relative_error

LAN = LinkSpeed(0.0003, 125e6)
WIFI = LinkSpeed(0.004, 37e6)
FAR = LinkSpeed(0.02, 2.5e6)


@pytest.mark.parametrize("link", [LAN, WIFI, FAR])
@pytest.mark.parametrize("rows", [1, 256])
def test_exact_mode_sends_at_least_16_bits(link: LinkSpeed, rows: int) -> None:
    for codec in ranked(WIRED, link, rows, 1024, 0.0):
        assert codec in EXACT
        assert bits_expected(codec, rows, 1024, 0.0) >= 16


def test_one_row_travels_whole_and_a_prompt_small() -> None:
    error = error_allowed(0.02, 60, SENSITIVITY[0])
    assert ranked(WIRED, WIFI, 1, 1024, error)[0] is Codec.FLOAT32
    for link in (WIFI, FAR):
        assert ranked(WIRED, link, 256, 1024, error)[0] not in EXACT
    assert ranked(WIRED, FAR, 256, 1024, error)[0] in STEPS


def test_a_faster_link_never_gets_a_coarser_codec() -> None:
    error = error_allowed(0.02, 60, SENSITIVITY[0])
    bits = [
        bits_expected(ranked(WIRED, LinkSpeed(0.002, speed), 256, 1024, error)[0], 256, 1024, error)
        for speed in (1e5, 1e6, 1e7, 1e8, 1e9, 1e10)
    ]
    assert bits == sorted(bits)


def test_the_budget_adds_up() -> None:
    errors = [error_allowed(0.02, 60, c) for c in np.linspace(0.05, 2, 60)]
    spent = sum(c * e * e for c, e in zip(np.linspace(0.05, 2, 60), errors, strict=True))
    assert spent == pytest.approx(0.02)
    assert error_allowed(0.0, 60, 0.2) == 0


def test_first_and_last_layers_are_more_sensitive_than_those_between() -> None:
    first, *between, last = (sensitivity(layer, 30) for layer in range(30))
    assert set(between) == {SENSITIVITY}
    assert min(first) > max(SENSITIVITY)
    assert min(last) > max(first)
    assert sensitivity(0, 1) == last


SLOW = LinkSpeed(0.02, 1e6)


def test_rows_are_predicted_on_slow_links_only_and_arrive_within_the_error_allowed() -> None:
    rng = np.random.default_rng(1)
    x, change = rng.standard_normal((2, 64, 576)).astype(np.float32)
    first = encode_for(SLOW, x, 0.05)
    assert first is not None
    assert first[0] in STEPS
    assert leaves_past(SLOW, first)
    assert not leaves_past(LinkSpeed(0.02, 2e7), first)
    past = Past(received(x, first), change)
    following = x + 0.2 * change + 0.1 * rng.standard_normal(x.shape).astype(np.float32)
    second = encode_for(SLOW, following, 0.05, past)
    assert second is not None
    assert second[0] is Codec.STEPS_AHEAD
    assert second[1].size < first[1].size * 0.8
    assert relative_error(following, received(following, second, past)) <= 0.05
    assert leaves_past(SLOW, second)
    # Others' rows, or exact ones, are not predicted.
    unlike = encode_for(SLOW, rng.standard_normal(x.shape).astype(np.float32), 0.05, past)
    assert unlike is not None
    assert unlike[0] is not Codec.STEPS_AHEAD
    assert encode_for(SLOW, following, 0.0, past) is None
    assert np.array_equal(received(following, None), following)


@pytest.mark.parametrize("seed", range(40))
def test_what_is_sent_is_within_the_error_allowed(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((6, 192)) * np.exp(2 * rng.standard_normal(192))).astype(np.float32)
    error = float(np.exp(rng.uniform(-9, -1)))
    link = (LAN, WIFI, FAR)[seed % 3]
    codec, encoded = encode_within(ranked(WIRED, link, 200, 192, error), x, error)
    out = np.empty_like(x)
    decode(codec, b"".join(encoded.pieces), out)
    assert relative_error(x, out) <= max(error, 3e-4) * 1.001


def test_rows_beyond_half_precision_travel_whole_in_exact_mode() -> None:
    x = np.full((2, 8), 1e6, np.float32)
    codec, encoded = encode_within([Codec.FLOAT16], x, 0.0)
    assert codec is Codec.FLOAT32
    assert encoded.error == 0


@pytest.mark.parametrize("seed", range(20))
def test_fusion_takes_no_more_of_the_error_than_it_leaves_for_the_codec(seed: int) -> None:
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((4, 64))
    x = centres[rng.integers(4, size=50)] + rng.choice([0.005, 0.3]) * rng.standard_normal((50, 64))
    error = float(rng.uniform(0.02, 0.3))
    fused, left = fuse_within(x.astype(np.float32), error, 0.05)
    assert fused.error**2 + left**2 <= error**2 * (1 + 1e-6)
    assert left >= error * 0.5**0.5 * (1 - 1e-6)
    assert len(fused.leaders) <= 50


def test_a_row_alone_is_not_fused() -> None:
    fused, left = fuse_within(np.ones((1, 64), np.float32), 0.1, 0.1)
    assert (len(fused.leaders), left) == (1, 0.1)
