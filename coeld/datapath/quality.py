"""What a request's rows may lose on the wire, and what they did lose. Pure.

A request may cost its answer `kl_budget` nats per token (mean KL of its predictions); 0, the
default, is exact: rows travel as float32 and answers have the bits of one device. The budget is
shared out equally over the transfers that a token makes: two for every layer whose experts are not
all here, two for every leg elsewhere (`coeld.compression.transfer`). Senders compute the error of
what they encode, so what was spent is a sum of what happened, times the sensitivity of the place;
it is reported with the answer. Where experts are chosen by a router, pairs of a row and an expert
whose gate weight is next to nothing are left out first, within a part of what results may err.
"""

from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from coeld.compression import pruning
from coeld.compression.rotation import Rows
from coeld.compression.transfer import SENSITIVITY_HOP, Coded, error_allowed, sensitivity
from coeld.compression.wire import ERROR_MAX

Gates = NDArray[np.float32]
Errors = tuple[float, float]
"""Relative errors that are allowed, or were made: of rows on their way out, of results back."""
EXACT: Errors = (0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Traffic:
    """One call's rows."""

    sent_bytes: int = 0
    received_bytes: int = 0
    errors: Errors = EXACT

    @staticmethod
    def out(x: Rows, coded: Coded | None) -> "Traffic":
        """Of a call that sends rows x as they were coded; None: as they are."""
        if coded is None:
            return Traffic(x.nbytes)
        _codec, encoded = coded
        return Traffic(encoded.size, 0, (encoded.error, 0.0))

    def back(self, received_bytes: int, error: float) -> "Traffic":
        """Of the same call with its answer."""
        return Traffic(self.sent_bytes, received_bytes, (self.errors[0], error))


@dataclass(slots=True)
class Quality:
    """Of one request."""

    kl_budget: float = 0.0
    rows_bytes: int = 0
    """Rows sent and received, as they were encoded."""
    float32_bytes: int = 0
    """The same rows as float32."""
    pruned_pairs: int = 0
    """Rows that an expert they chose was not asked about."""
    tokens: int = 0
    kl_sum: float = 0.0
    """Estimated, over all tokens."""
    layers: int = 0
    """Of the model."""
    transfers: int = 0
    """That each token of the present pass may make; 0 in exact mode."""

    def begin(self, tokens: int, layers: int, cuts: int, hops: int) -> None:
        """A pass of `tokens` through `layers` begins, of which `cuts` may need peers; `hops` legs
        are elsewhere."""
        self.layers, self.transfers = layers, 2 * (cuts + hops)
        self.tokens += tokens

    def errors(self, layer: int) -> Errors:
        """What calls for the experts of a layer may err."""
        return self._allowed(sensitivity(layer, self.layers)) if self.transfers else EXACT

    def hop_errors(self) -> Errors:
        """What a leg elsewhere may err."""
        return self._allowed((SENSITIVITY_HOP, SENSITIVITY_HOP)) if self.transfers else EXACT

    def prune(self, layer: int, gates: Gates) -> tuple[Gates, Errors]:
        """Gate weights (n, experts) of a layer without those that hardly count, and what its calls
        may still err. The others keep their weights."""
        out, back = self.errors(layer)
        keep = pruning.kept(gates, back * sqrt(pruning.SHARE))
        dropped = int(np.count_nonzero(gates[~keep]))
        if not dropped:
            return gates, (out, back)
        error = pruning.error_of(gates, keep)
        self.pruned_pairs += dropped
        self.kl_sum += sensitivity(layer, self.layers)[1] * error * error * len(gates)
        return np.where(keep, gates, np.float32(0)), (out, sqrt(back * back - error * error))

    def count(self, layer: int, traffic: Traffic, rows: int, hidden: int, branches: int) -> None:
        """A call for one of a layer's `branches` has been answered."""
        c = sensitivity(layer, self.layers) if traffic.errors != EXACT else EXACT
        self._add(traffic, c, rows / branches, 2 * rows * hidden)

    def count_hop(self, traffic: Traffic, rows: int, values: int) -> None:
        """A leg elsewhere has been answered; `values` went there and came back."""
        self._add(traffic, (SENSITIVITY_HOP, SENSITIVITY_HOP), rows, values)

    def also(self, other: "Quality") -> None:
        """Passes of the same request that were counted apart."""
        self.rows_bytes += other.rows_bytes
        self.float32_bytes += other.float32_bytes
        self.pruned_pairs += other.pruned_pairs
        self.tokens += other.tokens
        self.kl_sum += other.kl_sum

    def _allowed(self, c: tuple[float, float]) -> Errors:
        out, back = (error_allowed(self.kl_budget, self.transfers, each) for each in c)
        return min(out, ERROR_MAX), min(back, ERROR_MAX)

    def _add(self, traffic: Traffic, c: tuple[float, float], rows: float, values: int) -> None:
        self.rows_bytes += traffic.sent_bytes + traffic.received_bytes
        self.float32_bytes += 4 * values
        out, back = traffic.errors
        self.kl_sum += rows * (c[0] * out * out + c[1] * back * back)

    @property
    def kl_estimate(self) -> float:
        """Nats per token."""
        return self.kl_sum / self.tokens if self.tokens else 0.0
