"""Every family through the real importer and engine, against the logits of transformers.

The tiny checkpoints are made anew from their seeds, as Hugging Face folders and as GGUF files; the
golden logits are those of scripts/goldens.
"""

from pathlib import Path

import numpy as np
import pytest

from coeld.engine.measure import ME, NoPeers, logits_of
from coeld.engine.open_model import OpenModel
from coeld.model.importer import Precision
from coeld.model.store import Store
from tests.fakes.memory_checkpoint import gguf_spelling
from tests.harness.importing import import_file
from tests.harness.tiny_checkpoints import FAMILIES, digest, write_folder
from tests.harness.tiny_files import write_gguf

GOLDEN = Path(__file__).with_name("families")
NAMES = sorted(FAMILIES)
UNSAID = {"qwen2": 16, "mixtral": 24}
"""Windows that GGUF files of these families cannot express: only the tokens before are the same."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("families")
    for name in NAMES:
        write_folder(root / name, name)
    return root


def imported_logits(store: Store, source: Path, tokens: np.ndarray, precision: Precision):
    """(sequences, length, V)"""
    manifest = import_file(store, source, "tiny", precision=precision)
    model = OpenModel(manifest, store, me=ME, peers=NoPeers(), context_tokens=64)
    model.hold_everything()
    return np.stack([logits_of(model, row.tolist(), range(len(row))) for row in tokens])


def golden(name: str) -> tuple[np.ndarray, np.ndarray]:
    found = np.load(GOLDEN / f"{name}.npz")
    return found["tokens"], found["logits"]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


@pytest.mark.parametrize("name", NAMES)
def test_this_machine_makes_the_checkpoint_that_transformers_saw(folders: Path, name: str) -> None:
    assert digest(folders / name) == str(np.load(GOLDEN / f"{name}.npz")["digest"])


@pytest.mark.parametrize("name", NAMES)
def test_with_float32_weights_the_logits_are_those_of_transformers(
    folders: Path, tmp_path: Path, name: str
) -> None:
    tokens, expected = golden(name)
    found = imported_logits(Store(tmp_path), folders / name, tokens, Precision(32, 32))
    worst = np.abs(found - expected).max() / np.abs(expected).max()
    print(f"{name}: largest relative difference {worst:.1e}")
    assert worst < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_with_int8_weights_they_stay_close(folders: Path, tmp_path: Path, name: str) -> None:
    tokens, logits = golden(name)
    found = log_softmax(imported_logits(Store(tmp_path), folders / name, tokens, Precision()))
    expected = log_softmax(logits)
    top1 = float((found.argmax(-1) == expected.argmax(-1)).mean())
    kl = float((np.exp(expected) * (expected - found)).sum(-1).mean())
    print(f"{name}: top-1 agreement {top1:.4f}, mean KL {kl:.5f}")
    assert top1 >= 0.98
    assert kl <= 0.01


@pytest.mark.parametrize("name", NAMES)
def test_a_gguf_file_of_the_same_weights_gives_the_same_logits(tmp_path: Path, name: str) -> None:
    tokens, expected = golden(name)
    file = write_gguf(tmp_path / "tiny.gguf", gguf_spelling(name))
    found = imported_logits(Store(tmp_path / "s"), file, tokens[:1], Precision(32, 32))
    count = UNSAID.get(name, tokens.shape[1])
    worst = np.abs(found - expected[:1])[:, :count].max() / np.abs(expected).max()
    print(f"{name}: largest relative difference {worst:.1e}")
    assert worst < 1e-3
