"""The tiny imported model as a pair, for the tests of this folder. Read only."""

import pytest

from coeld.model.manifest import Manifest
from coeld.model.store import Store


@pytest.fixture(scope="session")
def imported(tiny_store: Store, tiny: Manifest) -> tuple[Store, Manifest]:
    return tiny_store, tiny
