"""The scheduler with a decoder that counts: fair turns, chunked prompts, every way to end."""

import numpy as np

from coeld.datapath.request import Cancelled, Request
from coeld.datapath.scheduler import PREFILL_CHUNK_TOKENS, Scheduler
from coeld.errors import NotCovered

VOCAB = 16


class Cache:
    def __init__(self) -> None:
        self.length = 0
        self.freed = False

    def free(self) -> None:
        self.freed = True


class CountingDecoder:
    """The next token is always the last one plus one; remembers what it was asked."""

    def __init__(self) -> None:
        self.passes: list[tuple[str, int]] = []
        self.raises: dict[str, Exception] = {}

    def forward(self, cache, tokens, rows, request):
        self.passes.append((request.id, len(tokens)))
        if request.id in self.raises:
            raise self.raises[request.id]
        cache.length += len(tokens)
        logits = np.zeros((1, VOCAB), np.float32)
        logits[0, (tokens[-1] + 1) % VOCAB] = 1
        return logits


class Notes:
    def __init__(self, stop_at: int = -1) -> None:
        self.tokens: list[int] = []
        self.end: object = None
        self.stop_at = stop_at

    def token(self, token: int) -> bool:
        self.tokens.append(token)
        return token == self.stop_at

    def done(self, request, reason) -> None:
        self.end = reason

    def failed(self, request, error) -> None:
        self.end = error


def play(decoder, *requests: Request) -> None:
    scheduler = Scheduler(decoder, Cache)
    for request in requests:
        scheduler.submit(request)
    while scheduler.active:
        scheduler.turn()


def test_an_answer_ends_at_its_length() -> None:
    notes = Notes()
    play(CountingDecoder(), Request("a", [0], 3, notes))
    assert notes.tokens == [1, 2, 3]
    assert notes.end == "length"


def test_end_of_turn_ends_an_answer_and_is_not_shown() -> None:
    notes = Notes()
    play(CountingDecoder(), Request("a", [0], 9, notes, eos_tokens=frozenset({3})))
    assert notes.tokens == [1, 2]
    assert notes.end == "stop"


def test_a_stop_string_ends_an_answer() -> None:
    notes = Notes(stop_at=2)
    play(CountingDecoder(), Request("a", [0], 9, notes))
    assert (notes.tokens, notes.end) == ([1, 2], "stop")


def test_a_long_prompt_comes_in_chunks_between_the_tokens_of_others() -> None:
    decoder = CountingDecoder()
    long = Request("long", [0] * (2 * PREFILL_CHUNK_TOKENS + 5), 1, Notes())
    play(decoder, Request("short", [0], 4, Notes()), long)
    assert decoder.passes == [
        ("short", 1),
        ("long", PREFILL_CHUNK_TOKENS),
        ("short", 1),
        ("long", PREFILL_CHUNK_TOKENS),
        ("short", 1),
        ("long", 5),
        ("short", 1),
    ]


def test_one_request_that_fails_does_not_touch_the_others() -> None:
    decoder = CountingDecoder()
    decoder.raises["bad"] = NotCovered("missing", 7)
    decoder.raises["gone"] = Cancelled()
    bad, good, gone = Notes(), Notes(), Notes()
    play(
        decoder,
        Request("bad", [0], 2, bad),
        Request("good", [0], 2, good),
        Request("gone", [0], 2, gone),
    )
    assert isinstance(bad.end, NotCovered)
    assert good.end == "length"
    assert gone.end is None


def test_a_cancelled_request_leaves_without_another_pass() -> None:
    decoder, notes = CountingDecoder(), Notes()
    request = Request("a", [0], 9, notes)
    request.cancelled.set()
    play(decoder, request)
    assert decoder.passes == []
    assert notes.end is None


def test_whoever_ends_gives_its_cache_back() -> None:
    caches: list[Cache] = []

    def new_cache() -> Cache:
        caches.append(Cache())
        return caches[-1]

    decoder = CountingDecoder()
    decoder.raises["bad"] = NotCovered("missing", 7)
    scheduler = Scheduler(decoder, new_cache)
    for name, tokens_max in (("good", 1), ("bad", 2), ("long", 9)):
        scheduler.submit(Request(name, [0], tokens_max, Notes()))
    scheduler.turn()
    assert [cache.freed for cache in caches] == [True, True, False]
    scheduler.fail_all(NotCovered("closed", 0))
    assert (caches[2].freed, scheduler.active) == (True, [])
