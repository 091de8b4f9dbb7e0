"""What a request becomes on its way to the agent: tokens in, pieces of text and an end out."""

from typing import TYPE_CHECKING

from coeld.datapath.request import FinishReason, Request
from coeld.engine.protocol import error_to_json
from coeld.engine.text import Stream
from coeld.errors import CoeldError
from coeld.model.narrow import NARROW_BITS

if TYPE_CHECKING:
    from coeld.engine.process import Engine


class Answer:
    """Turns one request's tokens into text for the agent."""

    stream: Stream

    def __init__(self, engine: "Engine", ident: str) -> None:
        self._engine = engine
        self._ident = ident
        self._narrow = 0

    def token(self, token: int) -> bool:
        self._engine.usage.tokens += 1
        self._narrow = max(self._narrow, self._engine.narrow)
        text, stopped = self.stream.push(token)
        if text:
            self._engine.said(self._ident, text)
        return stopped

    def done(self, request: Request, reason: FinishReason) -> None:
        rest = self.stream.flush()
        if rest:
            self._engine.said(self._ident, rest)
        self._engine.ended(
            self._ident,
            "done",
            finish_reason=reason,
            prompt_tokens=len(request.prompt),
            completion_tokens=request.generated,
            prefill_s=round(request.prefill_s, 6),
            decode_s=round(request.decode_s, 6),
            prefill_split=request.prefill_split.to_json(),
            decode_split=request.split.to_json(),
            stalls=[round(stall_s, 3) for stall_s in request.stalls_s],
            wire={
                "kl_budget": request.quality.kl_budget,
                "kl_estimate": round(request.quality.kl_estimate, 6),
                "rows_bytes": request.quality.rows_bytes,
                "float32_bytes": request.quality.float32_bytes,
                "pruned_pairs": request.quality.pruned_pairs,
            },
            narrow={
                "experts": max(self._narrow, self._engine.narrow),
                "of": self._engine.experts,
                "bits": NARROW_BITS,
            },
        )

    def failed(self, request: Request, error: CoeldError) -> None:
        self._engine.ended(self._ident, "error", **error_to_json(error))
