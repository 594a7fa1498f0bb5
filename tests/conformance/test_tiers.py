"""Every runtime on every device: through every tier, the same bits."""

from __future__ import annotations

import pytest
from vram_agent.backend import Task, TaskKind
from vram_agent.errors import BadInputError, ModelFailedError
from vram_agent.processes.group import ProcessGroup
from vram_agent.protocol import Runtime

from tests.conformance.cases import Case, bits_of, python_spec

NEAREST = {
    Runtime.WHISPER: "fp16",
    Runtime.FUNASR: "useItn",
    Runtime.ONNX: "gpuMemLimit",
    Runtime.PYTHON: "arguments",
    Runtime.TORCH: "allowPickle",
    Runtime.TRANSFORMERS: "trustRemoteCode",
}
"""An option of each runtime, to be misspelt."""


def processes_of(group: ProcessGroup) -> tuple[int | None, int | None]:
    return group.template_pid, group.gpu_pid


async def test_answers_are_the_same_bits_through_every_tier(
    group: ProcessGroup, case_of_any_form: Case
) -> None:
    case = case_of_any_form
    model = await group.load(case.spec)
    assert model.name == "m"
    assert case.task.kind in model.tasks
    assert group.template_pid is not None
    assert group.gpu_pid is None
    assert group.memory().device_bytes == 0
    assert group.memory().host_bytes >= model.weight_bytes > 0

    moved = await group.restore("m")
    assert moved.message == ""
    assert moved.vram_bytes > 0
    assert group.is_resident("m")
    first = await group.run("m", case.task)
    case.check(first)

    # PinnedHost: the process stays.
    pid = group.gpu_pid
    assert (await group.offload("m")).vram_bytes == 0
    assert not group.is_resident("m")
    assert group.gpu_pid == pid
    await group.restore("m")
    assert bits_of(await group.run("m", case.task)) == bits_of(first)

    # Host: no process, no device memory.
    await group.end_gpu()
    assert processes_of(group)[1] is None
    assert group.memory().device_bytes == 0
    assert group.memory().host_bytes > 0
    await group.restore("m")
    assert processes_of(group)[1] not in {None, pid}
    assert bits_of(await group.run("m", case.task)) == bits_of(first)

    # Disk: nothing at all.
    await group.unload("m")
    assert processes_of(group) == (None, None)
    assert group.memory().host_bytes == 0
    await group.load(case.spec)
    await group.restore("m")
    assert bits_of(await group.run("m", case.task)) == bits_of(first)


async def test_every_call_may_be_made_twice(group: ProcessGroup, case: Case) -> None:
    once = await group.load(case.spec)
    assert await group.load(case.spec) == once
    first = await group.restore("m")
    again = await group.restore("m")
    assert (again.vram_bytes, again.seconds) == (first.vram_bytes, 0.0)
    await group.offload("m")
    assert (await group.offload("m")).vram_bytes == 0
    await group.end_gpu()
    await group.end_gpu()
    assert (await group.offload("m")).vram_bytes == 0
    scrubbed = await group.scrub()
    assert (scrubbed.before_bytes, scrubbed.after_bytes) == (0, 0)
    await group.unload("m")
    await group.unload("m")


async def test_a_bad_input_says_what_is_expected_and_the_next_task_runs(
    group: ProcessGroup, case: Case
) -> None:
    await group.load(case.spec)
    await group.restore("m")
    name = case.bad_tensors[0].name
    with pytest.raises(BadInputError, match=name) as caught:
        await group.run("m", Task(kind=case.task.kind, tensors=case.bad_tensors))
    assert caught.value.param == name
    with pytest.raises(BadInputError, match="cannot speech"):
        await group.run("m", Task(kind=TaskKind.SPEECH))
    case.check(await group.run("m", case.task))


async def test_an_unknown_option_names_the_nearest(group: ProcessGroup, case: Case) -> None:
    nearest = NEAREST[case.spec.runtime]
    options = {**case.spec.options, nearest[:-1]: 1}
    spec = type(case.spec)(
        name="m", runtime=case.spec.runtime, source=case.spec.source, options=options
    )
    with pytest.raises(ModelFailedError, match=f"did you mean {nearest}"):
        await group.load(spec)
    assert group.template_pid is None


async def test_models_of_a_group_share_one_gpu_process(group: ProcessGroup, case: Case) -> None:
    await group.load(case.spec)
    await group.load(python_spec("make_linear", name="other", rows=2, columns=2))
    host_bytes = group.memory().host_bytes
    await group.restore("m")
    pid = group.gpu_pid
    await group.restore("other")
    assert group.gpu_pid == pid
    await group.offload("m")
    assert group.is_resident("other")
    await group.unload("m")
    assert group.gpu_pid is None
    assert group.template_pid is not None
    assert 0 < group.memory().host_bytes < host_bytes
    await group.restore("other")
    assert group.is_resident("other")
