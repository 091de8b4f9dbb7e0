"""A small run of scripts/fuzz: it reaches every kind of frame and codec, and finds nothing."""

import fuzz
import pytest

from coeld.compression import wire
from coeld.datapath import frames
from coeld.datapath.frames import Kind


def test_twenty_thousand_damaged_frames_are_refused_or_keep_their_promises() -> None:
    seen = fuzz.fuzz(20_000, seed=1)
    wanted = {kind.name for kind in Kind} | {codec.name for codec in wire.available()}
    assert wanted <= set(seen)
    assert seen["refused"] > 5_000
    assert sum(seen.values()) == 20_000


def test_the_fuzzer_would_notice_a_parser_that_lets_nan_through(monkeypatch) -> None:
    monkeypatch.setattr(
        frames, "unpack_result", lambda header, payload: (fuzz.np.full((1, 1), fuzz.np.nan), 0)
    )
    with pytest.raises(fuzz.Broken):
        fuzz.fuzz(2_000, seed=1)
