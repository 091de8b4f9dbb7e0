"""Shared fixtures: a tiny imported model for every test, the real one where it is installed."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from coeld.engine.sessions import use_threads
from coeld.model.manifest import Manifest
from coeld.model.store import Store, default_store
from tests.harness.importing import import_file
from tests.harness.mosquitto import Mosquitto
from tests.reference.tiny_gguf import write_tiny_llama

REAL_MODEL = "smollm2-135m-instruct"


@pytest.fixture(scope="session", autouse=True)
def one_thread_pool() -> None:
    """ONNX Runtime wants to know before its first session in this process."""
    use_threads(1)


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf", layers=3)


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory, tiny_gguf) -> Store:
    """A store with the model "tiny": 3 layers of 8 experts."""
    store = Store(tmp_path_factory.mktemp("store"))
    import_file(store, tiny_gguf, "tiny")
    return store


@pytest.fixture(scope="session")
def tiny(tiny_store) -> Manifest:
    return tiny_store.manifest("tiny")


@pytest.fixture(scope="session")
def tiny_next_gguf(tmp_path_factory) -> Path:
    """The same model after more training, so to speak: other weights."""
    return write_tiny_llama(tmp_path_factory.mktemp("next") / "tiny.gguf", layers=3, seed=1)


@pytest.fixture
def two_versions(tmp_path, tiny_store, tiny_next_gguf) -> Store:
    """A store of its own with "tiny" in its first and in a second version."""
    shutil.copytree(tiny_store.root, tmp_path / "two", copy_function=os.link)
    store = Store(tmp_path / "two")
    import_file(store, tiny_next_gguf, "tiny", update=True)
    return store


@pytest.fixture(scope="session")
def real_store() -> Store:
    """The store that holds SmolLM2; scripts/test sees to it."""
    store = Store(default_store())
    if REAL_MODEL not in store.names():
        pytest.skip(f"{REAL_MODEL} is not in {default_store()}: coeld model add {REAL_MODEL}")
    return store


@pytest.fixture
def mosquitto(tmp_path: Path) -> Iterator[Mosquitto]:
    broker = Mosquitto(tmp_path)
    broker.start()
    yield broker
    broker.stop()
