"""Graphics processors, for people to see: the engine computes on the CPU and bids nothing of them.

NVIDIA's through NVML (`pip install coeld[nvidia]`); a Jetson's, which has no NVML before JetPack 7,
from its driver's files: `load` in thousandths and, below devfreq, clocks in hertz. A Jetson's GPU
shares the machine's memory. Source: docs.nvidia.com, NVML API reference, and the Jetson Linux
developer guide, clock frequency and power management.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from coeld.host.small_files import ROOT, number, text

GPUS_MAX: Final = 16
JETSON_LOADS: Final = (
    "sys/devices/platform/gpu.0/load",  # Orin; a link on newer systems
    "sys/devices/platform/bus@0/17000000.gpu/load",  # Orin, JetPack 6
    "sys/devices/platform/17000000.gpu/load",
    "sys/devices/gpu.0/load",  # Nano, TX2, Xavier
)
JETSON_CLOCKS: Final = ("*.gpu", "*.ga10b", "*.gv11b", "*.gp10b", "*.gm20b")


@dataclass(frozen=True, slots=True)
class Gpu:
    """None: not known of this one."""

    name: str
    load_percent: int | None
    memory_total_bytes: int | None
    memory_free_bytes: int | None
    celsius: int | None
    clock_mhz: int | None


class GpuSensor:
    """Opens NVML once, if it is there; `read` is cheap."""

    def __init__(self, root: Path = ROOT, nvml: Any = None) -> None:
        """`nvml` stands in for the module pynvml."""
        self._root = root
        self._nvml = nvml or _import_nvml(root)
        self._handles: list[Any] = []
        if self._nvml is not None:
            try:
                self._nvml.nvmlInit()
                count = min(GPUS_MAX, self._nvml.nvmlDeviceGetCount())
                self._handles = [self._nvml.nvmlDeviceGetHandleByIndex(i) for i in range(count)]
            except self._nvml.NVMLError:
                self._handles = []

    def read(self) -> list[Gpu]:
        return [self._nvidia(handle) for handle in self._handles] or _jetson(self._root)

    def _nvidia(self, handle: Any) -> Gpu:
        nvml = self._nvml

        def asked(call: Any, *arguments: Any) -> Any:
            try:
                return call(handle, *arguments)
            except nvml.NVMLError:  # not every device supports every question
                return None

        name = asked(nvml.nvmlDeviceGetName) or "NVIDIA"
        memory = asked(nvml.nvmlDeviceGetMemoryInfo)
        use = asked(nvml.nvmlDeviceGetUtilizationRates)
        return Gpu(
            name.decode() if isinstance(name, bytes) else str(name),
            use.gpu if use else None,
            memory.total if memory else None,
            memory.free if memory else None,
            asked(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
            asked(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_GRAPHICS),
        )


def _import_nvml(root: Path) -> Any:
    """pynvml where a driver is loaded and somebody installed it; it costs memory elsewhere."""
    if not (root / "proc/driver/nvidia/version").exists():
        return None
    try:
        import pynvml
    except ImportError:
        return None
    return pynvml


def _jetson(root: Path) -> list[Gpu]:
    model = text(root / "proc/device-tree/model")
    load = next((path for name in JETSON_LOADS if (path := root / name).exists()), None)
    if load is None or not model:
        return []
    devfreq = root / "sys/class/devfreq"
    clocks = [clock for name in JETSON_CLOCKS for clock in sorted(devfreq.glob(name))]
    hertz = number(clocks[0] / "cur_freq") if clocks else 0
    zones = (root / "sys/class/thermal").glob("thermal_zone*")
    heat = [number(zone / "temp", -1) for zone in zones if "gpu" in text(zone / "type").lower()]
    return [
        Gpu(
            model,
            min(100, number(load) // 10),
            None,
            None,
            round(heat[0] / 1000) if heat and heat[0] > 0 else None,
            hertz // 1_000_000 or None,
        )
    ]
