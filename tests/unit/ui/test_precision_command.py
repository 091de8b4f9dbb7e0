"""`coeld model add --budget`: what is asked for, what is shown, what is refused."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from coeld.errors import BadRequest, BudgetTooSmall
from coeld.model.allocation import Plan
from coeld.model.manifest import expert_matrices, matrix_form
from coeld.model.store import Store
from coeld.ui import model_command
from coeld.ui.precision_command import size
from coeld.ui.precision_picture import draw
from tests.harness.tiny_checkpoints import FAMILIES, write_folder

WORDS = "The rain in the town ran all the day and then it ended. " * 40


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    model_command.add_parser(parser.add_subparsers())
    args = parser.parse_args(["model", *words])
    status: int = args.run(args)
    return status


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("COELD_STORE", str(tmp_path / "store"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(WORDS)
    return Store(tmp_path / "store")


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("900MB", 900_000_000),
        ("1.5GiB", 3 << 29),
        ("12 kb", 12_000),
        ("800000", 800_000),
        ("2KiB", 2048),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, count: int) -> None:
    assert size(text) == count


@pytest.mark.parametrize("text", ["", "MB", "-1MB", "1..5GB", "1 parsec", "1e9"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="900MB"):
        size(text)


def test_a_budget_is_kept_and_the_statistics_with_it(
    store: Store, tiny_gguf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    budget = 280_000
    given = ("--budget", str(budget), "--calibrate", "text.txt", "--report")
    assert run("add", str(tiny_gguf), "--name", "mixed", *given) == 0
    said = capsys.readouterr()
    assert "uniform 4 bits" in said.out
    assert "mixed, chosen" in said.out
    assert "measuring 100 %" in said.err
    ElementTree.parse("mixed.svg")

    manifest = store.manifest("mixed")
    fc1 = expert_matrices(manifest.shape)[0]
    widths = {matrix_form(ref, *fc1).bits for layer in manifest.experts for ref in layer}
    assert len(widths) > 1
    assert 0.9 * budget < manifest.weights_bytes <= budget
    assert manifest.statistics is not None
    assert manifest.statistics.text == "text.txt"


def test_a_budget_that_cannot_work_says_the_smallest_that_can(
    store: Store, tiny_gguf: Path
) -> None:
    with pytest.raises(BudgetTooSmall, match="too small") as failure:
        run("add", str(tiny_gguf), "--budget", "10kB", "--calibrate", "text.txt")
    smallest = str(failure.value.smallest_bytes)
    assert run("add", str(tiny_gguf), "--budget", smallest, "--calibrate", "text.txt") == 0
    assert store.names() == ["tiny"]


def test_a_budget_chooses_no_width_that_no_kernel_runs(
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """3 bits in blocks of 16."""
    monkeypatch.setitem(FAMILIES["mixtral"].config, "intermediate_size", 48)
    write_folder(tmp_path / "moe", "mixtral")
    given = ("--budget", "600kB", "--calibrate", "text.txt", "--report")
    assert run("add", str(tmp_path / "moe"), *given) == 0
    assert "uniform 3 bits" not in capsys.readouterr().out
    manifest = store.manifest("moe")
    fc1 = expert_matrices(manifest.shape)[0]
    found = {matrix_form(ref, *fc1).bits for layer in manifest.experts for ref in layer}
    assert len(found) > 1
    assert 3 not in found


@pytest.mark.parametrize(
    "words",
    [
        ["--budget", "1MB"],
        ["--calibrate", "text.txt"],
        ["--report"],
        ["--budget", "1MB", "--calibrate", "text.txt", "--bits", "4"],
    ],
)
def test_a_budget_and_a_text_go_together_and_without_a_width_for_all(
    store: Store, tiny_gguf: Path, words: list[str]
) -> None:
    with pytest.raises(BadRequest, match="--budget"):
        run("add", str(tiny_gguf), *words)
    assert store.names() == []


def test_a_text_that_cannot_be_read_is_named(store: Store, tiny_gguf: Path) -> None:
    with pytest.raises(BadRequest, match=r"nowhere\.txt"):
        run("add", str(tiny_gguf), "--budget", "1MB", "--calibrate", "nowhere.txt")


def test_the_picture_is_well_formed_whatever_the_numbers() -> None:
    zero = Plan(((2,),), 100, 0.0)
    some = Plan(((8,),), 400, 3e-7)
    for curve in ([zero, some], [zero], [some, some]):
        text = draw("<&>", curve, {"uniform 8 bits": some}, zero)
        root = ElementTree.fromstring(text)
        assert root.tag.endswith("svg")
        assert "nan" not in text


def test_predictions_are_compared_with_those_of_the_exact_model(
    store: Store, tiny_gguf: Path, tmp_path: Path
) -> None:
    """And experts of 3 bits, that the kernel runs in half precision, are near the exact ones."""
    for name, bits in (("exact", "32"), ("eight", "8"), ("three", "3")):
        trunk = "32" if bits == "32" else "8"
        assert (
            run("add", str(tiny_gguf), "--name", name, "--bits", bits, "--trunk-bits", trunk) == 0
        )

    def kl(model: str) -> dict[str, float]:
        command = [sys.executable, "-m", "coeld", "eval", "kl", model, "exact", "text.txt"]
        command += ["--context", "64", "--chunks", "2", "--json", "--store", str(store.root)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        found: dict[str, float] = json.loads(done.stdout)
        return found

    same, eight, three = kl("exact"), kl("eight"), kl("three")
    assert abs(same["kl"]) < 1e-6
    assert same["top1_agreement"] == 1
    assert same["perplexity"] == same["reference_perplexity"]
    assert same["tokens_scored"] == 2 * 31
    assert 0 < eight["kl"] < three["kl"] < 0.5
