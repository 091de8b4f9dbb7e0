"""Every error a user or a peer can see, as one tree.

    CoeldError
    ├── ConfigError         a key of the configuration is unknown or out of range
    ├── StartError          the daemon cannot start: address or socket in use, path too long
    ├── ModelError
    │   ├── UnknownModel    no such model in the catalogue or in the store
    │   ├── BadModelFile    truncated, corrupt or foreign
    │   ├── UnsupportedModel  a well-formed file with an architecture or type coeld cannot run
    │   ├── BadChecksum     the bytes are not the ones that were asked for
    │   ├── FetchFailed     the download did not work
    │   ├── DiskFull        no room to import, or to put weights together
    │   └── BudgetTooSmall  no choice of widths fits; says the smallest that does
    ├── RequestError        the caller's mistake (HTTP 4xx)
    │   ├── BadRequest
    │   └── ContextTooLong
    ├── Unavailable         not now (HTTP 503)
    │   ├── NotCovered      some experts have no owner; says how many bytes are missing
    │   ├── NoModel         nothing is installed, or it cannot be opened
    │   │   └── Starting    the engine or its model is being loaded; it ends by itself
    │   ├── Overloaded      too many requests at once
    │   ├── Updating        a new version of the model is being rolled out
    │   └── EngineGone      the engine process died; the agent restarts it
    └── PeerError           between devices; never shown to users as such
        ├── PeerGone        connection refused or lost
        ├── PeerSlow        no answer before the deadline
        ├── PeerRefused     the peer answered with an error (it does not hold that lot, …)
        │   └── CacheLost   the peer no longer has the keys and values of that request
        └── FrameError      bytes that are not a valid frame or message

The text of every error says what happened, what it means and what to do. Programming mistakes
are assertions, not part of this tree.
"""


class CoeldError(Exception):
    """Base of everything coeld raises on purpose."""


class ConfigError(CoeldError):
    """A configuration key is unknown, has the wrong type, or is out of range."""


class StartError(CoeldError):
    """The daemon cannot start on this machine as configured."""


class ModelError(CoeldError):
    """Something is wrong with a model, its file or the store."""


class UnknownModel(ModelError):
    """No model of that name."""


class BadModelFile(ModelError):
    """Truncated, corrupt or foreign."""


class UnsupportedModel(ModelError):
    """Well-formed, but not something coeld can run."""


class BadChecksum(ModelError):
    """The bytes are not the ones that were asked for."""


class FetchFailed(ModelError):
    """The download did not work."""


class DiskFull(ModelError):
    """No room left for files."""


class BudgetTooSmall(ModelError):
    """Even the narrowest weights are too many for the budget."""

    def __init__(self, budget_bytes: int, smallest_bytes: int) -> None:
        super().__init__(
            f"a budget of {budget_bytes / 1e6:.2f} MB is too small: with every expert at its "
            f"fewest bits the model has {smallest_bytes / 1e6:.2f} MB of weights. Give at least "
            f"{-(-smallest_bytes // 1000)}kB, or narrow the rest with --trunk-bits 4."
        )
        self.smallest_bytes = smallest_bytes


class RequestError(CoeldError):
    """The caller's mistake. `param` names the offending field, `code` is OpenAI's error code."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class BadRequest(RequestError):
    """A field is missing, has the wrong type or is out of range."""


class ContextTooLong(RequestError):
    """The prompt does not fit into the context."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message, param, "context_length_exceeded")


class Unavailable(CoeldError):
    """Cannot be answered now; asking again later may work."""


class NotCovered(Unavailable):
    """Some experts have no owner in the swarm."""

    def __init__(self, message: str, missing_bytes: int) -> None:
        super().__init__(message)
        self.missing_bytes = missing_bytes


class NoModel(Unavailable):
    """No model is installed, or it cannot be opened."""


class Starting(NoModel):
    """The engine starts or loads its model: a few seconds more."""


class Overloaded(Unavailable):
    """Too many requests at once."""


class Updating(Unavailable):
    """This device begins no requests until it has the new version of its model."""


class EngineGone(Unavailable):
    """The engine process died in the middle of the request."""


class PeerError(CoeldError):
    """Between devices. Callers retry elsewhere; users see it only when nothing is left to try."""


class PeerGone(PeerError):
    """Connection refused or lost."""


class PeerSlow(PeerError):
    """No answer before the deadline."""


class PeerOwes(PeerSlow):
    """The peer owes too many answers to be called now. That is no failure: each of these has its
    own deadline."""


class PeerRefused(PeerError):
    """The peer answered with an error."""


class CacheLost(PeerRefused):
    """The peer has no keys and values of this request at this position: they are rebuilt from the
    request's tokens."""


class FrameError(PeerError):
    """Bytes that are not a valid frame or message."""
