"""Whose socket it is, and who may open it."""

import os
import socket
import stat
from pathlib import Path

import pytest

from coeld.api.listen import open_tcp, open_unix
from coeld.errors import StartError


def test_the_socket_is_for_user_and_group_only(tmp_path: Path) -> None:
    path = tmp_path / "run" / "s"
    with open_unix(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o660


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    open_unix(tmp_path / "s").close()  # as a crash leaves it: the file, and nobody behind it
    with open_unix(tmp_path / "s"), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "s"))


def test_a_socket_in_use_is_not_taken_over(tmp_path: Path) -> None:
    with open_unix(tmp_path / "s"), pytest.raises(StartError, match="another daemon answers"):
        open_unix(tmp_path / "s")


def test_a_file_in_the_way_is_kept(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("precious")
    with pytest.raises(StartError, match="is not a socket"):
        open_unix(tmp_path / "s")
    assert (tmp_path / "s").read_text() == "precious"


def test_a_path_that_is_too_long_is_explained_with_a_shorter_one(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"107.*/tmp/coeld-"):
        open_unix(tmp_path / ("x" * 100) / "s")


def test_the_longest_path_that_fits_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name = "y" * (107 - len(os.fsencode(tmp_path)) - 1)
    open_unix(tmp_path / name).close()


def test_a_directory_that_cannot_be_written_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StartError, match=r"api\.socket"):
        open_unix(tmp_path / "file" / "s")


def test_a_tcp_port_in_use_is_named() -> None:
    with open_tcp(0) as first, pytest.raises(StartError, match=r"api\.tcp_port"):
        open_tcp(first.getsockname()[1])
