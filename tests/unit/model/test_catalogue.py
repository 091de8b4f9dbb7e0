"""The catalogue is complete, installed with the package, and holds no weights."""

from pathlib import Path

import pytest

import coeld
from coeld.errors import UnknownModel
from coeld.model.catalogue import catalogue, find
from coeld.model.store import check_name

ROOT = Path(coeld.__file__).parent.parent


def test_every_entry_is_well_formed() -> None:
    entries = catalogue()
    assert [entry.name for entry in entries] == sorted(p.stem for p in ROOT.glob("models/*.toml"))
    for entry in entries:
        check_name(entry.name)
        assert len(entry.pip.sha256) == 64
        assert entry.licence
        assert entry.pip.member.endswith(".gguf")


def test_the_folder_of_the_repository_is_the_one_that_is_packaged() -> None:
    assert (ROOT / "coeld" / "catalogue").resolve() == ROOT / "models"


def test_an_unknown_model_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UnknownModel, match=r"'gpt-5'.*smollm2-135m-instruct.*file\.gguf"):
        find("gpt-5")
