"""A short soak of real processes: what they hold does not grow with the cycles.

``python -m bench soak`` goes through 2,000; here are enough to see a leak of a model, a mapping or
a descriptor in each.
"""

from __future__ import annotations

from pathlib import Path

from vram_agent.protocol import DevicePreference

from bench.soak import Point, soak

CYCLES = 60
POINTS = 6
MIB = 1 << 20
WARM_CYCLES = 20
GROWTH_BYTES = 8 * MIB
"""Half of one model: a weight kept in every second cycle would be 300 MiB here."""


async def test_memory_is_flat_over_loads_offloads_and_restores(
    device: DevicePreference, tmp_path: Path
) -> None:
    points = await soak(device, tmp_path, CYCLES, POINTS)
    assert [point.cycle for point in points] == [10, 20, 30, 40, 50, 60]
    warm = next(point for point in points if point.cycle == WARM_CYCLES)
    last: Point = points[-1]
    for name in ("device_bytes", "template_bytes", "own_bytes"):
        grown_bytes = getattr(last, name) - getattr(warm, name)
        assert grown_bytes < GROWTH_BYTES, (name, points)
    # Exact: regions are given back whole, and descriptors one by one.
    assert {point.arena_bytes for point in points} == {last.arena_bytes}
    assert last.arena_bytes > 0
    assert {point.own_fds for point in points} == {last.own_fds}
    # No GPU process, no device memory.
    assert {point.renewed_device_bytes for point in points} == {0}
