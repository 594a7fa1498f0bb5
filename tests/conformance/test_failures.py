"""What goes wrong in any step is said, rolled back, and does not last."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from vram_agent.backend import ProcessExit
from vram_agent.devices.cpu import CpuDevice
from vram_agent.errors import (
    AgentError,
    BadInputError,
    ModelFailedError,
    NotResidentError,
    NoVramError,
    TaskFailedError,
)
from vram_agent.processes.group import ProcessBackend, ProcessGroup
from vram_agent.protocol import ModelSpec, Runtime

from tests import models
from tests.conformance.cases import array_of, infer, python_spec

MIB = 1 << 20
X = np.array([1.0, 2.0], dtype=np.float32)


@pytest.mark.parametrize(
    ("runtime", "source", "match"),
    [
        pytest.param(Runtime.WHISPER, "{tmp}/none.pt", "there is no file", id="whisper missing"),
        pytest.param(Runtime.WHISPER, "{tmp}/junk", "no whole checkpoint", id="whisper corrupt"),
        pytest.param(Runtime.WHISPER, "{tmp}/cut.pt", "no whole checkpoint", id="whisper cut off"),
        pytest.param(Runtime.WHISPER, "{tmp}/other.pt", "dims", id="a checkpoint of another kind"),
        pytest.param(Runtime.ONNX, "{tmp}/none.onnx", "there is no file", id="onnx missing"),
        pytest.param(Runtime.ONNX, "{tmp}/junk", "cannot be used", id="onnx corrupt"),
        pytest.param(Runtime.ONNX, "{tmp}/cut.onnx", "bytes too early", id="onnx cut off"),
        pytest.param(Runtime.ONNX, "{tmp}/empty", "it is empty", id="onnx empty"),
        pytest.param(Runtime.PYTHON, "no_such:thing", "options.path", id="python no module"),
        pytest.param(Runtime.PYTHON, "no_colon", "module:factory", id="python no factory"),
        pytest.param(Runtime.PYTHON, "json:loads", "TypeError", id="python factory raises"),
        pytest.param(Runtime.PYTHON, "sys:exit", "SystemExit", id="python factory exits"),
        pytest.param(Runtime.TORCH, "{tmp}/none.pt", "there is no file", id="torch missing"),
        pytest.param(Runtime.TORCH, "{tmp}/cut.pt", "neither TorchScript", id="torch cut off"),
        pytest.param(Runtime.TORCH, "{tmp}/other.pt", "options.weights", id="torch state dict"),
        pytest.param(Runtime.TRANSFORMERS, "{tmp}/none", "no folder", id="transformers missing"),
        pytest.param(Runtime.FUNASR, "{tmp}/none", "none/config.yaml; mount", id="funasr missing"),
        pytest.param(Runtime.FUNASR, "{tmp}/cut", "FunASR cannot load", id="funasr cut off"),
    ],
)
async def test_a_model_that_does_not_load_says_why_and_leaves_nothing(
    group: ProcessGroup, tmp_path: Path, runtime: Runtime, source: str, match: str
) -> None:
    (tmp_path / "empty").touch()
    shutil.copytree(models.FUNASR, tmp_path / "cut")
    (tmp_path / "cut/model.pt").write_bytes((models.FUNASR / "model.pt").read_bytes()[:-1000])
    (tmp_path / "junk").write_bytes(b"\xff\xfe neither checkpoint nor graph" * 100)
    (tmp_path / "cut.pt").write_bytes(models.WHISPER.read_bytes()[:200_000])
    (tmp_path / "cut.onnx").write_bytes(models.DIGITS.read_bytes()[:-1000])
    if source.endswith("other.pt"):
        import torch  # noqa: PLC0415 - one case of many

        torch.save({"weights": torch.zeros(1)}, tmp_path / "other.pt")
    spec = ModelSpec(name="m", runtime=runtime, source=source.format(tmp=tmp_path))
    with pytest.raises(ModelFailedError, match=match) as caught:
        await group.load(spec)
    assert "model m" in caught.value.message
    assert group.template_pid is None
    assert group.memory().host_bytes == 0
    with pytest.raises(ModelFailedError, match="not loaded"):
        await group.restore("m")
    await group.load(python_spec("make_doubler"))
    assert group.template_pid is not None


async def test_a_model_that_does_not_load_leaves_the_others_of_its_group(
    group: ProcessGroup,
) -> None:
    await group.load(python_spec("make_linear", rows=2, columns=2))
    pid, host_bytes = group.template_pid, group.memory().host_bytes
    with pytest.raises(ModelFailedError):
        await group.load(python_spec("none", name="other"))
    assert group.template_pid == pid
    assert group.memory().host_bytes == host_bytes
    await group.restore("m")
    assert group.is_resident("m")


async def test_an_onnx_model_that_no_session_takes_fails_at_restore(
    group: ProcessGroup, tmp_path: Path
) -> None:
    import onnx  # noqa: PLC0415 - one test of many
    from onnx import TensorProto, helper  # noqa: PLC0415 - one test of many

    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph(
        [helper.make_node("NoSuchOperator", ["x"], ["y"])], "g", [value], [out]
    )
    onnx.save(helper.make_model(graph, ir_version=9), tmp_path / "odd.onnx")
    await group.load(ModelSpec(name="m", runtime=Runtime.ONNX, source=str(tmp_path / "odd.onnx")))
    with pytest.raises(ModelFailedError, match="NoSuchOperator"):
        await group.restore("m")
    assert not group.is_resident("m")
    assert group.gpu_pid is None


@pytest.fixture
async def small_group() -> AsyncIterator[ProcessGroup]:
    """On a CPU device of 200 MiB."""
    ends: asyncio.Queue[ProcessExit] = asyncio.Queue()
    opened = ProcessBackend(CpuDevice(200 * MIB)).open_group("g", ends.put_nowait)
    yield opened
    await opened.close()
    assert ends.empty()


async def test_a_model_that_does_not_fit_says_so_with_figures_and_the_rest_stays(
    small_group: ProcessGroup,
) -> None:
    group = small_group
    await group.load(python_spec("make_linear", rows=1, columns=32 * MIB))
    await group.load(python_spec("make_linear", name="other", rows=1, columns=32 * MIB))
    await group.restore("other")
    before_bytes = group.memory().device_bytes
    assert before_bytes is not None
    with pytest.raises(NoVramError, match=r"128 MiB wanted, \d+ of 200 MiB free"):
        await group.restore("m")
    assert not group.is_resident("m")
    assert group.is_resident("other")
    after_bytes = group.memory().device_bytes
    assert after_bytes is not None
    assert after_bytes < before_bytes + 8 * MIB
    # Where the other goes, it fits.
    await group.offload("other")
    await group.restore("m")
    result = await group.run("m", infer(np.ones((1, 1), np.float32)))
    assert array_of(result, "y")[0, :8].tolist() == [0, 1, 2, 3, 4, 5, 6, 0]


async def test_a_process_made_for_a_restore_that_fails_ends_with_it(
    small_group: ProcessGroup,
) -> None:
    await small_group.load(python_spec("make_linear", rows=1, columns=64 * MIB))
    with pytest.raises(NoVramError, match="256 MiB wanted"):
        await small_group.restore("m")
    assert small_group.gpu_pid is None
    assert small_group.memory().device_bytes == 0


@pytest.mark.parametrize(
    ("parameters", "kind", "match"),
    [
        pytest.param({"raise": "odd"}, TaskFailedError, "ValueError: odd", id="raises"),
        pytest.param({"refuse": "no"}, BadInputError, "no", id="refuses the input"),
    ],
)
async def test_a_task_that_fails_leaves_the_process_and_the_model(
    group: ProcessGroup, parameters: dict[str, str], kind: type[AgentError], match: str
) -> None:
    await group.load(python_spec("make_doubler"))
    await group.restore("m")
    pid = group.gpu_pid
    with pytest.raises(kind, match=match):
        await group.run("m", infer(X, **parameters))
    assert group.gpu_pid == pid
    assert array_of(await group.run("m", infer(X)), "y").tolist() == [2.0, 4.0]


async def test_a_task_out_of_memory_says_so_and_the_next_runs(group: ProcessGroup) -> None:
    await group.load(python_spec("make_linear", rows=2, columns=2))
    await group.restore("m")
    x = np.ones((1, 2), np.float32)
    with pytest.raises(NoVramError, match="during a task"):
        await group.run("m", infer(x, allocate_gib=1 << 20))
    # By hand: [1 1] times [[0 1], [2 3]].
    assert array_of(await group.run("m", infer(x)), "y").tolist() == [[2.0, 4.0]]


async def test_weights_that_a_task_changed_are_kept(group: ProcessGroup) -> None:
    await group.load(python_spec("make_linear", rows=2, columns=2))
    await group.restore("m")
    x = np.ones((1, 2), np.float32)
    assert array_of(await group.run("m", infer(x, add=10)), "y").tolist() == [[22.0, 24.0]]
    await group.offload("m")
    await group.restore("m")
    assert array_of(await group.run("m", infer(x)), "y").tolist() == [[22.0, 24.0]]
    await group.end_gpu()
    await group.restore("m")
    assert array_of(await group.run("m", infer(x)), "y").tolist() == [[22.0, 24.0]]


async def test_a_task_for_a_model_that_is_not_resident_is_not_run(group: ProcessGroup) -> None:
    await group.load(python_spec("make_doubler"))
    with pytest.raises(NotResidentError):
        await group.run("m", infer(X))
    await group.restore("m")
    await group.offload("m")
    with pytest.raises(NotResidentError):
        await group.run("m", infer(X))


async def test_where_a_fork_is_unsafe_a_fresh_process_takes_over_and_says_so(
    group: ProcessGroup,
) -> None:
    await group.load(python_spec("make_threaded"))
    moved = await group.restore("m")
    assert "fresh process" in moved.message
    assert "thread" in moved.message
    pid = group.gpu_pid
    assert array_of(await group.run("m", infer(X)), "y").tolist() == [2.0, 4.0]
    await group.offload("m")
    assert (await group.restore("m")).message == ""
    assert group.gpu_pid == pid
    await group.end_gpu()
    assert group.gpu_pid is None
    assert "fresh process" in (await group.restore("m")).message
    assert array_of(await group.run("m", infer(X)), "y").tolist() == [2.0, 4.0]


async def test_a_model_that_loads_on_the_device_is_made_in_the_gpu_process(
    group: ProcessGroup,
) -> None:
    spec = python_spec("make_linear", rows=2, columns=2)
    late = ModelSpec(
        name="m",
        runtime=Runtime.PYTHON,
        source=spec.source,
        options={**spec.options, "loadsOn": "cuda"},
    )
    assert (await group.load(late)).weight_bytes == 0
    assert (await group.restore("m")).vram_bytes >= 16
    x = np.ones((1, 2), np.float32)
    for _ in range(2):
        assert array_of(await group.run("m", infer(x)), "y").tolist() == [[2.0, 4.0]]
        await group.offload("m")
        await group.restore("m")
    await group.end_gpu()
    await group.restore("m")
    assert array_of(await group.run("m", infer(x)), "y").tolist() == [[2.0, 4.0]]


async def test_a_long_answer_travels_whole(group: ProcessGroup) -> None:
    await group.load(python_spec("make_doubler"))
    await group.restore("m")
    x = np.arange(5 * MIB, dtype=np.float32)
    y = array_of(await group.run("m", infer(x)), "y")
    assert y.shape == (5 * MIB,)
    assert y[-1] == 2.0 * (5 * MIB - 1)
