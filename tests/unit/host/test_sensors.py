"""Sensors on recorded trees of /sys and /proc. None of these machines was at hand.

Layouts: kernel.org (psi.rst, cgroup-v2.rst, admin-guide/pm/cpufreq.rst, thermal/sysfs-api.rst,
ABI/testing/sysfs-class-power); raspberrypi.com (vcgencmd get_throttled, whose value the file
shows); docs.nvidia.com (Jetson Linux developer guide, NVML API reference).
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coeld.host.battery import Battery, read_battery, spares
from coeld.host.cgroups import cpu_cores, memory_limit
from coeld.host.clock import HeatSensor, allowed_mhz
from coeld.host.disk import Disk
from coeld.host.gpu import Gpu, GpuSensor
from coeld.host.memory import anonymous_bytes, read_memory
from coeld.host.sensors import Sensors, Speeds

MEMINFO = "MemTotal:        8000000 kB\nMemFree:  100 kB\nMemAvailable:    5000000 kB\n"
CPU = "sys/devices/system/cpu"
POLICY = f"{CPU}/cpufreq/policy0"
PI = {
    f"{POLICY}/cpuinfo_max_freq": "2400000\n",
    f"{POLICY}/scaling_max_freq": "2400000\n",
    f"{POLICY}/scaling_cur_freq": "1500000\n",
    f"{POLICY}/related_cpus": "0 1 2 3\n",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "61350\n",
    "sys/class/thermal/thermal_zone0/trip_point_0_type": "critical\n",
    "sys/class/thermal/thermal_zone0/trip_point_0_temp": "110000\n",
    "sys/class/thermal/thermal_zone0/trip_point_1_type": "passive\n",
    "sys/class/thermal/thermal_zone0/trip_point_1_temp": "85000\n",
    "sys/devices/platform/soc/soc:firmware/get_throttled": "50000\n",
}
LAPTOP = {
    "sys/class/power_supply/AC/type": "Mains\n",
    "sys/class/power_supply/AC/online": "0\n",
    "sys/class/power_supply/BAT0/type": "Battery\n",
    "sys/class/power_supply/BAT0/status": "Discharging\n",
    "sys/class/power_supply/BAT0/capacity": "28\n",
    "sys/class/power_supply/BAT1/type": "Battery\n",
    "sys/class/power_supply/BAT1/status": "Unknown\n",
    "sys/class/power_supply/BAT1/capacity": "5\n",
    "sys/class/power_supply/hidpp_battery_0/type": "Battery\n",
    "sys/class/power_supply/hidpp_battery_0/scope": "Device\n",
    "sys/class/power_supply/hidpp_battery_0/status": "Discharging\n",
    "sys/class/power_supply/hidpp_battery_0/capacity": "90\n",
}


def tree(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def sensors(root: Path, budget_mb: int = 0, least: int = 30) -> Sensors:
    return Sensors(budget_mb, least, Disk(root / "store", root / "disk.json"), root)


# ---- control groups ------------------------------------------------------------------------


def test_the_tightest_quota_of_either_version_is_the_cores_allowed(tmp_path: Path) -> None:
    assert cpu_cores(tmp_path / "missing") == 0
    files = {
        "proc/self/cgroup": "3:cpu,cpuacct:/box\n0::/a/b\n",
        "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
        "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "100000\n",
    }
    tree(tmp_path, files)
    assert cpu_cores(tmp_path) == 0
    tree(tmp_path, {"sys/fs/cgroup/a/cpu.max": "150000 100000\n"})
    assert cpu_cores(tmp_path) == 1.5
    tree(tmp_path, {"sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "30000\n"})
    assert cpu_cores(tmp_path) == 0.3


# ---- memory --------------------------------------------------------------------------------


def test_version_2_takes_the_tightest_limit_on_the_way_up(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/a/b\n",
        "sys/fs/cgroup/a/memory.max": "1000\n",
        "sys/fs/cgroup/a/memory.current": "600\n",
        "sys/fs/cgroup/a/memory.stat": "anon 1\ninactive_file 100\n",
        "sys/fs/cgroup/a/b/memory.max": "max\n",
        "sys/fs/cgroup/a/b/memory.current": "500\n",
    }
    tree(tmp_path, files)
    assert memory_limit(tmp_path) == (1000, 500)


def test_version_1_is_read_in_its_own_hierarchy(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/box\n",
        "sys/fs/cgroup/memory/box/memory.limit_in_bytes": "2000\n",
        "sys/fs/cgroup/memory/box/memory.usage_in_bytes": "900\n",
        "sys/fs/cgroup/memory/box/memory.stat": "total_inactive_file 400\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    }
    tree(tmp_path, files)
    assert memory_limit(tmp_path) == (2000, 500)


def test_no_limit_and_no_files_at_all(tmp_path: Path) -> None:
    tree(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"})
    assert memory_limit(tmp_path) == (0, 0)
    assert memory_limit(tmp_path / "missing") == (0, 0)
    assert read_memory(tmp_path / "missing").available_bytes == 0


def test_a_limit_makes_the_machine_smaller_and_the_worse_pressure_counts(tmp_path: Path) -> None:
    psi = "some avg10=9.00 avg60=99.00 avg300=9.00 total=9\nfull avg10=1.00 avg60={} avg300=1.00\n"
    files = {
        "proc/meminfo": MEMINFO,
        "proc/pressure/memory": psi.format("3.20"),
        "proc/self/cgroup": "0::/coeld\n",
        "sys/fs/cgroup/coeld/memory.max": "3000000000\n",
        "sys/fs/cgroup/coeld/memory.current": "2500000000\n",
        "sys/fs/cgroup/coeld/memory.pressure": psi.format("41.70"),
    }
    tree(tmp_path, files)
    found = read_memory(tmp_path)
    assert (found.total_bytes, found.available_bytes) == (3_000_000_000, 500_000_000)
    assert found.pressure_percent == 42
    tree(tmp_path, {"sys/fs/cgroup/coeld/memory.pressure": "full avg60=inf\n"})
    assert read_memory(tmp_path).pressure_percent == 3


def test_a_configured_budget_holds_while_there_is_memory_and_a_measured_one_follows_it(
    tmp_path: Path,
) -> None:
    tree(tmp_path, {"proc/meminfo": MEMINFO, "proc/7/status": "RssAnon:\t 1000000 kB\n"})
    assert anonymous_bytes(7, tmp_path) == 1_024_000_000
    configured, measured = sensors(tmp_path, 4000), sensors(tmp_path)
    assert configured.sample().memory_budget_bytes == 4_000_000_000
    first = measured.sample().memory_budget_bytes
    assert first == int(0.6 * 5_120_000_000)
    tree(tmp_path, {"proc/meminfo": MEMINFO.replace("5000000", "4000000")})  # the engine took it
    for _ in range(20):
        assert measured.sample(engine_pid=7).memory_budget_bytes == pytest.approx(first)
    tree(tmp_path, {"proc/meminfo": MEMINFO.replace("5000000", "1000000")})  # others took it
    for _ in range(30):
        measured.sample(engine_pid=7)
        configured.sample(engine_pid=7)
    assert measured.sample(engine_pid=7).memory_budget_bytes == pytest.approx(0.6 * 2.048e9, 0.01)
    assert configured.sample(engine_pid=7).memory_budget_bytes == pytest.approx(2.048e9, 0.01)


# ---- heat ----------------------------------------------------------------------------------


def test_a_pi_that_was_throttled_once_is_not_and_one_that_is_runs_at_its_present_clock(
    tmp_path: Path,
) -> None:
    tree(tmp_path, PI)
    calm = HeatSensor(tmp_path).read()
    assert (calm.celsius, calm.where, calm.limit_celsius) == (61, "cpu-thermal", 85)
    assert (calm.clock_mhz, calm.clock_full_mhz, calm.complaints) == (2400, 2400, ())
    tree(tmp_path, {"sys/devices/platform/soc/soc:firmware/get_throttled": "50005\n"})
    weak = HeatSensor(tmp_path).read()
    assert weak.complaints == ("under-voltage", "throttled")
    assert (weak.clock_mhz, weak.clock_full_mhz) == (1500, 2400)


def test_the_kernels_own_limit_is_a_mean_over_big_and_little_cores(tmp_path: Path) -> None:
    for policy, cores, full, now in ((0, "0 1 2 3", 1800, 1800), (4, "4 5", 2400, 1200)):
        files = {"cpuinfo_max_freq": full * 1000, "scaling_max_freq": now * 1000}
        folder = f"{CPU}/cpufreq/policy{policy}"
        tree(tmp_path, {f"{folder}/{name}": f"{value}\n" for name, value in files.items()})
        tree(tmp_path, {f"{folder}/related_cpus": cores})
    heat = HeatSensor(tmp_path).read()
    assert (heat.clock_mhz, heat.clock_full_mhz) == (1600, 2000)
    assert allowed_mhz(tmp_path) == 1600


def test_an_x86_processor_is_throttled_while_its_counters_grow(tmp_path: Path) -> None:
    count = f"{CPU}/cpu0/thermal_throttle/package_throttle_count"
    tree(tmp_path, {**PI, count: "7\n"})
    sensor = HeatSensor(tmp_path)
    assert sensor.read().complaints == ()
    tree(tmp_path, {count: "9\n"})
    hot = sensor.read()
    assert (hot.complaints, hot.clock_mhz) == (("too hot",), 1500)
    assert sensor.read().complaints == ()


def test_without_zones_hwmon_is_read_and_sensors_that_lie_are_not(tmp_path: Path) -> None:
    assert HeatSensor(tmp_path).read().celsius is None
    tree(
        tmp_path,
        {
            "sys/class/hwmon/hwmon0/name": "k10temp\n",
            "sys/class/hwmon/hwmon0/temp1_input": "48125\n",
            "sys/class/hwmon/hwmon0/temp1_max": "70000\n",
            "sys/class/hwmon/hwmon0/temp2_input": "-273150\n",
            "sys/class/hwmon/hwmon1/temp1_input": "6553500\n",
            "sys/class/hwmon/hwmon1/temp2_input": "warm\n",
        },
    )
    heat = HeatSensor(tmp_path).read()
    assert (heat.celsius, heat.where, heat.limit_celsius) == (48, "k10temp", 70)


def test_a_clock_that_is_held_back_lowers_the_speeds_that_are_told(tmp_path: Path) -> None:
    tree(tmp_path, {**PI, "proc/meminfo": MEMINFO})
    one = sensors(tmp_path)
    speeds = Speeds(8000, 40_000, 600, 2400)
    fresh = one.sample(speeds)
    assert (fresh.kernel_mb_per_s, fresh.row_mb_per_s, fresh.cut_us) == (8000, 40_000, 600)
    tree(tmp_path, {f"{POLICY}/scaling_max_freq": "1200000\n"})
    fresh = one.sample(speeds)
    assert (fresh.kernel_mb_per_s, fresh.row_mb_per_s, fresh.cut_us) == (4000, 20_000, 1200)
    held = one.sample(speeds._replace(clock_mhz=1200))  # it was, when measured
    assert (held.kernel_mb_per_s, held.cut_us) == (8000, 600)
    assert one.sample(speeds._replace(clock_mhz=0)).kernel_mb_per_s == 8000
    assert one.status()["heat"]["clock_mhz"] == 1200


# ---- battery -------------------------------------------------------------------------------


def test_the_fullest_battery_of_the_machine_itself_counts(tmp_path: Path) -> None:
    assert read_battery(tmp_path) is None
    tree(tmp_path, LAPTOP)
    assert read_battery(tmp_path) == Battery(28, discharging=True)
    tree(tmp_path, {"sys/class/power_supply/AC/online": "1\n"})
    assert read_battery(tmp_path) == Battery(28, discharging=False)


def test_a_battery_is_spared_below_the_threshold_until_it_is_charged_a_little_more() -> None:
    low = Battery(29, discharging=True)
    assert spares(low, 30, before=False)
    assert not spares(replace(low, percent=30), 30, before=False)
    assert spares(replace(low, percent=34), 30, before=True)
    assert not spares(replace(low, percent=35), 30, before=True)
    assert not spares(replace(low, discharging=False), 30, before=True)
    assert not spares(low, 0, before=False)
    assert not spares(None, 100, before=True)


def test_a_low_battery_is_told_and_shown(tmp_path: Path) -> None:
    tree(tmp_path, {**LAPTOP, "proc/meminfo": MEMINFO})
    one = sensors(tmp_path)
    assert one.sample().sparing
    assert one.status()["battery"] == {"percent": 28, "discharging": True, "spared": True}
    assert not sensors(tmp_path, least=20).sample().sparing


# ---- graphics ------------------------------------------------------------------------------


class FakeNvml:
    """Two devices, of which the second answers no question but its name."""

    NVML_TEMPERATURE_GPU, NVML_CLOCK_GRAPHICS = 0, 0

    class NVMLError(Exception):
        pass

    class Memory:
        total, free = 8_000_000_000, 5_000_000_000

    class Use:
        gpu = 37

    def __init__(self, driver: bool = True) -> None:
        self.driver = driver

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's names
        if not self.driver:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetName(self, handle: int) -> str | bytes:  # noqa: N802
        return "RTX 4060" if handle == 0 else b"Tesla M40"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Memory:  # noqa: N802
        return self._first(handle, self.Memory())

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Use:  # noqa: N802
        return self._first(handle, self.Use())

    def nvmlDeviceGetTemperature(self, handle: int, kind: int) -> int:  # noqa: N802
        return self._first(handle, 55)

    def nvmlDeviceGetClockInfo(self, handle: int, kind: int) -> int:  # noqa: N802
        return self._first(handle, 2460)

    def _first(self, handle: int, value: Any) -> Any:
        if handle:
            raise self.NVMLError("Not Supported")
        return value


def test_what_nvml_does_not_know_of_a_device_is_left_out(tmp_path: Path) -> None:
    first, second = GpuSensor(tmp_path, FakeNvml()).read()
    assert first == Gpu("RTX 4060", 37, 8_000_000_000, 5_000_000_000, 55, 2460)
    assert second == Gpu("Tesla M40", None, None, None, None, None)
    assert GpuSensor(tmp_path, FakeNvml(driver=False)).read() == []


def test_a_jetson_is_read_from_its_drivers_files(tmp_path: Path) -> None:
    assert GpuSensor(tmp_path).read() == []
    tree(
        tmp_path,
        {
            "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
            "sys/devices/platform/gpu.0/load": "624\n",
            "sys/class/devfreq/17000000.gpu/cur_freq": "624750000\n",
            "sys/class/thermal/thermal_zone1/type": "gpu-thermal\n",
            "sys/class/thermal/thermal_zone1/temp": "47218\n",
        },
    )
    (gpu,) = GpuSensor(tmp_path).read()
    assert gpu == Gpu("NVIDIA Jetson Orin Nano Developer Kit", 62, None, None, 47, 624)


# ---- disk ----------------------------------------------------------------------------------


def test_a_disk_is_measured_once_on_its_largest_file_and_remembered(tmp_path: Path) -> None:
    cache, store = tmp_path / "disk.json", tmp_path / "store"
    Disk(store, cache).measure()  # no store yet
    (store / "blobs").mkdir(parents=True)
    (store / "blobs" / "small").write_bytes(b"x" * 1000)
    disk = Disk(store, cache)
    disk.measure()
    assert (disk.read_mb_per_s, cache.exists()) == (0, False)
    (store / "blobs" / "large").write_bytes(bytes((5 << 20) + 17))
    disk.measure()
    assert disk.read_mb_per_s > 0
    (store / "blobs" / "large").unlink()
    again = Disk(store, cache)
    again.measure()
    assert again.read_mb_per_s == disk.read_mb_per_s
    assert again.free_bytes > 0
    cache.write_text(cache.read_text().replace(f": {again.read_mb_per_s}", ": -1"))
    damaged = Disk(store, cache)
    damaged.measure()
    assert damaged.read_mb_per_s == 0


def test_this_machine_is_sampled() -> None:
    one = Sensors(0, 30, Disk(Path("/nonexistent"), Path("/nonexistent/disk.json")))
    fresh = one.sample(Speeds(1234, 5678))
    assert (fresh.kernel_mb_per_s, fresh.row_mb_per_s) == (1234, 5678)
    assert 0 < fresh.memory_budget_bytes < read_memory().total_bytes
    assert 0 <= fresh.cpu_load_percent <= 100
    assert one.status().keys() == {"memory", "heat", "battery", "disk", "gpus"}
