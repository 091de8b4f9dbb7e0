"""Qwen3, dense: no biases, but q and k of every head are normed before the rotation."""

from dataclasses import replace

from coeld.model.families import qwen2
from coeld.model.families.blueprint import DENSE, Family, Traits
from coeld.model.families.settings import Settings


def read(settings: Settings) -> Traits:
    biased = settings.flag("attention_bias", "", default=False)
    return replace(qwen2.read(settings), qkv_bias=biased, o_bias=biased, qk_norm="head")


FAMILY = Family("qwen3", "qwen3", read, DENSE)
