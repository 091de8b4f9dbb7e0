"""A device that turns ten times slower while it answers, with a replica: real engines, one decoder.

The decoder holds nothing, two owners hold every expert. The one that the route table names first
is stopped for nine tenths of the time (SIGSTOP, SIGCONT), as if another program took its processor.
Prints what a token takes just after that and five seconds later, when answers alternate between
these routes and ones that name the quick owner alone: what a slow device costs is the difference.
"""

import itertools
import os
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from coeld.routes import RouteTable
from tests.conftest import REAL_MODEL
from tests.harness.engine import Engine, swarm_with_table

pytestmark = [pytest.mark.model, pytest.mark.swarm]

DECODER, FIRST, SECOND = (digit * 16 for digit in "abc")
PERIOD_S = 0.05
SHARE = 0.1
TOKENS = 40
LOOK_S = 5.0
ROUNDS = 3


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
        both = replace(table, owners=dict.fromkeys(lots, (FIRST, SECOND)))
        quick = replace(table, owners=dict.fromkeys(lots, (SECOND,)))
        epochs = itertools.count(2)

        def answer(routes: RouteTable) -> list[float]:
            decoder.say("routes", table=replace(routes, epoch=next(epochs)).to_json())
            text, times = token_times(decoder, f"{next(epochs)}", TOKENS)
            assert text == undisturbed
            return [seconds for _at, seconds in times]

        decoder.say("routes", table=replace(both, epoch=1).to_json())
        undisturbed, _times = token_times(decoder, "first", TOKENS)
        with slowed(engines[FIRST].process.pid):
            began_s, early = time.monotonic(), []
            while time.monotonic() - began_s < LOOK_S:
                early += answer(both)
            late, ideal = [], []
            for _ in range(ROUNDS):
                late += answer(both)
                ideal += answer(quick)
        answer(both)
        decoder.say("stats")
        peers = decoder.hear("stats")["peers"]
    finally:
        for engine in engines.values():
            engine.close()
    late_ms, ideal_ms = 1000 * statistics.mean(late), 1000 * statistics.mean(ideal)
    print(
        f"\nms per token while one of two owners is slow: {1000 * statistics.mean(early):.1f} in "
        f"the first {LOOK_S:g} s ({1000 * max(early):.0f} at most), then {late_ms:.1f}; "
        f"{ideal_ms:.1f} with the quick one alone ({late_ms / ideal_ms - 1:+.1%}); {peers}"
    )
    assert peers[FIRST]["late"] > 0
    assert peers[SECOND]["calls"] > peers[FIRST]["late"]
