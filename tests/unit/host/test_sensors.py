"""Reading limits out of fake cgroup trees."""

from pathlib import Path

from coeld.host.sensors import Sensors, cgroup_memory, read_memory


def tree(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_version_2_takes_the_tightest_limit_on_the_way_up(tmp_path: Path) -> None:
    files = {
        "own": "0::/a/b\n",
        "fs/a/memory.max": "1000\n",
        "fs/a/memory.current": "600\n",
        "fs/a/memory.stat": "anon 1\ninactive_file 100\n",
        "fs/a/b/memory.max": "max\n",
        "fs/a/b/memory.current": "500\n",
    }
    tree(tmp_path, files)
    assert cgroup_memory(tmp_path / "fs", tmp_path / "own") == (1000, 500)


def test_version_1_is_read_in_its_own_hierarchy(tmp_path: Path) -> None:
    files = {
        "own": "5:cpu,cpuacct:/x\n4:memory:/box\n",
        "fs/memory/box/memory.limit_in_bytes": "2000\n",
        "fs/memory/box/memory.usage_in_bytes": "900\n",
        "fs/memory/box/memory.stat": "total_inactive_file 400\n",
        "fs/memory/memory.limit_in_bytes": "9223372036854771712\n",
    }
    tree(tmp_path, files)
    assert cgroup_memory(tmp_path / "fs", tmp_path / "own") == (2000, 500)


def test_no_limit_and_no_cgroups_at_all(tmp_path: Path) -> None:
    tree(tmp_path, {"own": "0::/\n", "fs/memory.max": "max\n"})
    assert cgroup_memory(tmp_path / "fs", tmp_path / "own") == (0, 0)
    assert cgroup_memory(tmp_path / "fs", tmp_path / "missing") == (0, 0)


def test_a_configured_budget_is_taken_and_a_measured_one_stays_below_what_is_there() -> None:
    assert Sensors(7).budget_bytes == 7_000_000
    measured = Sensors(0)
    assert measured.budget_is_measured
    assert 0 < measured.budget_bytes < read_memory().total_bytes
    sample = measured.sample(1234, 5678)
    assert (sample.kernel_mb_per_s, sample.row_mb_per_s) == (1234, 5678)
    assert 0 <= sample.cpu_load_percent <= 100
