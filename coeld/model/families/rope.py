"""Rotary position embedding: whatever stretches it becomes explicit frequencies and a scale.

Kinds: none, linear (positions divided), llama3 (low frequencies divided, a smooth passage), yarn
(low frequencies divided, a ramp between two numbers of turns; cos and sin scaled). Formulas of
transformers, modeling_rope_utils.py, and for GGUF llama.cpp's ggml_rope_yarn (the same, with the
ramp's ends rounded outwards) and its tensor `rope_freqs.weight`, which divides the frequencies.
YaRN: Peng et al., arXiv 2309.00071.
"""

from math import ceil, floor, log, pi
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coeld.errors import BadModelFile
from coeld.model.families.settings import NUMBER_MAX, Settings
from coeld.model.manifest import Rope

FACTORS: Final = "rope_freqs.weight"
"""GGUF only: what llama3's kind of stretching divides each frequency by."""

KNOWN: Final = {
    "none": set(),
    "default": set(),
    "linear": {"factor"},
    "llama3": {
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    },
    "yarn": {
        "factor",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "truncate",
        "original_max_position_embeddings",
    },
}
"""Hugging Face's parameters of each kind, besides `rope_type`, `type` and `rope_theta`."""

Doubles = NDArray[np.float64]


def read_rope(settings: Settings, head_dim: int, theta: float, truncate: bool = True) -> Rope:
    """Raises BadModelFile or UnsupportedModel.

    `theta`: the base where the configuration names none; `truncate`: whether YaRN's ramp begins
    and ends at whole frequencies where the configuration does not say.
    """
    parameters = _gguf(settings, theta) if settings.gguf else _huggingface(settings, theta)
    base = _number(settings, parameters, "rope_theta")
    if base <= 1:
        settings.bad("rope_theta", "rope.freq_base", base)
    plain = base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    scale = 1.0
    match parameters["rope_type"]:
        case "none" | "default":
            frequencies = plain
        case "linear":
            frequencies = plain / _number(settings, parameters, "factor")
        case "llama3":
            frequencies = _llama3(settings, parameters, plain)
        case _:
            frequencies, scale = _yarn(settings, parameters, plain, truncate)
    if settings.gguf and settings.has(FACTORS):
        factors = settings.checkpoint.read(FACTORS)
        if factors.shape != (head_dim // 2,) or factors.min() <= 0:
            raise BadModelFile(
                f"tensor {FACTORS!r} of {settings.checkpoint.source}: {factors.shape}, expected "
                f"{(head_dim // 2,)} positive numbers. The file is damaged; get it again."
            )
        frequencies = frequencies / factors
    # As float32, so that the last bit of a machine's pow does not reach the model's hash.
    return Rope(tuple(frequencies.astype(np.float32).tolist()), float(np.float32(scale)))


def _gguf(settings: Settings, theta: float) -> dict[str, Any]:
    kind = settings.value("", "rope.scaling.type") or "none"
    factor = settings.value("", "rope.scaling.factor")
    if kind not in ("none", "linear", "yarn"):
        settings.refuse("rope.scaling.type", kind)
    if kind == "none" and factor not in (None, 0.0, 1.0):
        settings.refuse("rope.scaling.factor", factor)
    return {
        "rope_type": kind,
        "rope_theta": settings.number("", "rope.freq_base", theta),
        "factor": factor,
        "beta_fast": settings.value("", "rope.scaling.yarn_beta_fast"),
        "beta_slow": settings.value("", "rope.scaling.yarn_beta_slow"),
        "original_max_position_embeddings": settings.value(
            "", "rope.scaling.original_context_length"
        )
        or settings.count("", "context_length"),
    }


def _huggingface(settings: Settings, theta: float) -> dict[str, Any]:
    """transformers 5 writes `rope_parameters`; before, `rope_scaling` beside `rope_theta`."""
    base = settings.value("rope_theta", "")
    new = settings.value("rope_parameters", "")
    parameters = settings.value("rope_scaling", "") if new is None else new
    if not isinstance(parameters, dict | None):
        settings.bad("rope_parameters", "", parameters)
    parameters = dict(parameters or {})
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if not isinstance(kind, str) or kind not in KNOWN:
        settings.refuse("rope_type", kind)
    known = KNOWN[kind] | {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    for key, value in parameters.items():
        if (key not in known and value is not None) or (
            key == "partial_rotary_factor" and value not in (None, 1.0)
        ):
            settings.refuse(f"rope_parameters.{key}", value)
    if parameters.get("rope_theta") is None:
        parameters["rope_theta"] = theta if base is None else base
    if parameters.get("original_max_position_embeddings") is None:
        parameters["original_max_position_embeddings"] = settings.count(
            "max_position_embeddings", ""
        )
    return parameters | {"rope_type": kind}


def _number(
    settings: Settings, parameters: dict[str, Any], key: str, default: float | None = None
) -> float:
    value = parameters.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < NUMBER_MAX:
        settings.bad(f"rope_parameters.{key}", f"rope.scaling ({key})", value)
    return float(value)


def _llama3(settings: Settings, parameters: dict[str, Any], plain: Doubles) -> Doubles:
    factor = _number(settings, parameters, "factor")
    low = _number(settings, parameters, "low_freq_factor")
    high = _number(settings, parameters, "high_freq_factor")
    context = _number(settings, parameters, "original_max_position_embeddings")
    if high <= low:
        settings.bad("rope_parameters.high_freq_factor", "", high)
    turns = context * plain / (2 * pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    blended: Doubles = (1 - smooth) * plain / factor + smooth * plain
    return blended


def _yarn(
    settings: Settings, parameters: dict[str, Any], plain: Doubles, truncate: bool
) -> tuple[Doubles, float]:
    base = _number(settings, parameters, "rope_theta")
    factor = _number(settings, parameters, "factor")
    context = _number(settings, parameters, "original_max_position_embeddings")
    default_scale = 0.1 * log(factor) + 1 if factor > 1 else 1.0
    scale = _number(settings, parameters, "attention_factor", default_scale)
    whole = parameters.get("truncate")
    truncate = truncate if whole is None else whole is True
    dim = 2 * len(plain)

    def where(turns: float) -> float:
        """The frequency, as a fractional index, that turns so often within the context."""
        return dim * log(context / (turns * 2 * pi)) / (2 * log(base))

    low = where(_number(settings, parameters, "beta_fast", 32))
    high = where(_number(settings, parameters, "beta_slow", 1))
    low, high = (floor(low), ceil(high)) if truncate else (low, high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    blended: Doubles = plain / factor * ramp + plain * (1 - ramp)
    return blended, scale
