"""The agent under load: flat memory, a SIGTERM that loses nothing, queues that are fair.

The long forms of the first two are ``python -m bench flat`` and ``python -m bench drain``.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from bench.drain import CLIENTS, SENDING, WAITING, drain
from bench.flat import ROLES, growth, load
from bench.overhead import as_served, make_tiny
from bench.served import serve
from tests.integration.agent.conftest import DIGITS_MODEL, Agent, StartAgent

REQUESTS = 1_920
POINTS = 10
GROWTH_BYTES = 1 << 20
"""As much as a KiB kept of each request would take between the thirds that are compared."""
TASK_SECONDS = 1.5
HERE = str(Path(__file__).parent)


def sleeper(name: str, group: str = "") -> dict[str, Any]:
    return {
        "name": name,
        "runtime": "Python",
        "source": "served_models:make_sleeper",
        "group": group,
        "options": {"path": HERE},
        "residency": {"afterTask": "Keep"},
    }


async def ask(agent: Agent, model: str, seconds: float) -> tuple[int, str | None]:
    """Send one task that takes so long; return status and Retry-After."""
    body = {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1.0]}],
        "parameters": {"seconds": seconds},
    }
    url = f"{agent.serving}/v2/models/{model}/infer"
    async with agent.session.post(url, json=body) as answer:
        await answer.read()
        return answer.status, answer.headers.get("Retry-After")


async def test_memory_and_descriptors_are_flat_over_thousands_of_requests(tmp_path: Path) -> None:
    model = make_tiny(tmp_path)
    with serve(tmp_path, [as_served(model)]) as served:
        points = await load(served, model, REQUESTS, POINTS)
    assert points[-1].requests == REQUESTS
    for role in ROLES:
        assert growth(points, role, "uss_bytes") < GROWTH_BYTES, points
        assert growth(points, role, "fds") == 0, points


async def test_sigterm_under_200_requests_at_once_loses_none_that_was_accepted(
    tmp_path: Path,
) -> None:
    drained = await asyncio.to_thread(drain, tmp_path)
    assert set(drained.accepted) == {"200"}
    # Each client had a request under way when the signal came, and they had asked before.
    assert drained.accepted["200"] >= CLIENTS + SENDING + WAITING
    # Who comes when the process has ended already finds nobody.
    answered = {word for word in drained.later if not word.startswith("lost")}
    assert answered <= {"200", "refused as documented"}
    assert "refused as documented" in answered
    assert drained.exit_status == 0


async def test_a_model_with_one_request_is_served_before_the_long_queue_of_its_mate(
    start_agent: StartAgent,
) -> None:
    agent = await start_agent(sleeper("busy", "g"), sleeper("rare", "g"))
    for name in ("busy", "rare", "busy"):  # the load of the second ends the first's process
        assert (await ask(agent, name, 0))[0] == 200
    assert (await ask(agent, "rare", 0))[0] == 200
    many = [asyncio.create_task(ask(agent, "busy", 0.2)) for _ in range(20)]
    await agent.when(lambda r: r.models[0].queued >= 10)
    assert (await ask(agent, "rare", 0))[0] == 200
    assert (await agent.report()).models[0].queued > 0
    assert {status for status, _ in await asyncio.gather(*many)} == {200}


async def test_a_full_queue_names_the_time_that_tasks_took_and_a_place_given_up_is_free(
    start_agent: StartAgent,
) -> None:
    agent = await start_agent(sleeper("slow"), DIGITS_MODEL, queue={"maxDepth": 1})
    assert (await ask(agent, "slow", TASK_SECONDS))[0] == 200
    running = asyncio.create_task(ask(agent, "slow", 2 * TASK_SECONDS))
    await agent.when(lambda r: r.models[0].in_flight == 1)
    waiting = asyncio.create_task(ask(agent, "slow", 0))
    await agent.when(lambda r: r.models[0].queued == 1)
    status, retry_after = await ask(agent, "slow", 0)
    assert status == 429
    assert retry_after is not None
    assert int(retry_after) > TASK_SECONDS  # whole seconds; without a measurement it would be 1
    waiting.cancel()
    await agent.when(lambda r: r.models[0].queued == 0)
    assert (await ask(agent, "slow", 0))[0] == 200
    assert (await running)[0] == 200
