"""The residency engine: how weights move, and what stays where.

Called by ``python -m bench engine``. Each part is measured in processes of its own; what this
machine lacks is skipped with a word.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
from collections.abc import Sequence
from typing import Any

from vram_agent.devices import select_device
from vram_agent.devices.base import Device
from vram_agent.processes.spawn import count_threads
from vram_agent.protocol import DevicePreference

from bench import apart, onnx_residual, tiers
from bench.gpu import describe_gpus
from bench.record import Held, Record, Row, format_bytes, write

GIB = 1 << 30
SIZES_GIB = (1.0, 8.0, 40.0)
SHARE_OF_FREE = 0.7
COPIES_IN_HOST_MEMORY = {DevicePreference.CPU: 3, DevicePreference.CUDA: 2}
"""Of the weights, at most, at once: the arena, a real copy and, on the CPU, the device's."""
SAMPLES = 5
PROCESS_SAMPLES = 3
Samples = dict[str, list[float]]


def main(preference: DevicePreference, sizes_gib: Sequence[float]) -> None:
    """Measure on one device; no sizes means those that fit. Writes engine-<device>.json."""
    device = select_device(preference)
    record = Record(machine={"device": preference.value})
    if preference is DevicePreference.CUDA:
        record.machine |= {"gpus": describe_gpus()}
    if importlib.util.find_spec("torch") is None:
        record.skip("everything", "torch is not installed")
    else:
        sizes = [int(size * GIB) for size in sizes_gib or _choose_sizes(device, preference, record)]
        for size_bytes in sizes:
            _add_moves(record, device, preference, size_bytes)
        _add_loading(record, device, preference, sizes[0])
        _add_tiers(record, device, preference, sizes[0])
    _add_onnx(record, device, preference)
    print(f"written to {write(f'engine-{preference.value.lower()}', record)}")


def _choose_sizes(device: Device, preference: DevicePreference, record: Record) -> list[float]:
    """Return the sizes that this machine's free memory allows, and say so."""
    free_bytes = _free_host_bytes()
    room_bytes = SHARE_OF_FREE * free_bytes / COPIES_IN_HOST_MEMORY[preference]
    if preference is DevicePreference.CUDA:
        (report, *_) = device.reports({})
        room_bytes = min(room_bytes, SHARE_OF_FREE * (report.total_bytes - report.used_bytes))
    fitting = [size for size in SIZES_GIB if size * GIB <= room_bytes]
    chosen = fitting or [max(1 / 64, 2 ** (int(room_bytes / GIB * 64).bit_length() - 1) / 64)]
    left_out = [f"{size:g}" for size in SIZES_GIB if size not in chosen]
    words = f"; {', '.join(left_out)} GiB do not fit" if left_out else ""
    record.notes.append(
        f"sizes: {', '.join(f'{size:g}' for size in chosen)} GiB, by "
        f"{format_bytes(free_bytes)} of free host memory{words}"
    )
    return chosen


def _free_host_bytes() -> int:
    with open("/proc/meminfo", encoding="ascii") as file:  # noqa: PTH123 - a file of the kernel
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _add_moves(
    record: Record, device: Device, preference: DevicePreference, size_bytes: int
) -> None:
    print(f"offload and restore, {format_bytes(size_bytes)} …", flush=True)
    found = apart.run(
        "bench.moves",
        device,
        device=preference.value,
        size_bytes=size_bytes,
        samples=SAMPLES,
        threads=count_threads(os.environ),
    )
    samples: Samples = found["samples"]
    limit = "bare, pinned" if "bare, pinned" in samples else "bare, fresh huge pages"
    is_cuda = preference is DevicePreference.CUDA
    references = {
        "offload": {"copy out": "tensor.to('cpu') of each" if is_cuda else "a copy of each tensor"},
        "restore": {
            "copy in": "tensor.to('cuda') of each" if is_cuda else "a copy of each tensor",
            **{name: _describe_limit(name, limit) for name in samples if name.startswith("bare")},
        },
    }
    for benchmark, others in references.items():
        record.rows += _compare(found, (benchmark, "vram-agent"), benchmark, others)
    size = format_bytes(found["weightBytes"])
    record.claim_at_least(
        f"an offload of {size} is so many times faster than a real copy",
        _median(samples["copy out"]) / _median(samples["offload"]),
        10,
    )
    record.claim_at_least(
        f"a restore of {size} goes at this part of the bare copy's speed",
        _median(samples[limit]) / _median(samples["restore"]),
        0.9,
    )
    record.extra.setdefault("limitSeconds", {})[str(found["weightBytes"])] = round(
        _median(samples[limit]), 4
    )


def _describe_limit(name: str, limit: str) -> str:
    words = name.replace("bare", "one memcpy" if "pages" in name or "mapped" in name else name, 1)
    return f"{words} (the limit)" if name == limit else words


def _add_loading(
    record: Record, device: Device, preference: DevicePreference, size_bytes: int
) -> None:
    print(f"first load, {format_bytes(size_bytes)} …", flush=True)
    found = apart.run(
        "bench.loading",
        device,
        device=preference.value,
        size_bytes=size_bytes,
        samples=PROCESS_SAMPLES,
        threads=count_threads(os.environ),
    )
    loaders = ("torch.load", "safetensors")
    here = {name: f"{name} onto the device" for name in loaders if name in found["samples"]}
    title = ("first load", "vram-agent, arena and device")
    record.rows += _compare(found, title, "vram-agent", here)
    for name in loaders:
        if name not in here:
            record.skip(f"first load beside {name}", f"{name} is not installed")


def _compare(
    found: dict[str, Any], title: tuple[str, str], own: str, others: dict[str, str]
) -> list[Row]:
    """Return a row for each other: the samples named ``own`` beside its own.

    ``title``: benchmark and variant; ``others``: what each is in words, by the name of its samples.
    """
    samples: Samples = found["samples"]
    benchmark, variant = title
    return [
        Row(
            benchmark=benchmark,
            variant=variant,
            size_bytes=found["weightBytes"],
            samples=samples[own],
            reference=words,
            reference_samples=samples[name],
        )
        for name, words in others.items()
    ]


def _add_tiers(
    record: Record, device: Device, preference: DevicePreference, size_bytes: int
) -> None:
    print(f"tiers, {format_bytes(size_bytes)} …", flush=True)
    torch_device = "cpu" if preference is DevicePreference.CPU else "cuda"
    found = tiers.measure(device, torch_device, size_bytes)
    record.rows += [
        Row(
            benchmark="first result",
            variant=f"from the {tier} tier",
            size_bytes=found.weight_bytes,
            samples=found.seconds[tier],
            reference="a fresh process: import, torch.load, run",
            reference_samples=found.seconds["plain"],
        )
        for tier in ("PinnedHost", "Host", "Disk")
    ]
    record.memory += [
        Held(
            benchmark="residual",
            variant=f"{tier} tier" + (", beyond the weights" if tier == "VRAM" else ""),
            size_bytes=found.weight_bytes,
            samples_bytes=samples,
        )
        for tier, samples in found.held.items()
    ]
    copy_seconds = record.extra.get("limitSeconds", {}).get(str(found.weight_bytes))
    if copy_seconds is not None:
        record.claim_at_most(
            "from the Host tier to the first result, seconds against 1 s and the bare copy",
            _median(found.seconds["Host"]),
            1 + copy_seconds,
        )
    record.claim_at_most("bytes on the device in the Host tier", max(found.held["Host"]), 0)


def _add_onnx(record: Record, device: Device, preference: DevicePreference) -> None:
    missing = _find_missing("onnx", "onnxruntime", "numpy")
    if missing:
        record.skip("the residual of ONNX models", f"not installed: {', '.join(missing)}")
        return
    print("residual of an ONNX model …", flush=True)
    found = onnx_residual.measure(device, preference.value, PROCESS_SAMPLES)
    record.memory += [
        Held(
            benchmark="ONNX",
            variant=name,
            size_bytes=onnx_residual.SIZE_BYTES,
            samples_bytes=samples,
        )
        for name, samples in found.items()
    ]
    record.claim_at_most(
        "bytes on the device with an ONNX model in the Host tier", max(found["Host tier"]), 0
    )


def _find_missing(*libraries: str) -> list[str]:
    return [name for name in libraries if importlib.util.find_spec(name) is None]


def _median(samples: Sequence[float]) -> Any:
    return statistics.median(samples)
