"""hf:ORG/NAME against a local server that speaks the hub's protocol, in a process of its own.

(huggingface_hub reads its environment once, when it is imported.)
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from coeld.errors import ModelError
from coeld.model.hf_folder import HfFolder
from coeld.model.hub import open_hub
from coeld.model.store import Store
from tests.harness.hub_server import COMMIT, Hub, running_hub
from tests.harness.tiny_checkpoints import write_folder, write_shards

OPEN = """
import sys
from coeld.errors import ModelError
from coeld.model.open_checkpoint import open_checkpoint
for source in sys.argv[1:]:
    told = []
    try:
        with open_checkpoint(source, lambda done, total, what: told.append(done)) as found:
            print(found.source, found.fingerprint(), told == sorted(told), len(told) > 0)
    except ModelError as exc:
        print(type(exc).__name__, exc)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A repository with what an import needs in it, and much that it does not."""
    folder = write_folder(tmp_path_factory.mktemp("repository") / "m", "mixtral")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "consolidated.safetensors").write_bytes(b"the same again")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\nA model.\n")
    return folder


@pytest.fixture
def hub(folder: Path) -> Iterator[Hub]:
    with running_hub() as hub:
        hub.repositories["tiny/mixtral"] = folder
        yield hub


def run(hub: str, home: Path, *command: str, **environment: str) -> str:
    """What a command prints, with `home` as the hub's cache."""
    env = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(home), **environment}
    env.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        [sys.executable, *command], env=env, capture_output=True, text=True, timeout=60
    )
    return done.stdout + done.stderr


def opened(hub: str, home: Path, *sources: str, **environment: str) -> str:
    return run(hub, home, "-c", OPEN, *sources, **environment)


def asked(hub: Hub) -> list[str]:
    return sorted(name for name, _range in hub.asked)


def test_a_model_is_fetched_imported_and_called_by_its_commit(hub: Hub, tmp_path: Path) -> None:
    command = ("-m", "coeld", "model", "add", "hf:tiny/mixtral@v1", "--store", str(tmp_path / "s"))
    out = run(hub.url, tmp_path / "home", *command)
    manifest = Store(tmp_path / "s").manifest("mixtral")
    assert manifest.source == f"hf:tiny/mixtral@{COMMIT}", out
    assert manifest.licence == "apache-2.0"
    assert manifest.tokenizer is not None
    wanted = ["README.md", "chat_template.jinja", "config.json", "generation_config.json"]
    wanted += [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    wanted += ["model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"]
    assert asked(hub) == wanted  # no pickle, no second copy, nothing twice


def test_a_broken_connection_is_taken_up_where_it_broke(
    hub: Hub, tmp_path: Path, folder: Path
) -> None:
    """Where it broke, but for what was not yet written: the package writes 10 MiB at a time."""
    large = tmp_path / "large"
    large.mkdir()
    shutil.copy(folder / "config.json", large)
    weights = {"w": ("F16", (np.arange(12 << 20) % 1000).astype(np.float16))}
    write_shards(large, weights)
    hub.repositories["tiny/large"] = large
    hub.faults["model.safetensors"] = "drop"
    out = opened(hub.url, tmp_path, "hf:tiny/large")
    assert out.startswith(f"hf:tiny/large@{COMMIT}"), out
    with HfFolder(large) as expected:
        assert out.split()[1:4] == [expected.fingerprint(), "True", "True"]  # progress rose
    places = [place for name, place in hub.asked if name == "model.safetensors"]
    assert places == [None, f"bytes={10 << 20}-"]


def test_after_a_failure_complete_files_stay_and_the_cache_serves_offline(
    hub: Hub, tmp_path: Path
) -> None:
    victim = "model-00003-of-00003.safetensors"
    hub.faults[victim] = "down"
    assert opened(hub.url, tmp_path, "hf:tiny/mixtral").startswith("FetchFailed the hub could not")
    del hub.faults[victim]
    first = opened(hub.url, tmp_path, "hf:tiny/mixtral")
    assert first.startswith(f"hf:tiny/mixtral@{COMMIT}"), first
    others = [name for name in asked(hub) if name != victim]
    assert len(others) == len(set(others)), "a complete file was fetched again"
    count = len(hub.asked)
    offline = opened(hub.url, tmp_path, "hf:tiny/mixtral", HF_HUB_OFFLINE="1")
    assert offline.split()[:2] == first.split()[:2]
    assert len(hub.asked) == count


def test_without_a_hub_or_a_cache_the_error_says_what_to_do(tmp_path: Path) -> None:
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):
        out = opened("http://127.0.0.1:9", tmp_path, "hf:tiny/mixtral", **environment)
        assert out.startswith("FetchFailed the hub could not be asked for tiny/mixtral"), out
        assert "HF_HUB_OFFLINE=1" in out
        assert "copy the model's folder" in out


def test_what_the_hub_refuses_is_said_and_an_unknown_family_costs_no_download(
    hub: Hub, tmp_path: Path, folder: Path
) -> None:
    hub.gated.add("tiny/gated")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    (other / "model.safetensors").write_bytes(b"never fetched")
    hub.repositories["tiny/mamba"] = other
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(folder / "config.json", pickled)
    (pickled / "pytorch_model.bin").write_bytes(b"never fetched")
    hub.repositories["tiny/pickled"] = pickled
    names = ("gated", "absent", "mixtral@v9", "mamba", "pickled")
    out = opened(hub.url, tmp_path, *(f"hf:tiny/{name}" for name in names))
    assert "FetchFailed tiny/gated at main is gated" in out
    assert "FetchFailed the hub has no model tiny/absent" in out
    assert "FetchFailed the hub has tiny/mixtral, but no revision 'v9'" in out
    assert "UnsupportedModel hf:tiny/mamba" in out
    assert "UnsupportedModel hf:tiny/pickled" in out
    assert "can run any program" in out
    assert asked(hub) == ["config.json", "config.json"]


@pytest.mark.parametrize(
    "source",
    [
        "hf:",
        "hf:mixtral",
        "hf:a/b/c",
        "hf:../etc",
        "hf:a/b@",
        "hf:a/b@x y",
        "hf:a/b@x/../y",
        "hf:a/\n",
    ],
)
def test_what_is_no_name_is_refused_without_asking(source: str) -> None:
    with pytest.raises(ModelError, match="does not name a model on the hub"):
        open_hub(source, lambda *_progress: None)
