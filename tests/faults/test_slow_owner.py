"""A device that turns ten times slower while it answers, with a replica: real engines, one decoder.

The decoder holds nothing, two owners hold every expert. The one that the route table names first
is stopped for nine tenths of the time (SIGSTOP, SIGCONT), as if another program took its processor.
Prints what a token takes before, just after, and five seconds later.
"""

import os
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from tests.conftest import REAL_MODEL
from tests.harness.engine import Engine, swarm_with_table

pytestmark = [pytest.mark.model, pytest.mark.swarm]

DECODER, FIRST, SECOND = (digit * 16 for digit in "abc")
PERIOD_S = 0.05
SHARE = 0.1
TOKENS = 40
LOOK_S = 8.0


@contextmanager
def slowed(pid: int) -> Iterator[None]:
    """Let a process run for SHARE of the time only."""
    end = threading.Event()

    def cycle() -> None:
        while not end.is_set():
            os.kill(pid, signal.SIGSTOP)
            end.wait(PERIOD_S * (1 - SHARE))
            os.kill(pid, signal.SIGCONT)
            end.wait(PERIOD_S * SHARE)

    thread = threading.Thread(target=cycle, name="test.slow")
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def token_times(engine: Engine, ident: str, tokens: int) -> tuple[str, list[tuple[float, float]]]:
    """The text, and for every token when it came and how long after the one before."""
    engine.generate(ident, prompt="The sky is blue because", max_tokens=tokens)
    text, times, last_s = "", [], None
    while (message := engine.hear("token", "done", "error"))["ev"] == "token":
        now_s = time.monotonic()
        if last_s is not None:
            times.append((now_s, now_s - last_s))
        text, last_s = text + message["text"], now_s
    assert message["ev"] == "done", message
    return text, times


def test_an_owner_that_turns_ten_times_slower_is_left_for_its_replica(real_store) -> None:
    manifest = real_store.manifest(REAL_MODEL)
    lots = manifest.demand().lots()
    table, engines = swarm_with_table(
        real_store.root, manifest, {DECODER: [], FIRST: lots, SECOND: lots}
    )
    try:
        decoder = engines[DECODER]
        both = replace(table, epoch=2, owners=dict.fromkeys(lots, (FIRST, SECOND)))
        decoder.say("routes", table=both.to_json())
        undisturbed, before = token_times(decoder, "before", TOKENS)
        with slowed(engines[FIRST].process.pid):
            began_s = time.monotonic()
            during = []
            for turn in range(50):
                text, times = token_times(decoder, f"during {turn}", TOKENS)
                assert text == undisturbed
                during += times
                if time.monotonic() - began_s > LOOK_S:
                    break
        decoder.say("stats")
        peers = decoder.hear("stats")["peers"]
        after, ago = token_times(decoder, "after", TOKENS)
        assert after == undisturbed
    finally:
        for engine in engines.values():
            engine.close()
    usual_ms = 1000 * statistics.mean(s for _at, s in before)
    early = [s for at, s in during if at - began_s < 5]
    late_ms = 1000 * statistics.mean(s for at, s in during if at - began_s >= 5)
    print(
        f"\nms per token: {usual_ms:.1f} before, {1000 * statistics.mean(early):.1f} in the first "
        f"5 s ({1000 * max(early):.0f} at most), {late_ms:.1f} after 5 s "
        f"({late_ms / usual_ms - 1:+.0%}), {1000 * statistics.mean(s for _at, s in ago):.1f} when "
        f"it is quick again; {peers}"
    )
    assert peers[FIRST]["late"] > 0
    assert peers[SECOND]["calls"] > peers[FIRST]["late"]
