"""What offloading gives back, in measured bytes, with models large enough to be seen.

Prints its figures; times are not asserted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from vram_agent.backend import Task, TaskKind
from vram_agent.processes.group import ProcessGroup
from vram_agent.protocol import ModelSpec, Runtime

from tests.conformance.cases import Case, array_of, bits_of, infer, python_spec, tensor, transcribe
from tests.models.shapes import make_onnx_matmul, make_whisper_shape, whisper_shape_near

MIB = 1 << 20
SIZE_MIB = 256
SLACK_BYTES = 12 * MIB
"""Python's and the libraries' heaps move by this much from task to task."""


def large_whisper(folder: Path) -> Case:
    path = folder / "large.pt"
    make_whisper_shape(path, whisper_shape_near(SIZE_MIB * MIB // 2))
    # Random weights never say that they are done, and are never sure: a quarter of a second, few
    # tokens, and no other temperature.
    task = transcribe(np.zeros(4_000, np.float32), temperature=[0], max_tokens=4)
    spec = ModelSpec(name="m", runtime=Runtime.WHISPER, source=str(path))
    return Case("Whisper", spec, task, lambda _: None)


def large_onnx(folder: Path) -> Case:
    path = folder / "large.onnx"
    make_onnx_matmul(path, SIZE_MIB)
    x = np.zeros((1, 1024), np.float32)
    x[0, 3] = 1
    row = np.random.default_rng(0).standard_normal((1024, 256 * SIZE_MIB), np.float32)[3]
    spec = ModelSpec(name="m", runtime=Runtime.ONNX, source=str(path))
    task = Task(kind=TaskKind.INFER, tensors=[tensor("input", x)])
    return Case(
        "ONNX",
        spec,
        task,
        lambda result: np.testing.assert_array_equal(array_of(result, "output")[0], row),
    )


def large_python(folder: Path) -> Case:
    spec = python_spec("make_linear", rows=256, columns=SIZE_MIB * 1024)
    x = np.zeros((1, 256), np.float32)
    x[0, 1] = 1
    # The weight counts modulo 7, row after row.
    row = [(SIZE_MIB * 1024 + column) % 7 for column in range(8)]
    return Case(
        "Python",
        spec,
        infer(x),
        lambda result: np.testing.assert_array_equal(array_of(result, "y")[0, :8], row),
    )


def large_frozen(folder: Path) -> Case:
    """TorchScript with all of its weights in constants of the graph."""
    from tests.models import tiny_torch  # noqa: PLC0415 - takes seconds

    tiny_torch.save_frozen(folder / "large.pt", rows=256, columns=SIZE_MIB * 1024)
    x = np.zeros((1, 256), np.float32)
    x[0, 1] = 1
    # Twice the weight, which counts modulo 7, and the shift.
    columns = range(8)
    row = [2 * ((SIZE_MIB * 1024 + one) % 7) + 100 * (one + 1) for one in columns]
    spec = ModelSpec(name="m", runtime=Runtime.TORCH, source=str(folder / "large.pt"))
    return Case(
        "Torch",
        spec,
        infer(x),
        lambda result: np.testing.assert_array_equal(array_of(result, "y")[0, :8], row),
    )


@pytest.mark.parametrize("make", [large_whisper, large_onnx, large_python, large_frozen])
async def test_a_request_and_an_offload_leave_the_process_at_its_baseline(
    group: ProcessGroup, tmp_path: Path, make: Callable[[Path], Case]
) -> None:
    case = make(tmp_path)
    weight_bytes = (await group.load(case.spec)).weight_bytes
    assert weight_bytes > 0.9 * SIZE_MIB * MIB
    assert group.memory().host_bytes == pytest.approx(weight_bytes, rel=0.05)

    def held_bytes() -> int:
        measured = group.memory().device_bytes
        assert measured is not None
        return measured

    seconds: dict[str, list[float]] = {"first": [], "restore": [], "offload": []}
    # What the first task makes the libraries set up for good belongs to the baseline.
    began = time.monotonic()
    await group.restore("m")
    first = await group.run("m", case.task)
    seconds["first"].append(time.monotonic() - began)
    case.check(first)
    await group.offload("m")
    baseline_bytes = held_bytes()
    assert baseline_bytes < 0.3 * weight_bytes
    for _ in range(3):
        moved = await group.restore("m")
        seconds["restore"].append(moved.seconds)
        assert moved.vram_bytes == pytest.approx(weight_bytes, rel=0.05)
        assert held_bytes() == pytest.approx(
            baseline_bytes + weight_bytes, abs=SLACK_BYTES + weight_bytes * 0.05
        )
        assert bits_of(await group.run("m", case.task)) == bits_of(first)
        moved = await group.offload("m")
        seconds["offload"].append(moved.seconds)
        assert moved.message == ""
        assert moved.scrubbed is not None
        assert moved.scrubbed.after_bytes == pytest.approx(held_bytes(), abs=SLACK_BYTES)
        assert moved.scrubbed.before_bytes < baseline_bytes + 0.5 * weight_bytes
        assert abs(held_bytes() - baseline_bytes) < SLACK_BYTES
    await group.end_gpu()
    assert group.memory().device_bytes == 0
    began = time.monotonic()
    await group.restore("m")
    await group.run("m", case.task)
    seconds["first"].append(time.monotonic() - began)
    figures = {name: [round(one, 3) for one in values] for name, values in seconds.items()}
    print(
        f"\n{case.name}: weights {weight_bytes // MIB} MiB, baseline {baseline_bytes // MIB} MiB; "
        f"seconds from fork to first result, of restores and of offloads: {figures}"
    )


async def test_a_leak_is_seen_and_goes_with_the_process(group: ProcessGroup) -> None:
    await group.load(python_spec("make_linear", rows=2, columns=2))
    await group.restore("m")
    x = np.ones((1, 2), np.float32)
    await group.run("m", infer(x))
    await group.offload("m")
    before_bytes = group.memory().device_bytes
    await group.restore("m")
    await group.run("m", infer(x, leak_mib=100))
    await group.offload("m")
    scrubbed = await group.scrub()
    assert before_bytes is not None
    leaked_bytes = scrubbed.after_bytes - before_bytes
    assert leaked_bytes == pytest.approx(100 * MIB, abs=SLACK_BYTES)
    assert group.memory().device_bytes == pytest.approx(scrubbed.after_bytes, abs=SLACK_BYTES)
    await group.end_gpu()
    assert group.memory().device_bytes == 0
    await group.restore("m")
    await group.run("m", infer(x))
    await group.offload("m")
    assert group.memory().device_bytes == pytest.approx(before_bytes, abs=SLACK_BYTES)


def save_large_exported(folder: Path) -> tuple[str, dict[str, object]]:
    from tests.models import tiny_torch  # noqa: PLC0415 - takes seconds

    tiny_torch.save_exported_affine(folder / "m.pt2", rows=256, columns=SIZE_MIB * 1024)
    return str(folder / "m.pt2"), {}


def save_large_weights(folder: Path) -> tuple[str, dict[str, object]]:
    from tests.models import tiny_torch  # noqa: PLC0415 - takes seconds

    rows, columns = 256, SIZE_MIB * 1024
    tiny_torch.save_weights(folder / "w.safetensors", rows=rows, columns=columns)
    return "tests.models.tiny_torch:Affine", {
        "path": str(Path(__file__).parents[2]),
        "arguments": {"rows": rows, "columns": columns},
        "weights": str(folder / "w.safetensors"),
    }


def save_large_generator(folder: Path) -> tuple[str, dict[str, object]]:
    from tests.models import tiny_transformers  # noqa: PLC0415 - takes seconds

    # Two layers of 12 x width x width.
    tiny_transformers.save_generator(folder, width=1_600)
    return str(folder), {}


@pytest.mark.parametrize(
    ("runtime", "save"),
    [
        (Runtime.TORCH, save_large_exported),
        (Runtime.TORCH, save_large_weights),
        (Runtime.TRANSFORMERS, save_large_generator),
    ],
)
async def test_the_template_holds_the_weights_in_the_arena_alone(
    group: ProcessGroup,
    tmp_path: Path,
    runtime: Runtime,
    save: Callable[[Path], tuple[str, dict[str, object]]],
) -> None:
    source, options = save(tmp_path)
    spec = ModelSpec(name="m", runtime=runtime, source=source, options=options)
    await group.load(spec)
    # Once for what the libraries set up, and once to be measured.
    await group.load(python_spec("make_linear", name="other", rows=2, columns=2))
    await group.unload("m")

    def held_bytes() -> int:
        lines = Path(f"/proc/{group.template_pid}/status").read_text().splitlines()
        (words,) = (line.split() for line in lines if line.startswith("RssAnon:"))
        return int(words[1]) * 1024

    before_bytes = held_bytes()
    weight_bytes = (await group.load(spec)).weight_bytes
    assert weight_bytes > 0.8 * SIZE_MIB * MIB
    added_bytes = held_bytes() - before_bytes
    print(f"\n{save.__name__}: {added_bytes / MIB:.1f} MiB beside {weight_bytes / MIB:.1f} MiB")
    assert added_bytes < 0.1 * weight_bytes
