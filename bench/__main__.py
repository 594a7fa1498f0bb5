"""Run every benchmark that this machine can, or those that are named.

python -m bench [agent] [engine] [overhead] [flat] [drain] [soak] [storm] [downtime]
    [trend] [faults] [--device cpu|cuda] [--sizes 1,8,40] [--cycles N] [--requests N] [--runs N]
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util

from vram_agent.devices.cuda import CudaDevice, NoCudaDeviceError
from vram_agent.protocol import DevicePreference

SERVED = ("aiohttp", "onnx", "onnxruntime", "numpy", "psutil")
NEEDS: dict[str, tuple[str, ...]] = {
    "agent": ("requests", "aiohttp", "torch", "whisper", "psutil"),
    "engine": ("torch",),
    "overhead": SERVED,
    "flat": SERVED,
    "drain": SERVED,
    "soak": ("torch",),
    "storm": ("vram_operator", "numpy"),
    "downtime": ("vram_operator",),
    "trend": ("vram_operator", "numpy"),
    "faults": ("vram_operator",),
}
NAMES = tuple(NEEDS)
WHOLE = ("agent", "overhead", "storm", "trend")
"""Benchmarks of whole programs, on the CPU device."""
COUNTED = {"flat": "requests", "drain": "runs", "downtime": "runs", "faults": "runs"}
"""The same, with how often as a number."""


def find_devices(wanted: str) -> list[DevicePreference]:
    """Return the devices to measure on; unless one is named, all that are here."""
    if wanted:
        return [DevicePreference.CPU if wanted == "cpu" else DevicePreference.CUDA]
    try:
        CudaDevice()
    except NoCudaDeviceError as error:
        print(f"skipped: CUDA, {error}")
        return [DevicePreference.CPU]
    return [DevicePreference.CPU, DevicePreference.CUDA]


def run(name: str, options: argparse.Namespace) -> None:
    """Run one benchmark, or say what it lacks."""
    missing = [library for library in NEEDS[name] if importlib.util.find_spec(library) is None]
    if missing:
        print(f"skipped: {name}, not installed: {', '.join(missing)}")
        return
    benchmark = importlib.import_module(f"bench.{name}")
    if name in COUNTED:
        benchmark.main(getattr(options, COUNTED[name]))
        return
    if name in WHOLE:
        benchmark.main()
        return
    for device in find_devices(options.device):
        if name == "engine":
            benchmark.main(device, [float(size) for size in options.sizes.split(",") if size])
        else:
            benchmark.main(device, options.cycles)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m bench")
    parser.add_argument("names", nargs="*", metavar="|".join(NAMES), help="default: all of them")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="", help="default: both")
    parser.add_argument("--sizes", default="", help="GiB, such as 1,8,40; default: what fits")
    parser.add_argument("--cycles", type=int, default=2000, help="of the soak")
    parser.add_argument("--requests", type=int, default=100_000, help="of flat")
    parser.add_argument("--runs", type=int, default=20, help="of drain, downtime and faults")
    options = parser.parse_args()
    for name in options.names or NAMES:
        if name not in NAMES:
            parser.error(f"no benchmark {name!r}; there are {', '.join(NAMES)}")
        run(name, options)


if __name__ == "__main__":
    main()
