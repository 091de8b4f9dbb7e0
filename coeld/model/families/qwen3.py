"""Qwen3, dense: biases seldom, but q and k of every head are normed before the rotation."""

from dataclasses import replace

from coeld.model.families import qwen2
from coeld.model.families.blueprint import DENSE, Family, Traits
from coeld.model.families.settings import Settings


def read(settings: Settings) -> Traits:
    qkv, o = settings.attention_biases()
    return replace(qwen2.read(settings), qkv_bias=qkv, o_bias=o, qk_norm="head")


FAMILY = Family("qwen3", "qwen3", read, DENSE)
