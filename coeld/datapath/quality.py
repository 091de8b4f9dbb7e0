"""What a request's rows may lose on the wire, and what they did lose. Pure.

A request may cost its answer `kl_budget` nats per token (mean KL of its predictions); 0, the
default, is exact: rows travel as float32 and answers have the bits of one device. The budget is
shared out equally over the transfers that a token makes, two for every layer whose experts are not
all here (`coeld.compression.transfer`). Senders compute the error of what they encode, so what was
spent is a sum of what happened, with the sensitivity of a typical layer; it is reported with the
answer. Rows of spans, the residual stream, always travel whole.
"""

from dataclasses import dataclass

from coeld.compression.transfer import SENSITIVITY, error_allowed

Errors = tuple[float, float]
"""Relative errors that are allowed, or were made: of rows on their way out, of results back."""
EXACT: Errors = (0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Traffic:
    """One call's rows."""

    sent_bytes: int = 0
    received_bytes: int = 0
    errors: Errors = EXACT


@dataclass(slots=True)
class Quality:
    """Of one request."""

    kl_budget: float = 0.0
    errors: Errors = EXACT
    """What the calls of the present pass may err."""
    rows_bytes: int = 0
    """Rows sent and received, as they were encoded."""
    float32_bytes: int = 0
    """The same rows as float32."""
    tokens: int = 0
    kl_sum: float = 0.0
    """Estimated, over all tokens."""

    def begin(self, tokens: int, layers: int) -> None:
        """A pass of `tokens` begins, in which `layers` may need peers."""
        error = error_allowed(self.kl_budget, 2 * layers) if layers else 0.0
        self.errors = error, error
        self.tokens += tokens

    def count(self, traffic: Traffic, rows: int, hidden: int, branches: int) -> None:
        """A call for one of a layer's `branches` has been answered."""
        self.rows_bytes += traffic.sent_bytes + traffic.received_bytes
        self.float32_bytes += 8 * rows * hidden
        out, back = traffic.errors
        self.kl_sum += SENSITIVITY * (out * out + back * back) * rows / branches

    @property
    def kl_estimate(self) -> float:
        """Nats per token."""
        return self.kl_sum / self.tokens if self.tokens else 0.0
