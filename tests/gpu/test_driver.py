"""What the driver counts: memory that offloads and ended processes really give back."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from vram_agent.backend import Task, TaskKind
from vram_agent.devices.cuda import CudaDevice
from vram_agent.errors import NoVramError
from vram_agent.processes.group import ProcessGroup
from vram_agent.protocol import ModelSpec, Runtime

from tests.conformance.cases import array_of, infer, python_spec, tensor
from tests.gpu.conftest import DRIVER_SLACK_BYTES, MIB, Driver
from tests.gpu.inside import hold_memory
from tests.models.shapes import make_onnx_matmul

GIB = 1 << 30
WEIGHT_BYTES = GIB
LARGE = python_spec("make_linear", rows=256, columns=GIB // 256 // 4)
LEAST_CONTEXT_BYTES, MOST_CONTEXT_BYTES = 64 * MIB, 1536 * MIB
"""A context and torch's kernels: 287 MB loaded lazily, 667 MB at once (pytorch#86509)."""


async def check_large(group: ProcessGroup) -> None:
    x = np.zeros((1, 256), np.float32)
    x[0, 1] = 1
    # The weight counts modulo 7, row after row.
    row = [(GIB // 256 // 4 + column) % 7 for column in range(8)]
    assert array_of(await group.run("m", infer(x)), "y")[0, :8].tolist() == row


async def test_the_context_is_the_floor_and_goes_with_its_process(
    group: ProcessGroup, driver: Driver
) -> None:
    await group.load(python_spec("make_linear", rows=2, columns=2))
    assert driver.held_bytes < DRIVER_SLACK_BYTES
    await group.restore("m")
    held_bytes = driver.held_bytes
    assert LEAST_CONTEXT_BYTES < held_bytes < MOST_CONTEXT_BYTES
    assert group.memory().context_bytes == pytest.approx(held_bytes, abs=4 * DRIVER_SLACK_BYTES)
    await group.end_gpu()
    await driver.wait_for(lambda held: held <= 0)


async def test_an_offload_gives_its_vram_back_to_the_driver(
    group: ProcessGroup, driver: Driver
) -> None:
    await group.load(LARGE)
    await group.restore("m")
    await check_large(group)
    await group.offload("m")
    floor_bytes = driver.held_bytes
    for _ in range(2):
        assert (await group.restore("m")).vram_bytes == pytest.approx(WEIGHT_BYTES, rel=0.01)
        assert driver.held_bytes - floor_bytes == pytest.approx(
            WEIGHT_BYTES, abs=DRIVER_SLACK_BYTES
        )
        await check_large(group)
        assert (await group.offload("m")).vram_bytes == 0
        assert driver.held_bytes == pytest.approx(floor_bytes, abs=DRIVER_SLACK_BYTES)


async def test_ending_the_gpu_process_leaves_nothing_on_the_device(
    group: ProcessGroup, driver: Driver
) -> None:
    await group.load(LARGE)
    for _ in range(2):
        await group.restore("m")
        await check_large(group)
        assert driver.held_bytes > WEIGHT_BYTES
        await group.end_gpu()
        await driver.wait_for(lambda held: held <= 0)


@contextmanager
def all_taken_but(cuda: CudaDevice, left_bytes: int) -> Iterator[None]:
    """Somebody else holds the device."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=hold_memory, args=(cuda.place(""), left_bytes, theirs))
    process.start()
    try:
        assert ours.recv() > 0
        yield
    finally:
        ours.send(None)
        process.join()
        ours.close()
        theirs.close()


async def test_a_restore_that_does_not_fit_is_rolled_back_and_fits_later(
    group: ProcessGroup, cuda: CudaDevice, driver: Driver
) -> None:
    await group.load(LARGE)
    await group.load(python_spec("make_linear", name="small", rows=2, columns=2))
    await group.restore("small")
    with all_taken_but(cuda, WEIGHT_BYTES // 2):
        before_bytes = driver.held_bytes
        with pytest.raises(NoVramError, match=r"1024 MiB wanted, \d+ of \d+ MiB free"):
            await group.restore("m")
        assert not group.is_resident("m")
        assert group.is_resident("small")
        assert driver.held_bytes == pytest.approx(before_bytes, abs=DRIVER_SLACK_BYTES)
    await group.restore("m")
    await check_large(group)


async def test_an_onnx_model_really_lies_and_runs_on_the_device(
    group: ProcessGroup, driver: Driver, tmp_path: Path
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime-gpu is not installed")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime is built for the CPU; install onnxruntime-gpu")
    path = tmp_path / "matmul.onnx"
    make_onnx_matmul(path, 256)
    await group.load(ModelSpec(name="m", runtime=Runtime.ONNX, source=str(path)))
    x = np.zeros((1, 1024), np.float32)
    x[0, 3] = 1
    row = np.random.default_rng(0).standard_normal((1024, 256 * 256), np.float32)[3]
    task = Task(kind=TaskKind.INFER, tensors=[tensor("input", x)])
    await group.restore("m")
    # TF32 keeps ten bits of a float's mantissa.
    first = array_of(await group.run("m", task), "output")[0]
    np.testing.assert_allclose(first, row, rtol=2e-3)
    # On the CPU provider the weights would lie in host memory.
    assert driver.held_bytes > 256 * MIB
    before_bytes = driver.held_bytes
    assert (await group.offload("m")).message == ""
    assert before_bytes - driver.held_bytes > 0.9 * 256 * MIB
    await group.end_gpu()
    await driver.wait_for(lambda held: held <= 0)
