"""`coeld model` as a user sees it."""

import argparse
import json
from pathlib import Path

import pytest

from coeld.errors import BadRequest, ModelError, UnknownModel
from coeld.model import fetch, importer
from coeld.model.manifest import matrix_form
from coeld.model.store import Store
from coeld.ui import model_command


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    model_command.add_parser(parser.add_subparsers())
    args = parser.parse_args(["model", *words])
    status: int = args.run(args)
    return status


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COELD_STORE", str(tmp_path / "store"))
    return tmp_path / "store"


Captured = pytest.CaptureFixture[str]


def test_a_file_is_added_listed_and_removed(place: Path, tiny_gguf: Path, capsys: Captured) -> None:
    assert run("add", str(tiny_gguf), "--name", "mine") == 0
    said = capsys.readouterr()
    assert "mine: " in said.out
    assert "of 8 experts" in said.out
    assert "try: coeld bench mine" in said.out
    assert "importing 100 %" in said.err

    assert run("list") == 0
    assert "mine  " in capsys.readouterr().out
    assert run("list", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert [model["name"] for model in listed["installed"]] == ["mine"]
    assert listed["installed"][0]["experts"] == 8
    assert "smollm2-135m-instruct" in [model["name"] for model in listed["available"]]

    assert run("rm", "mine") == 0
    assert Store(place).names() == []


def test_without_a_name_a_file_is_called_after_itself(place: Path, tiny_gguf: Path) -> None:
    path = place.parent / "My Model (Q8).gguf"
    path.write_bytes(tiny_gguf.read_bytes())
    assert run("add", str(path)) == 0
    assert Store(place).names() == ["my-model--q8-"]


def test_the_store_can_be_elsewhere(tmp_path: Path, tiny_gguf: Path) -> None:
    assert run("add", str(tiny_gguf), "--store", str(tmp_path / "other")) == 0
    assert Store(tmp_path / "other").names() == ["tiny"]


@pytest.mark.parametrize("words", [("add", "nothing"), ("rm", "nothing")])
def test_an_unknown_name_is_an_error(place: Path, words: tuple[str, ...]) -> None:
    with pytest.raises(UnknownModel, match="'nothing'"):
        run(*words)


def test_a_known_model_does_not_take_the_name_of_another(place: Path, tiny_gguf: Path) -> None:
    run("add", str(tiny_gguf), "--name", "mine")
    with pytest.raises(ModelError, match="'mine' is installed already"):
        run("add", "smollm2-135m-instruct", "--name", "mine")


def test_a_known_model_that_is_installed_is_not_fetched_again(place: Path, tiny_gguf: Path) -> None:
    run("add", str(tiny_gguf), "--name", "smollm2-135m-instruct")
    before = Store(place).manifest("smollm2-135m-instruct")
    assert run("add", "smollm2-135m-instruct") == 0
    assert Store(place).manifest("smollm2-135m-instruct") == before


@pytest.mark.parametrize("words", ["--bits 4", "--trunk-bits 8", "--budget 1MB --calibrate t.txt"])
def test_a_known_model_that_is_installed_is_not_taken_for_another_width_of_it(
    place: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    monkeypatch.chdir(place.parent)
    Path("t.txt").write_text("a text")
    run("add", str(tiny_gguf), "--name", "smollm2-135m-instruct")
    with pytest.raises(ModelError, match="is installed already"):
        run("add", "smollm2-135m-instruct", *words.split())


@pytest.mark.parametrize("words", ["--calibrate /nowhere", "--report", "--budget 1MB"])
def test_what_does_not_go_together_is_refused_before_anything_is_fetched(
    place: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    monkeypatch.setattr(fetch, "fetched", lambda *_: pytest.fail("fetched"))
    with pytest.raises(BadRequest, match="--budget"):
        run("add", "smollm2-135m-instruct", *words.split())


def test_a_damaged_model_is_listed_and_can_be_removed(
    place: Path, tiny_gguf: Path, capsys: Captured
) -> None:
    run("add", str(tiny_gguf))
    (place / "models" / "tiny.json").write_text("{}")
    assert run("list") == 0
    assert "DAMAGED" in capsys.readouterr().out
    assert run("rm", "tiny") == 0
    assert list((place / "blobs").iterdir()) == []


def test_an_interruption_is_reported_without_a_traceback(
    place: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def interrupt(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(importer, "quantize", interrupt)
    assert run("add", str(tiny_gguf)) == 130
    assert "to continue" in capsys.readouterr().err
    assert Store(place).names() == []


def test_a_terminal_gets_a_bar(
    place: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert run("add", str(tiny_gguf)) == 0
    assert "importing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("hf:Qwen/Qwen3-0.6B@main", "qwen3-0.6b"),
        ("./models/OLMoE 1B/", "olmoe-1b"),
        ("a.Q8_0.gguf", "a.q8_0"),
    ],
)
def test_a_source_is_recognised_and_gives_the_name(source: str, name: str) -> None:
    assert model_command._is_source(source)
    assert model_command._name_after(source) == name


def test_bits_are_chosen_for_experts_and_trunk(place: Path, tiny_gguf: Path) -> None:
    assert run("add", str(tiny_gguf), "--bits", "4", "--trunk-bits", "32") == 0
    manifest = Store(place).manifest("tiny")
    assert matrix_form(manifest.experts[0][0], "fc1", 128, 64).bits == 4
    assert matrix_form(manifest.trunk[0], "o", 64, 64).bits == 32


@pytest.mark.parametrize(("option", "bits"), [("--bits", "5"), ("--trunk-bits", "2")])
def test_a_width_that_does_not_exist_is_answered_with_those_that_do(
    place: Path, capsys: Captured, option: str, bits: str
) -> None:
    with pytest.raises(SystemExit):
        run("add", "smollm2-135m-instruct", option, bits)
    assert "choose from 8, 4, " in capsys.readouterr().err
    assert not place.exists()
