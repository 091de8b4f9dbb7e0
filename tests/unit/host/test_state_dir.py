"""Who a device is, over many starts and some accidents."""

from pathlib import Path

import pytest

from coeld.errors import StartError
from coeld.host.state_dir import locked, next_identity


def test_the_node_stays_and_the_incarnation_rises(tmp_path: Path) -> None:
    first, second = next_identity(tmp_path), next_identity(tmp_path)
    assert first.node == second.node
    assert (first.incarnation, second.incarnation) == (1, 2)
    assert not second.renewed


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b'{"node": "x", "incarnation": 1}', b"\xff" * 9000]
)
def test_a_damaged_identity_makes_a_new_device(tmp_path: Path, damage: bytes) -> None:
    old = next_identity(tmp_path)
    (tmp_path / "identity.json").write_bytes(damage)
    new = next_identity(tmp_path)
    assert new.renewed
    assert new.node != old.node
    assert next_identity(tmp_path).node == new.node


def test_two_daemons_cannot_share_a_directory(tmp_path: Path) -> None:
    with (
        locked(tmp_path),
        pytest.raises(StartError, match="another coeld daemon"),
        locked(tmp_path),
    ):
        pytest.fail("both got the lock")


def test_a_directory_that_cannot_be_made_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StartError, match=r"device\.state_dir"), locked(tmp_path / "file" / "state"):
        pytest.fail("locked a file")


def test_no_temporary_files_are_left(tmp_path: Path) -> None:
    next_identity(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["identity.json"]
