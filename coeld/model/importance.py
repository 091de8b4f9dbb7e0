"""How much each expert matters: what the model loses when it alone is stored in few bits.

A text runs through the model layer by layer, as at import. Each expert's output is compared with
what it would be at each width, on the rows it is given: the squared error, times the gate weight
squared, is what reaches the residual. But an error of one size does not hurt alike everywhere: the
first layers' and the last's weigh more, and the one token that all others attend to carries values
a thousand times larger. So each layer's error is also followed to the end: a copy of the hidden
states in which that layer's experts have `PROBE_BITS`, and all other weights are exact, goes along
through the remaining layers, and its predictions are compared with the exact ones. The divergence
(Kullback-Leibler, nats per token) is then shared out in proportion to the squared errors, to which
small divergences are proportional. Rows whose error is far larger than the others' (`LOUD`) get
a copy of their own, so that neither hides the other.

The sum over experts thus predicts the divergence of the whole model, as far as errors are small and
independent. Every expert also counts as if one average row more had reached it, so that one
that the text never reaches is unimportant, and not free.

Values are rounded to `DIGITS`: the noise of float sums between machines must not choose other
widths, for devices work together only with the same weights.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from coeld.compression.quantize import WIDTHS, dequantize, quantize
from coeld.errors import BadRequest, UnsupportedModel
from coeld.model.calibration import (
    Calibration,
    Doubles,
    Floats,
    Weights,
    neurons,
    rms_norm,
    swiglu,
    times,
)
from coeld.model.families.blueprint import Blueprint
from coeld.model.manifest import Activation
from coeld.model.statistics import Statistics

TOKENS_MAX: Final = 1024
"""Of the text, in `PIECES` from all over it."""
PIECES: Final = 4
TOKENS_MIN: Final = 64
PROBE_TOKENS: Final = 128
"""Of these, the first that are followed to the end: each layer's copy is as much work."""
PROBE_BITS: Final = 4
SCORED: Final = 1
"""Every which row of predictions is compared."""
LOUD: Final = 30.0
"""Rows whose squared error is this many times the median."""
HEAD_ROWS: Final = 4096
"""Of the head, at a time."""
DIGITS: Final = 4

Progress = Callable[[int, int, str], None]


def sample(tokenizer: bytes, text: str) -> list[int]:
    """At most TOKENS_MAX tokens of a text. Raises BadRequest when it is too short."""
    ids: list[int] = Tokenizer.from_buffer(tokenizer).encode(text, add_special_tokens=False).ids
    if len(ids) < TOKENS_MIN:
        raise BadRequest(
            f"the calibration text has {len(ids)} tokens; what it shows would be chance. Give one "
            f"of at least {TOKENS_MIN}, better {TOKENS_MAX}."
        )
    size = min(len(ids), TOKENS_MAX) // PIECES
    stride = (len(ids) - size) // (PIECES - 1)
    return [token for start in range(PIECES) for token in ids[start * stride :][:size]]


def measure(
    blueprint: Blueprint, tokens: Sequence[int], text: str, progress: Progress
) -> Statistics:
    """Run tokens through the model and see what each width of each expert costs.

    `text`: its name, for people. Reads every weight once. Raises BadModelFile, UnsupportedModel.
    """
    shape = blueprint.shape
    run = _Run(blueprint, Calibration(blueprint, list(tokens)))
    for layer in range(shape.layers):
        progress(layer, shape.layers + 1, "measuring")
        run.layer(layer)
    progress(shape.layers, shape.layers + 1, "measuring")
    divergences = run.divergences()
    errors: dict[int, list[tuple[float, ...]]] = {bits: [] for bits in WIDTHS}
    popularity = []
    for index, layer_errors in enumerate(run.layers):
        shared = np.zeros((shape.experts, len(WIDTHS)))
        for probe, divergence in zip(run.probes, divergences, strict=True):
            if probe.layer == index:
                shared += divergence * layer_errors.shares(probe.loud)
        for bits, column in zip(WIDTHS, shared.T, strict=True):
            errors[bits].append(_rounded(column))
        popularity.append(_rounded(layer_errors.popularity))
    progress(shape.layers + 1, shape.layers + 1, "measuring")
    return Statistics(
        text=text,
        tokens=len(tokens),
        popularity=tuple(popularity),
        errors={bits: tuple(rows) for bits, rows in errors.items()},
    )


@dataclass
class _Layer:
    """What the text does in the experts of one layer."""

    squared: Doubles
    """Gate squared times squared error of the output: (experts, widths, tokens)."""
    gates: Doubles
    """(experts, tokens)."""
    probe: Doubles = field(default_factory=lambda: np.zeros((0, 0)))
    """The error of all experts together at PROBE_BITS: (probe tokens, H)."""

    @property
    def popularity(self) -> Doubles:
        part: Doubles = (self.gates > 0).mean(axis=1)
        return part

    @property
    def loud(self) -> NDArray[np.bool_]:
        """(tokens,): rows whose error stands out."""
        rows = self.squared[:, WIDTHS.index(PROBE_BITS)].sum(axis=0)
        found: NDArray[np.bool_] = rows > LOUD * np.median(rows)
        return found

    def shares(self, loud: bool) -> Doubles:
        """(experts, widths): parts of the layer's error at PROBE_BITS, in rows of that kind."""
        rows = self.loud if loud else ~self.loud
        squared = self.squared[:, :, rows].sum(axis=2)
        if not loud:
            reached = np.count_nonzero(self.gates[:, rows], axis=1)
            squared += squared.sum(axis=0) / max(1, int(reached.sum()))
        total = squared[:, WIDTHS.index(PROBE_BITS)].sum()
        return squared / total if total > 0 else np.full_like(squared, 1 / len(squared))


@dataclass(frozen=True, slots=True)
class _Probe:
    """Hidden states in which one layer has errors, in its loud rows or in all others."""

    layer: int
    loud: bool
    states: Calibration


class _Run:
    """The exact hidden states and the probes' copies, on their way through the layers."""

    def __init__(self, blueprint: Blueprint, exact: Calibration) -> None:
        self._blueprint, self._exact = blueprint, exact
        self.probes: list[_Probe] = []
        self.layers: list[_Layer] = []

    def layer(self, index: int) -> None:
        plan, exact, shape = self._blueprint, self._exact, self._blueprint.shape
        copies = [probe.states for probe in self.probes]
        trunk = plan.trunk(index)
        for states in (exact, *copies):
            states.trunk(trunk)
        gates = exact.gates.T if shape.routing else np.ones((shape.experts, len(exact.rows)))
        found = _Layer(np.zeros((shape.experts, len(WIDTHS), len(exact.rows))), gates)
        found.probe = np.zeros((min(PROBE_TOKENS, len(exact.rows)), shape.hidden))
        slices = shape.experts if shape.routing is None else 1
        for number in range(len(plan.layers[index].experts)):
            weights = plan.expert(index, number)
            smoothed = exact.expert(number, weights)
            for states in copies:
                states.expert(number, weights)
            for own in range(slices):
                width = slice(own * shape.expert_width, (own + 1) * shape.expert_width)
                carried = (exact.into_gate, exact.into_down[width])
                self._compare(found, number + own, neurons(smoothed, own, slices), carried)
        self.layers.append(found)
        if not np.isfinite(found.squared).all():
            raise UnsupportedModel(f"layer {index} gives values that are no numbers on this text.")
        loud = found.loud[: len(found.probe)]
        for kind in (False, True):
            if (loud == kind).any():
                error = np.where((loud == kind)[:, None], found.probe, 0)
                self.probes.append(_Probe(index, kind, exact.fork(error)))

    def _compare(
        self, found: _Layer, expert: int, weights: Weights, carried: tuple[Floats, Floats]
    ) -> None:
        """One expert at each width with the exact one, on the rows it is given."""
        gates = found.gates[expert]
        chosen = np.flatnonzero(gates)
        rows, activation = self._exact.rows[chosen], self._blueprint.shape.activation
        want = _feed(weights, rows, activation)
        for place, bits in enumerate(WIDTHS):
            rounded = _rounded_to(weights, bits, self._blueprint.block, carried)
            error = _feed(rounded, rows, activation)
            error -= want
            error *= gates[chosen, None]
            found.squared[expert, place, chosen] = np.square(error).sum(axis=1)
            if bits == PROBE_BITS:
                followed = chosen < len(found.probe)
                found.probe[chosen[followed]] += error[followed]

    def divergences(self) -> list[float]:
        """Of each probe's predictions from the exact ones. The head is read twice, in pieces."""
        plan, shape = self._blueprint, self._blueprint.shape
        norm = plan.norm.read(plan.checkpoint)
        size = min(PROBE_TOKENS, len(self._exact.rows))
        finals = [
            rms_norm(states.states[:size:SCORED], norm, shape.norm_epsilon)
            for states in (self._exact, *(probe.states for probe in self.probes))
        ]
        totals = [np.full(len(finals[0]), -np.inf) for _ in finals]
        for piece in self._head():
            totals[0] = np.logaddexp(totals[0], _log_sum(times(finals[0], piece)))
        expected = np.zeros((len(finals), len(finals[0])))
        for piece in self._head():
            chances = np.exp(times(finals[0], piece) - totals[0][:, None])
            for place, rows in enumerate(finals):
                logits = times(rows, piece)
                expected[place] += (chances * logits).sum(axis=1)
                if place:
                    totals[place] = np.logaddexp(totals[place], _log_sum(logits))
        losses = [total - mean for total, mean in zip(totals, expected, strict=True)]
        return [float((loss - losses[0]).mean()) for loss in losses[1:]]

    def _head(self) -> Iterator[Floats]:
        plan = self._blueprint
        for start in range(0, plan.shape.vocab, HEAD_ROWS):
            stop = min(start + HEAD_ROWS, plan.shape.vocab)
            yield plan.checkpoint.read(plan.head.name, start, stop)


def _log_sum(logits: Doubles) -> Doubles:
    top = logits.max(axis=1)
    found: Doubles = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
    return found


def _feed(weights: Weights, rows: Doubles, activation: Activation) -> Doubles:
    gate = times(rows, weights["gate"]) + weights.get("gate.b", 0)
    up = times(rows, weights["up"]) + weights.get("up.b", 0)
    return times(swiglu(gate, up, activation), weights["down"])


def _rounded_to(
    weights: Weights, bits: int, block: int, carried: tuple[Floats, Floats]
) -> dict[str, Floats]:
    """The weights as they come back from the store."""
    into_gate, into_down = carried
    found = dict(weights)
    for name, into in (("gate", into_gate), ("up", into_gate), ("down", into_down)):
        matrix = np.ascontiguousarray(weights[name])
        found[name] = dequantize(*quantize(matrix, bits, block, into), bits)
    return found


def _rounded(values: Doubles) -> tuple[float, ...]:
    return tuple(float(f"{max(value, 0.0):.{DIGITS - 1}e}") for value in values)
