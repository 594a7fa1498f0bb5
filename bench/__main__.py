"""Run every benchmark that this machine can, or those that are named.

python -m bench [agent] [engine] [soak] [--device cpu|cuda] [--sizes 1,8,40] [--cycles N]
python -m bench faults [--runs N]
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util

from vram_agent.devices.cuda import CudaDevice, NoCudaDeviceError
from vram_agent.protocol import DevicePreference

NAMES = ("agent", "engine", "soak")
ON_A_CLUSTER = "faults"
"""Counts and not figures of speed, on a control plane: only where it is named."""
AGENT_NEEDS = ("requests", "aiohttp", "torch", "whisper")


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
    needs = AGENT_NEEDS if name == "agent" else ("torch",)
    missing = [library for library in needs if importlib.util.find_spec(library) is None]
    if missing:
        print(f"skipped: {name}, not installed: {', '.join(missing)}")
        return
    benchmark = importlib.import_module(f"bench.{name}")
    if name == "agent":
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
    parser.add_argument(
        "names",
        nargs="*",
        metavar="|".join((*NAMES, ON_A_CLUSTER)),
        help=f"default: all but {ON_A_CLUSTER}",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="", help="default: both")
    parser.add_argument("--sizes", default="", help="GiB, such as 1,8,40; default: what fits")
    parser.add_argument("--cycles", type=int, default=2000, help="of the soak")
    parser.add_argument("--runs", type=int, default=20, help="of each fault")
    options = parser.parse_args()
    for name in options.names or NAMES:
        if name == ON_A_CLUSTER:
            importlib.import_module("bench.faults").main(options.runs)
            continue
        if name not in NAMES:
            parser.error(f"no benchmark {name!r}; there are {', '.join((*NAMES, ON_A_CLUSTER))}")
        run(name, options)


if __name__ == "__main__":
    main()
