"""One request: what was asked, what has been generated, and who listens."""

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, Protocol

import numpy as np

from coeld.datapath.journey import Journey
from coeld.datapath.quality import Quality
from coeld.datapath.sampling import Sampling
from coeld.datapath.split import Split
from coeld.errors import CoeldError

if TYPE_CHECKING:
    from coeld.datapath.catch_up import CatchUp

PREFILL_CHUNK_TOKENS: Final = 128
"""Larger chunks prefill no faster (docs/log.md), make others wait longer, and a prompt of one chunk
is at one device at a time."""
FinishReason = Literal["stop", "length"]


class Cancelled(Exception):
    """The request was cancelled while it waited: not an error, the caller gave up."""


class LegLost(Exception):
    """The request's way cannot be followed any further: its caches have to be rebuilt from its
    tokens, along another way."""


class Listener(Protocol):
    """Told about one request's progress, from the decoder's thread; must not block."""

    def token(self, token: int) -> bool:
        """A generated token (never end-of-turn). True: a stop string was completed, end here."""
        ...

    def done(self, request: "Request", reason: FinishReason) -> None: ...

    def failed(self, request: "Request", error: CoeldError) -> None: ...


@dataclass(slots=True)
class Request:
    """Owned by the scheduler once submitted; only `cancelled` may be touched by other threads."""

    id: str
    prompt: list[int]
    """Token ids, at least one."""
    tokens_max: int
    """Tokens to generate at most; prompt and answer together fit the context."""
    listener: Listener
    sampling: Sampling = field(default_factory=Sampling)
    eos_tokens: frozenset[int] = frozenset()
    journey: Journey | None = None
    astray: bool = False
    """Its journey cannot go on: another has to mend it."""
    catching: "CatchUp | None" = None
    """Another that catches up beside it, to go over to."""
    patient_until_s: float = 0.0
    """Until then a late leg is waited for without looking for another way: the last look was in
    vain."""
    generator: np.random.Generator = field(default_factory=np.random.default_rng)
    tokens: list[int] = field(default_factory=list)
    """The prompt and what was generated: all that is needed to begin again elsewhere."""
    cached: int = 0
    """How many of them the caches hold."""
    exact: bool = True
    """Whether generated tokens are replayed one by one, which gives the bits of an undisturbed
    run, or in chunks."""
    losses: int = 0
    """How often its way was lost since its last token."""
    lost_since_s: float | None = None
    prefill_s: float = 0.0
    """Of its own prompt's chunks."""
    decode_s: float = 0.0
    """From its first token to its last, the turns of others included: what a reader sees."""
    decoding_since_s: float = 0.0
    stepped: tuple[float, float, int, int] | None = None
    """After its last decoded token, if nobody else had a turn: when that was, seconds and cuts of
    `split` by then, and how often it had waited."""
    routes: int = 0
    """Which routes it set out on; see coeld.datapath.costs."""
    stalls_s: list[float] = field(default_factory=list)
    """How long it waited, each time an expert had no reachable owner."""
    split: Split = field(default_factory=Split)
    """Of the present phase."""
    prefill_split: Split = field(default_factory=Split)
    quality: Quality = field(default_factory=Quality)
    """What its rows may lose at peers, and have."""
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def generated(self) -> int:
        return max(0, len(self.tokens) - len(self.prompt))

    @property
    def replay_s(self) -> float:
        """What it takes to run it again so far, at the pace until now without its stalls."""
        return max(0.0, self.prefill_s + self.decode_s - sum(self.stalls_s))

    def next_tokens(self, at: int, stop: int | None, exact: bool) -> list[int]:
        """What caches of `at` tokens lack next, at most to `stop`. A prompt's chunks are the same
        on every way; what was generated comes one by one if that has to be `exact`."""
        prompt = len(self.prompt)
        if at < prompt:
            return self.prompt[at : at + PREFILL_CHUNK_TOKENS]
        end = at + (1 if exact else PREFILL_CHUNK_TOKENS)
        return self.tokens[at : min(end, stop or end)]

    def check(self) -> None:
        """Raise Cancelled if it was."""
        if self.cancelled.is_set():
            raise Cancelled
