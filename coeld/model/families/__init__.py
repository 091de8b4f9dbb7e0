"""The families of models that coeld can run, one file each; this is the list of them.

A new family is a file with a `FAMILY` and a line here.
"""

from typing import Final

from coeld.errors import UnsupportedModel
from coeld.model.checkpoint import Checkpoint
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
    return draw(checkpoint, _family(checkpoint))


def _family(checkpoint: Checkpoint) -> Family:
    if checkpoint.kind == "gguf":
        key, found = "general.architecture", checkpoint.config.get("general.architecture")
        known = {family.architecture: family for family in reversed(FAMILIES)}
        if found == llama.FAMILY.architecture and checkpoint.config.get("llama.expert_count"):
            return mixtral.FAMILY  # the one architecture of GGUF that is two families
    else:
        key, found = "model_type", checkpoint.config.get("model_type")
        known = {family.name: family for family in FAMILIES}
    if not isinstance(found, str) or found not in known:
        raise UnsupportedModel(
            f"{checkpoint.source} is a model of the family {str(found)[:80]!r} ({key}). coeld runs "
            f"{', '.join(sorted(known))}."
        )
    return known[found]
