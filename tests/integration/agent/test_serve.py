"""``vram-agent serve`` as a person runs it: real processes, real models, the CPU device."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from pathlib import Path

import aiohttp
import psutil
import pytest
from vram_agent.protocol import ModelState, Report, Tier

from tests.integration.agent.conftest import DIGITS_MODEL, WHISPER_MODEL, Agent, StartAgent
from tests.models import clips, digit_clips, read_samples

CLIP = clips()[0]


def is_at(report: Report, state: ModelState, tier: Tier, model: str = "whisper") -> bool:
    found = next(m for m in report.models if m.name == model)
    return (found.state, found.tier) == (state, tier)


def is_running(report: Report) -> bool:
    return any(model.in_flight for model in report.models)


async def infer_digit(agent: Agent, path: Path) -> int:
    samples = read_samples(path)
    body = {
        "inputs": [
            {
                "name": "audio",
                "datatype": "FP32",
                "shape": [1, len(samples)],
                "data": samples.tolist(),
            }
        ],
        "outputs": [{"name": "digit"}],
    }
    async with agent.session.post(f"{agent.serving}/v2/models/digits/infer", json=body) as answer:
        assert answer.status == 200, await answer.text()
        return int((await answer.json())["outputs"][0]["data"][0])


async def test_ready_with_nothing_loaded_and_no_model_library_in_the_supervisor(
    start_agent: StartAgent,
) -> None:
    agent = await start_agent(WHISPER_MODEL, DIGITS_MODEL)
    async with agent.session.get(f"{agent.control}/readyz") as answer:
        assert answer.status == 200
    report = await agent.when(lambda r: bool(r.devices))
    assert report.memory.used_bytes == 0
    assert [m.state for m in report.models] == [ModelState.ABSENT] * 2
    assert agent.pids("template") == []
    status, answer_body = await agent.transcribe(CLIP.path)
    assert (status, answer_body["text"]) == (200, CLIP.text)
    maps = agent.read_maps()
    for library in ("torch", "onnxruntime", "numpy", "libcuda"):
        assert library not in maps


async def test_a_model_is_loaded_runs_leaves_sinks_and_comes_back(start_agent: StartAgent) -> None:
    agent = await start_agent({**WHISPER_MODEL, "residency": {"idleTimeoutSeconds": 1}})
    status, body = await agent.transcribe(CLIP.path)
    assert (status, body["text"]) == (200, CLIP.text)
    report = await agent.when(lambda r: is_at(r, ModelState.OFFLOADED, Tier.PINNED_HOST))
    assert report.memory.model_bytes == 0
    report = await agent.when(lambda r: is_at(r, ModelState.OFFLOADED, Tier.HOST))
    assert report.memory.used_bytes == report.memory.residual_bytes == 0
    assert (len(agent.pids("template")), agent.pids("gpu")) == (1, [])
    began = time.monotonic()
    status, body = await agent.transcribe(CLIP.path)
    print(f"second transcription, from Host: {time.monotonic() - began:.2f} s")
    assert (status, body["text"]) == (200, CLIP.text)
    loads = [e for e in agent.log if e.get("event") == "transition" and e["from"] == "Absent/Disk"]
    assert len(loads) == 1


async def test_two_runtimes_share_a_budget_for_one(start_agent: StartAgent) -> None:
    keep = {"afterTask": "Keep"}
    agent = await start_agent(
        {**WHISPER_MODEL, "vram": "20Mi", "residency": keep},
        {**DIGITS_MODEL, "vram": "20Mi", "residency": keep},
        vram={"budget": "30Mi"},
    )
    clip = digit_clips()[0]
    for _ in range(2):
        status, body = await agent.transcribe(CLIP.path)
        assert (status, body["text"]) == (200, CLIP.text)
        assert await infer_digit(agent, clip.path) == clip.digit
    report = await agent.report()
    assert is_at(report, ModelState.RESIDENT, Tier.VRAM, "digits")
    assert not is_at(report, ModelState.RESIDENT, Tier.VRAM, "whisper")


async def test_a_broken_model_fails_with_its_reason_and_the_other_serves(
    start_agent: StartAgent,
) -> None:
    broken = {"name": "broken", "runtime": "Whisper", "source": "/nowhere/model.pt"}
    agent = await start_agent(broken, WHISPER_MODEL)
    (status, body), (good, text) = await asyncio.gather(
        agent.transcribe(CLIP.path, "broken"), agent.transcribe(CLIP.path)
    )
    assert status == 503
    assert "/nowhere/model.pt" in body["error"]["message"]
    assert (good, text["text"]) == (200, CLIP.text)
    report = await agent.report()
    assert report.models[0].state is ModelState.FAILED
    assert "/nowhere/model.pt" in (report.models[0].error or "")


@pytest.mark.parametrize("role", ["gpu", "template"])
async def test_a_process_killed_under_a_task_costs_that_task_only(
    start_agent: StartAgent, role: str
) -> None:
    agent = await start_agent({**WHISPER_MODEL, "residency": {"afterTask": "Keep"}})
    assert (await agent.transcribe(CLIP.path))[0] == 200
    requests = [asyncio.create_task(agent.transcribe(CLIP.path)) for _ in range(4)]
    await agent.when(is_running)
    for pid in agent.pids(role):
        os.kill(pid, signal.SIGKILL)
    answers = await asyncio.gather(*requests)
    statuses = sorted(status for status, _ in answers)
    assert statuses in ([200, 200, 200, 200], [200, 200, 200, 502])
    assert {body["text"] for status, body in answers if status == 200} == {CLIP.text}


async def test_a_template_killed_at_rest_is_made_anew_by_the_next_request(
    start_agent: StartAgent,
) -> None:
    agent = await start_agent({**WHISPER_MODEL, "residency": {"offloadTier": "Host"}})
    assert (await agent.transcribe(CLIP.path))[0] == 200
    await agent.when(lambda r: is_at(r, ModelState.OFFLOADED, Tier.HOST))
    (template,) = agent.pids("template")
    os.kill(template, signal.SIGKILL)
    await agent.when(lambda r: is_at(r, ModelState.ABSENT, Tier.DISK))
    assert (await agent.transcribe(CLIP.path))[0] == 200


async def test_no_process_outlives_a_supervisor_that_is_killed(start_agent: StartAgent) -> None:
    agent = await start_agent({**WHISPER_MODEL, "residency": {"afterTask": "Keep"}})
    assert (await agent.transcribe(CLIP.path))[0] == 200
    children = psutil.Process(agent.process.pid).children(recursive=True)
    assert len(children) >= 2
    agent.process.kill()
    await agent.process.wait()
    _, alive = await asyncio.to_thread(psutil.wait_procs, children, 10)
    assert alive == []


async def test_sigterm_finishes_what_runs_and_what_waits_and_refuses_what_is_new(
    start_agent: StartAgent,
) -> None:
    agent = await start_agent(WHISPER_MODEL, drain={"graceSeconds": 110})
    accepted = [asyncio.create_task(agent.transcribe(CLIP.path)) for _ in range(5)]
    await agent.when(lambda r: sum(m.queued + m.in_flight for m in r.models) == 5)
    await agent.when(is_running)
    agent.process.send_signal(signal.SIGTERM)
    await agent.when(lambda r: r.draining)
    async with agent.session.get(f"{agent.control}/readyz") as answer:
        assert answer.status == 503
    status, _ = await agent.transcribe(CLIP.path)
    assert status == 503
    assert [status for status, _ in await asyncio.gather(*accepted)] == [200] * 5
    assert await agent.end() == 0


async def test_a_recycle_ends_the_gpu_processes_once_for_each_id(start_agent: StartAgent) -> None:
    agent = await start_agent({**WHISPER_MODEL, "residency": {"afterTask": "Keep"}})
    assert (await agent.transcribe(CLIP.path))[0] == 200
    order = {"restartID": "r-1", "drainTimeoutSeconds": 30}
    for _ in range(3):
        assert (await agent.call("/recycle", order))[0] == 202
        report = await agent.when(lambda r: r.action is not None and r.action.state == "Done")
    assert report.agent.epoch == 1
    assert report.memory.used_bytes == 0
    assert agent.pids("gpu") == []
    assert (await agent.transcribe(CLIP.path))[0] == 200


async def test_a_restart_exits_0_and_the_next_boot_says_that_it_is_done(
    start_agent: StartAgent,
) -> None:
    agent = await start_agent(DIGITS_MODEL)
    before = await agent.report()
    order = {"restartID": "r-2", "drainTimeoutSeconds": 30}
    assert (await agent.call("/restart", order))[0] == 202
    async with asyncio.timeout(30):
        assert await agent.process.wait() == 0
    agent = await start_agent(DIGITS_MODEL)
    after = await agent.report()
    assert after.agent.boot_id != before.agent.boot_id
    assert after.action is not None
    assert (after.action.restart_id, after.action.step, after.action.state) == (
        "r-2",
        "InPlace",
        "Done",
    )
    status, body = await agent.call("/restart", order)
    assert (status, body["state"]) == (202, "Done")
    assert agent.process.returncode is None


async def test_what_a_model_holds_is_on_disk_for_the_next_boot(
    start_agent: StartAgent, tmp_path: Path
) -> None:
    agent = await start_agent(WHISPER_MODEL)
    assert (await agent.transcribe(CLIP.path))[0] == 200
    report = await agent.when(lambda report: report.models[0].state is ModelState.OFFLOADED)
    assert await agent.end() == 0
    (size,) = json.loads((tmp_path / "state/sizes.json").read_text())["sizes"].values()
    assert size["source"] == WHISPER_MODEL["source"]
    assert size["hostBytes"] == report.models[0].host_bytes
    assert size["vramBytes"] == pytest.approx(size["hostBytes"], rel=0.05)


async def test_a_client_that_goes_away_gives_its_place_up(start_agent: StartAgent) -> None:
    agent = await start_agent(WHISPER_MODEL)
    requests = [asyncio.create_task(agent.transcribe(CLIP.path)) for _ in range(3)]
    await agent.when(lambda r: r.models[0].queued == 3)
    requests[1].cancel()
    await agent.when(lambda r: r.models[0].queued == 2)
    assert [(await requests[n])[0] for n in (0, 2)] == [200, 200]
    with pytest.raises((asyncio.CancelledError, aiohttp.ClientError)):
        await requests[1]


async def test_an_address_in_use_is_named_and_ends_the_command(start_agent: StartAgent) -> None:
    agent = await start_agent(DIGITS_MODEL)
    address = agent.serving.removeprefix("http://")
    process = await asyncio.create_subprocess_exec(
        str(Path(sys.executable).with_name("vram-agent")),
        "serve",
        "--model",
        "a=ONNX:/m.onnx",
        "--listen-control=127.0.0.1:0",
        f"--listen-serving={address}",
        stderr=asyncio.subprocess.PIPE,
    )
    _, error = await process.communicate()
    assert process.returncode == 1
    assert f"listen.serving: cannot listen on {address}" in error.decode()


async def test_without_the_device_that_was_asked_for_the_agent_ends_with_1(
    start_agent: StartAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    agent = await start_agent(DIGITS_MODEL, device="CUDA")
    async with asyncio.timeout(60):
        assert await agent.process.wait() == 1
    assert await agent.end() == 1
    assert any(entry.get("event") == "cannot serve" for entry in agent.log)
