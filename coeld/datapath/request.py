"""One request: what was asked, what has been generated, why it ended."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from coeld.datapath.sampling import Sampling

FinishReason = Literal["stop", "length"]


@dataclass(slots=True)
class Request:
    """Owned by the scheduler's thread once submitted; `cancelled` may be set by any thread."""

    id: str
    prompt: list[int]
    """Token ids, at least one."""
    tokens_max: int
    """Tokens to generate at most; prompt and answer together fit the context."""
    sampling: Sampling = field(default_factory=Sampling)
    eos_tokens: frozenset[int] = frozenset()
    on_token: Callable[[int], bool] = lambda _token: False
    """Called with each generated token (end-of-turn excepted); True means: a stop string came."""
    cache: Any = None
    generator: Any = None
    generated: int = 0
    prefilled: int = 0
    """Prompt tokens already in the cache."""
    last: int = 0
    """The token to decode next."""
    prefill_s: float = 0.0
    decode_s: float = 0.0
    stalls_s: list[float] = field(default_factory=list)
    """Times this request waited for an expert without a reachable owner."""
    cancelled: threading.Event = field(default_factory=threading.Event)
