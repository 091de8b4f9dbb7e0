"""The families of models that coeld can run, one file each; this is the list of them.

A new family is a file with a `FAMILY` and a line here.
"""

from collections.abc import Mapping
from typing import Any, Final

from coeld.errors import UnsupportedModel
from coeld.model.checkpoint import Checkpoint, Kind
from coeld.model.families import (
    gpt_oss,
    granite_moe,
    llama,
    mixtral,
    olmoe,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
)
from coeld.model.families.blueprint import Blueprint, Family, draw

FAMILIES: Final[tuple[Family, ...]] = (
    llama.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    mixtral.FAMILY,
    qwen2_moe.FAMILY,
    qwen3_moe.FAMILY,
    olmoe.FAMILY,
    granite_moe.FAMILY,
    granite_moe.SHARED,
    gpt_oss.FAMILY,
)


def blueprint(checkpoint: Checkpoint) -> Blueprint:
    """Where everything in the checkpoint is. Raises BadModelFile or UnsupportedModel.

    Everything is checked: afterwards only the values of weights can still be bad.
    """
    family = check_family(checkpoint.kind, checkpoint.config, checkpoint.source)
    return draw(checkpoint, family)


def check_family(kind: Kind, config: Mapping[str, Any], source: str) -> Family:
    """The family that a configuration is of. Raises UnsupportedModel, naming those there are."""
    if kind == "gguf":
        key = "general.architecture"
        known = {family.architecture: family for family in reversed(FAMILIES)}
        if config.get(key) == llama.FAMILY.architecture and config.get("llama.expert_count"):
            return mixtral.FAMILY  # the one architecture of GGUF that is two families
    else:
        key = "model_type"
        known = {family.name: family for family in FAMILIES}
    found = config.get(key)
    if not isinstance(found, str) or found not in known:
        raise UnsupportedModel(
            f"{source} is a model of the family {str(found)[:80]!r} ({key}). coeld runs "
            f"{', '.join(sorted(known))}."
        )
    return known[found]
