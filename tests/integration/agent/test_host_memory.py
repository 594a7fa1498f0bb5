"""The real command in a memory cgroup of its own, near its limit and beyond it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from vram_agent.protocol import ModelReport, ModelState, Report, Tier

from tests.integration.agent.conftest import DIGITS_MODEL, Agent, StartAgent
from tests.integration.agent.containers import CgroupUnavailableError, Container, open_container
from tests.integration.agent.test_serve import infer_digit
from tests.models import digit_clips
from tests.models.shapes import make_onnx_matmul

MIB = 1 << 20
TO_HOST = {"offloadTier": "Host", "idleTimeoutSeconds": 0}


@pytest.fixture
def container() -> Iterator[Container]:
    try:
        with open_container(2048 * MIB) as opened:
            yield opened
    except CgroupUnavailableError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(f"a machine that counts runs this test, and {error}")
        pytest.skip(f"needs a memory cgroup of its own: {error}")


def matmul_model(folder: Path, name: str, mib: int, **fields: Any) -> dict[str, Any]:
    path = folder / f"{name}.onnx"
    make_onnx_matmul(path, mib)
    return {"name": name, "runtime": "ONNX", "source": str(path), "residency": TO_HOST, **fields}


async def multiply(agent: Agent, model: str) -> tuple[int, Any]:
    """A zero vector times the weight."""
    tensor = {"name": "input", "datatype": "FP32", "shape": [1, 1024], "data": [0.0] * 1024}
    url = f"{agent.serving}/v2/models/{model}/infer"
    async with agent.session.post(url, json={"inputs": [tensor]}) as answer:
        return answer.status, await answer.json()


def model_of(report: Report, name: str) -> ModelReport:
    return next(model for model in report.models if model.name == name)


def is_in(tier: Tier, name: str, report: Report) -> bool:
    return model_of(report, name).tier is tier


async def test_near_its_limit_the_agent_lets_the_least_used_weights_go(
    container: Container, start_agent: StartAgent, tmp_path: Path
) -> None:
    models = [matmul_model(tmp_path, name, 128) for name in ("first", "second")]
    kept = matmul_model(tmp_path, "dear", 128, priority=1)
    agent = await start_agent(
        kept, *models, wrapper=container.wrapper(), hostMemory={"budget": "8Gi"}
    )
    for name in ("dear", "first", "second"):
        assert (await multiply(agent, name))[0] == 200
        await agent.when(partial(is_in, Tier.HOST, name))
    container.limit(container.held_bytes() + 8 * MIB)
    report = await agent.when(partial(is_in, Tier.DISK, "first"))
    assert model_of(report, "first").state is ModelState.ABSENT
    assert (model_of(report, "second").tier, model_of(report, "dear").tier) == ("Host", "Host")
    reasons = [
        entry["reason"]
        for entry in agent.log
        if entry.get("event") == "transition" and entry.get("to") == "Absent/Disk"
    ]
    assert reasons == ["HostPressure"]
    container.limit(2048 * MIB)
    assert (await multiply(agent, "first"))[0] == 200


async def test_a_template_that_the_kernel_kills_costs_its_model_a_pause_and_the_others_nothing(
    container: Container, start_agent: StartAgent, tmp_path: Path
) -> None:
    large = matmul_model(tmp_path, "large", 192)
    agent = await start_agent(
        {**DIGITS_MODEL, "residency": {"afterTask": "Keep"}},
        large,
        wrapper=container.wrapper(),
        hostMemory={"budget": "8Gi"},
    )
    clip = digit_clips()[0]
    assert await infer_digit(agent, clip.path) == clip.digit
    container.limit(container.held_bytes() + 100 * MIB)
    (status, body), digit = await asyncio.gather(
        multiply(agent, "large"), infer_digit(agent, clip.path)
    )
    assert status == 503, body
    assert digit == clip.digit
    report = await agent.report()
    assert model_of(report, "large").state is ModelState.FAILED
    assert "signal 9" in (model_of(report, "large").error or "")
    assert model_of(report, "digits").state is ModelState.RESIDENT
    died = [entry for entry in agent.log if entry.get("event") == "process died"]
    assert [(entry["group"], entry["out_of_memory"]) for entry in died] == [("large", True)]
    container.limit(2048 * MIB)
    async with asyncio.timeout(30):
        # The pause after the failure is over when an answer says so.
        while (await multiply(agent, "large"))[0] == 503:  # noqa: ASYNC110
            await asyncio.sleep(0.2)
    assert model_of(await agent.report(), "large").error is None
