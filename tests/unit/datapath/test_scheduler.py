"""The scheduler with a decoder that counts: fair turns, chunked prompts, every way to end."""

from random import Random

import numpy as np
import pytest

from coeld.datapath.costs import ANSWER
from coeld.datapath.request import PREFILL_CHUNK_TOKENS, Cancelled, LegLost, Request
from coeld.datapath.sampling import Sampling
from coeld.datapath.scheduler import LOSSES_MAX, Scheduler
from coeld.errors import NotCovered

VOCAB = 16


class Journey:
    """Nothing of the one before is left."""

    behind = 1.0
    stages = ()

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.freed = False

    @property
    def length(self) -> int:
        return len(self.tokens)

    def stop(self) -> None:
        return None

    def free(self) -> None:
        self.freed = True


class Learned:
    """Only counts the tokens that are learned from."""

    def __init__(self) -> None:
        self.answers = self.routes = 0

    def begin_token(self) -> None: ...

    def note(self, work, took_s: float) -> None:
        assert took_s >= 0
        self.answers += work == ANSWER


class CountingDecoder:
    """The next token is always the last one plus one; remembers what it was asked."""

    def __init__(self) -> None:
        self.passes: list[tuple[str, int]] = []
        self.raises: dict[str, Exception] = {}
        self.lost_after: list[int] = []
        """Passes after which a way is lost."""
        self.journeys: list[Journey] = []
        self.costs = Learned()

    def depart(self, before: Journey | None = None, ahead: None = None) -> Journey:
        if before is not None:
            before.free()
        self.journeys.append(Journey())
        return self.journeys[-1]

    def aside(self, _request: Request) -> None:
        return None

    def prefill(self, _journey: Journey, _request: Request) -> None:
        return None

    def forward(self, journey, tokens, rows, request):
        assert not journey.freed
        if self.lost_after and len(self.passes) == self.lost_after[0]:
            self.lost_after.pop(0)
            raise LegLost("gone")
        self.passes.append((request.id, len(tokens)))
        if request.id in self.raises:
            raise self.raises[request.id]
        journey.tokens += tokens
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
    scheduler = Scheduler(decoder)
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


def test_whoever_ends_gives_its_caches_back() -> None:
    decoder = CountingDecoder()
    decoder.raises["bad"] = NotCovered("missing", 7)
    scheduler = Scheduler(decoder)
    for name, tokens_max in (("good", 1), ("bad", 2), ("long", 9)):
        scheduler.submit(Request(name, [0], tokens_max, Notes()))
    scheduler.turn()
    assert [journey.freed for journey in decoder.journeys] == [True, True, False]
    scheduler.fail_all(NotCovered("closed", 0))
    assert (decoder.journeys[2].freed, scheduler.active) == (True, [])


@pytest.mark.parametrize("seed", range(50))
def test_a_lost_way_is_travelled_again_and_nothing_is_said_twice(seed: int) -> None:
    rng = Random(seed)
    prompt = [rng.randrange(VOCAB) for _ in range(rng.choice([1, 5, PREFILL_CHUNK_TOKENS + 3]))]
    decoder, notes = CountingDecoder(), Notes()
    decoder.lost_after = sorted(rng.randrange(60) for _ in range(rng.randint(1, 4)))
    request = Request("a", prompt, 12, notes)
    play(decoder, request)
    expected = [(prompt[-1] + 1 + step) % VOCAB for step in range(12)]
    assert notes.tokens == expected, f"seed={seed}"
    assert decoder.journeys[-1].tokens == (prompt + expected)[:-1], f"seed={seed}"
    assert all(journey.freed for journey in decoder.journeys)
    assert len(request.stalls_s) <= len(decoder.journeys) - 1


def test_greedy_answers_are_replayed_token_by_token_and_drawn_ones_in_chunks() -> None:
    for temperature, sizes in ((0.0, [2, 1, 1, 1, 2, 1, 1, 1, 1]), (1e-9, [2, 1, 1, 1, 2, 4])):
        decoder = CountingDecoder()
        decoder.lost_after = [4]
        play(decoder, Request("a", [0, 1], 5, Notes(), Sampling(temperature, seed=1)))
        assert [count for _id, count in decoder.passes] == sizes


def test_a_long_answer_is_not_replayed_token_by_token() -> None:
    decoder, scheduler = CountingDecoder(), None
    scheduler = Scheduler(decoder)
    request = Request("a", [0], 9, Notes())
    scheduler.submit(request)
    for _ in range(4):
        scheduler.turn()
    request.decode_s = 10.0
    decoder.lost_after = [4]
    while scheduler.active:
        scheduler.turn()
    assert [count for _id, count in decoder.passes] == [1, 1, 1, 1, 1, 4, 1, 1, 1, 1]


def test_a_request_that_gets_nowhere_fails_with_what_to_do() -> None:
    decoder, notes = CountingDecoder(), Notes()
    decoder.raises["a"] = LegLost("nobody there")
    play(decoder, Request("a", [0], 9, notes))
    assert isinstance(notes.end, NotCovered)
    assert "nobody there" in str(notes.end)
    assert len(decoder.journeys) == LOSSES_MAX + 1


def test_only_tokens_without_others_turns_in_them_tell_what_a_token_costs() -> None:
    decoder = CountingDecoder()
    play(decoder, Request("a", [0] * 5, 6, Notes()))
    assert decoder.costs.answers == 4, "from the second decoded token to the last"
    play(decoder, Request("b", [0], 6, Notes()), Request("c", [0], 6, Notes()))
    assert decoder.costs.answers == 4
    request = Request("a", [0], 6, Notes())
    scheduler = Scheduler(decoder)
    scheduler.submit(request)
    scheduler.turn()
    decoder.costs.routes += 1
    while scheduler.active:
        scheduler.turn()
    assert decoder.costs.answers == 4, "nor of who set out on other routes"
    decoder = CountingDecoder()
    decoder.lost_after = [3]
    play(decoder, Request("a", [0], 6, Notes()))
    assert decoder.costs.answers == 2, "nor with a replay in it"
