"""coeld's errors as HTTP answers in OpenAI's form. Pure."""

from dataclasses import dataclass, field
from typing import Any, Final

from coeld.errors import CoeldError, NotCovered, RequestError, Unavailable, UnknownModel

RETRY_AFTER_S: Final = 2


@dataclass(frozen=True, slots=True)
class Failure:
    """Status, body and headers."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)


def failure(exc: CoeldError) -> Failure:
    """400 for the caller's mistakes, 404 for unknown models, 503 for "not now"."""
    text = str(exc)
    if isinstance(exc, RequestError):
        return plain(400, text, "invalid_request_error", exc.param, exc.code)
    if isinstance(exc, UnknownModel):
        return plain(404, text, "invalid_request_error", "model", "model_not_found")
    if isinstance(exc, Unavailable):
        found = plain(503, text, "unavailable_error", None, _code(exc))
        if isinstance(exc, NotCovered):
            found.body["error"]["missing_bytes"] = exc.missing_bytes
        return Failure(503, found.body, {"Retry-After": str(RETRY_AFTER_S)})
    return plain(500, text, "server_error", None, _code(exc))


def plain(
    status: int, message: str, kind: str, param: str | None = None, code: str | None = None
) -> Failure:
    """Any error in OpenAI's form."""
    error = {"message": message, "type": kind, "param": param, "code": code}
    return Failure(status, {"error": error})


def _code(exc: CoeldError) -> str:
    """NotCovered becomes "not_covered"."""
    name = type(exc).__name__
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")
