"""The real model: its tokenizer against hand-checked ids, its manifest, its blobs."""

import pytest
from tokenizers import Tokenizer

from coeld.model.manifest import Form, Manifest, matrix_form
from coeld.model.store import Store

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def manifest(real_store: Store) -> Manifest:
    return real_store.manifest("smollm2-135m-instruct")


@pytest.fixture(scope="module")
def tokenizer(real_store: Store, manifest: Manifest) -> Tokenizer:
    return Tokenizer.from_file(str(real_store.blob_path(manifest.tokenizer)))


def test_the_shape_is_that_of_the_published_model(manifest: Manifest) -> None:
    shape = manifest.shape
    assert (shape.layers, shape.hidden, shape.heads, shape.kv_heads) == (30, 576, 9, 3)
    assert (shape.experts, shape.expert_width, shape.vocab) == (8, 192, 49152)
    assert matrix_form(manifest.experts[0][0], "fc1", 384, 576) == Form(8, 64)
    assert manifest.tied
    assert 2 in manifest.eos_tokens
    assert manifest.weights_bytes < 145e6


def test_every_blob_is_whole(real_store: Store, manifest: Manifest) -> None:
    real_store.verify(manifest.blobs())


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello world", [19556, 905]),
        ("The year 2024", [504, 713, 216, 34, 32, 34, 36]),
        ("<|im_start|>user\nHi<|im_end|>\n", [1, 4093, 198, 26843, 2, 198]),
        ("  two  spaces\n\n\ttab", [216, 827, 216, 5600, 1116, 197, 15999]),
        ("don't", [12420, 982]),
        ("x<|im_end|>y", [104, 2, 105]),
    ],
)
def test_known_encodings(tokenizer: Tokenizer, text: str, ids: list[int]) -> None:
    assert tokenizer.encode(text, add_special_tokens=False).ids == ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_unicode_survives(tokenizer: Tokenizer) -> None:
    text = "naïve café 🙂 日本語 ½ ٣ — “quoted”"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text
