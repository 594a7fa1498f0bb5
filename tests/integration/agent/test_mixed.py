"""A thousand requests of every runtime in a budget for two models, while processes are killed and
clients go away: nothing is lost, nothing hangs, and in the end the books are right.

Clients obey Retry-After, as any client of the OpenAI library does. Kills and departures fall on
seeded counts of answers, so that they meet queues, transitions and tasks alike.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import msgspec
import numpy as np
import psutil
import pytest
from vram_agent.protocol import ModelState, Report, Runtime, Tier, parse_quantity

from tests.conformance.cases import CASES, FORMS, Case, array_of, infer, python_spec
from tests.integration.agent.clients import SPOKEN, Question
from tests.integration.agent.conftest import Agent, StartAgent

SEED = 20
REQUESTS = 1_000
CLIENTS = 60
KILLS = {"gpu": 16, "template": 6}
ABANDONED = 50
FORMS_TOO = ("FunASR", "TransformersWhisper")
"""With the suite's CASES, one of each runtime; a new runtime belongs into either."""
TRIES = 8
LIGHT_SHARE = 4
"""So many requests of any other kind come for each that must be listened to."""
BUDGET = "150Mi"
DECLARED = "64Mi"
"""Of each model: two of them fit."""
MIB = 1 << 20
LARGE_WIDTH = 2896
"""32 MiB of weights: what they hold is seen beside what heaps do."""
SLACK_BYTES = 12 * MIB
RESIDENCES: tuple[dict[str, Any], ...] = (
    {},
    {"afterTask": "Keep"},
    {"offloadTier": "Host"},
)
LATER = re.compile(r"model \S+: .*(died|ended: killed by signal 9)")
DIED = re.compile(r"model (\S+): process \d+ ended: killed by signal 9.* while it ran this task")


@dataclass
class Outcome:
    """How one request ended. ``status`` 0: its client went away."""

    model: str
    status: int
    words: str = ""
    later: list[str] = field(default_factory=list)


def large_case() -> Case:
    x = np.zeros((1, LARGE_WIDTH), np.float32)
    x[0, 1] = 1
    # The weight counts modulo 7, row after row.
    row = [(LARGE_WIDTH + column) % 7 for column in range(LARGE_WIDTH)]
    spec = python_spec("make_linear", rows=LARGE_WIDTH, columns=LARGE_WIDTH)
    return Case(
        "large", spec, infer(x), lambda result: _same(array_of(result, "y")[0].tolist(), row)
    )


def _same(got: list[float], wanted: list[int]) -> None:
    assert got == wanted


def choose_cases() -> dict[str, Case]:
    """A model of each runtime, and a large one, by name."""
    makers = CASES | {name: FORMS[name] for name in FORMS_TOO}
    cases = {name.lower(): make() for name, make in makers.items()}
    assert {case.spec.runtime for case in cases.values()} == set(Runtime)
    return cases | {"large": large_case()}


def configure(name: str, case: Case, index: int) -> dict[str, Any]:
    spec: dict[str, Any] = msgspec.to_builtins(case.spec)
    # These share processes: a load of one ends the others'.
    group = "shared" if case.spec.runtime in {Runtime.ONNX, Runtime.PYTHON} else ""
    residency = RESIDENCES[index % len(RESIDENCES)]
    return {**spec, "name": name, "vram": DECLARED, "group": group, "residency": residency}


class Traffic:
    """All requests, and what is done to the agent between them."""

    def __init__(
        self, agent: Agent, session: aiohttp.ClientSession, cases: dict[str, Case]
    ) -> None:
        self.outcomes: list[Outcome] = []
        self.kills: list[str] = []
        self._agent = agent
        self._session = session
        self._cases = cases
        self._questions = {name: Question(name, case.task) for name, case in cases.items()}
        random = Random(SEED)
        numbers = range(REQUESTS)
        shares = [1 if case.task.kind in SPOKEN else LIGHT_SHARE for case in cases.values()]
        self._models = random.choices(list(cases), shares, k=REQUESTS)
        self._patience = {n: random.randrange(1, 40) for n in random.sample(numbers, ABANDONED)}
        roles = [role for role, count in KILLS.items() for _ in range(count)]
        random.shuffle(roles)
        moments = sorted(random.sample(numbers[20:-20], len(roles)))
        self._due = deque(zip(moments, roles, strict=True))
        self._random = random
        self._gone: dict[int, list[asyncio.Event]] = {}

    async def run(self) -> None:
        """Send everything, by a fixed number of clients."""
        numbers = iter(range(REQUESTS))
        async with asyncio.TaskGroup() as clients:
            for _ in range(CLIENTS):
                clients.create_task(self._be_client(numbers))

    async def _be_client(self, numbers: Iterator[int]) -> None:
        for number in numbers:
            outcome = await self._send(number)
            self.outcomes.append(outcome)
            for event in self._gone.pop(len(self.outcomes), []):
                event.set()
            self._kill_what_is_due()

    async def _send(self, number: int) -> Outcome:
        model = self._models[number]
        asking = asyncio.create_task(self._ask(model))
        if number not in self._patience:
            return await asking
        gone = asyncio.Event()
        self._gone.setdefault(len(self.outcomes) + self._patience[number], []).append(gone)
        leaving = asyncio.create_task(gone.wait())
        await asyncio.wait({asking, leaving}, return_when=asyncio.FIRST_COMPLETED)
        leaving.cancel()
        if asking.done():
            return asking.result()
        asking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asking
        return Outcome(model, 0)

    async def _ask(self, model: str) -> Outcome:
        question = self._questions[model]
        later: list[str] = []
        for _ in range(TRIES):
            url = f"{self._agent.serving}{question.path}"
            headers = {"Content-Type": "application/json"} if question.is_json else {}
            async with self._session.post(url, data=question.body, headers=headers) as answer:
                body = await answer.json()
                if answer.status == 200:
                    self._cases[model].check(question.read(body))
                    return Outcome(model, 200, later=later)
                error = body["error"]
                words = error["message"] if isinstance(error, dict) else error
                if answer.status != 503:
                    return Outcome(model, answer.status, words, later)
                later.append(words)
                seconds = int(answer.headers["Retry-After"])
            await asyncio.sleep(seconds)
        return Outcome(model, 503, later[-1], later)

    def _kill_what_is_due(self) -> None:
        """One process at most; a role that has none now stays due until the next answer."""
        if not self._due or self._due[0][0] > len(self.outcomes):
            return
        role = self._due[0][1]
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            pids = self._agent.pids(role)
            if pids:
                os.kill(self._random.choice(pids), signal.SIGKILL)
                self.kills.append(role)
                self._due.popleft()


@pytest.mark.timeout(900)
async def test_a_thousand_requests_with_kills_and_departures_in_a_budget_for_two(
    start_agent: StartAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a busy machine the threads of one task would wait for each other most of the time.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    cases = choose_cases()
    agent = await start_agent(
        *(configure(name, case, index) for index, (name, case) in enumerate(cases.items())),
        vram={"budget": BUDGET},
    )
    await agent.when(lambda r: bool(r.devices))
    fds = list_fds(agent)
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=CLIENTS), timeout=aiohttp.ClientTimeout(total=280)
    ) as session:
        traffic = Traffic(agent, session, cases)
        watch = asyncio.create_task(watch_budget(agent))
        await traffic.run()
        watch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watch
    check_outcomes(traffic)
    report = await agent.when(lambda r: r.idle)
    assert [(m.in_flight, m.queued) for m in report.models] == [(0, 0)] * len(cases)
    await check_ledger(agent)
    await check_that_nothing_stays(agent, list(cases), fds)


def check_outcomes(traffic: Traffic) -> None:
    statuses = Counter(outcome.status for outcome in traffic.outcomes)
    later = [words for outcome in traffic.outcomes for words in outcome.later]
    print(f"\nstatuses {dict(statuses)}, kills {Counter(traffic.kills)}, told later {len(later)}")
    assert len(traffic.outcomes) == REQUESTS
    assert Counter(traffic.kills) == KILLS
    assert set(statuses) <= {0, 200, 502}
    assert 0 < statuses[0] <= ABANDONED
    # A killed process costs the one task that ran in it, and nothing else.
    assert statuses[502] <= len(traffic.kills)
    for outcome in traffic.outcomes:
        if outcome.status == 502:
            found = DIED.match(outcome.words)
            assert found, outcome.words
            assert found[1] == outcome.model
    assert [words for words in later if not LATER.match(words)] == []


async def watch_budget(agent: Agent) -> None:
    """What models hold in VRAM never passes the budget, whatever happens."""
    budget_bytes = parse_quantity(BUDGET)
    while True:
        report = await agent.report()
        assert report.memory.model_bytes <= budget_bytes
        in_vram = [m.name for m in report.models if m.state is ModelState.RESIDENT]
        assert len(in_vram) <= 2, in_vram
        await asyncio.sleep(0.5)


async def check_ledger(agent: Agent) -> None:
    """The report's figures are what the kernel counts, model by model."""
    assert (await agent.call("/models/large/load"))[0] == 200
    report = await agent.when(lambda r: r.idle)
    compare_with_kernel(agent, report)
    large = next(m for m in report.models if m.name == "large")
    assert (large.state, large.tier) == (ModelState.RESIDENT, Tier.VRAM)
    assert large.vram_bytes == pytest.approx(LARGE_WIDTH**2 * 4, rel=0.01)
    before_bytes = held_bytes(agent)
    assert (await agent.call("/models/large/offload?tier=PinnedHost"))[0] == 200
    report = await agent.when(lambda r: r.idle)
    compare_with_kernel(agent, report)
    freed_bytes = before_bytes - held_bytes(agent)
    assert freed_bytes == pytest.approx(large.vram_bytes, abs=SLACK_BYTES)


def compare_with_kernel(agent: Agent, report: Report) -> None:
    processes = len(agent.pids("gpu"))
    assert report.memory.used_bytes == pytest.approx(held_bytes(agent), abs=MIB * (processes + 1))
    held = {m.name: m.vram_bytes for m in report.models if m.state is ModelState.RESIDENT}
    assert (
        report.memory.model_bytes == sum(held.values()) == sum(m.vram_bytes for m in report.models)
    )
    assert report.memory.residual_bytes == report.memory.used_bytes - report.memory.model_bytes
    # Regions begin at multiples of 2 MiB, and a region's last pages are never touched.
    loose_bytes = report.memory.host_bytes - arena_bytes(agent)
    assert 0 <= loose_bytes < 2 * MIB * len(report.models)


async def check_that_nothing_stays(agent: Agent, models: list[str], fds: Counter[str]) -> None:
    order = {"restartID": "mixed", "drainTimeoutSeconds": 30}
    assert (await agent.call("/recycle", order))[0] == 202
    report = await agent.when(lambda r: r.action is not None and r.action.state == "Done")
    assert agent.pids("gpu") == []
    assert (report.memory.used_bytes, report.memory.model_bytes) == (0, 0)
    for name in models:
        assert (await agent.call(f"/models/{name}/unload"))[0] == 200
    report = await agent.when(lambda r: r.idle)
    assert {(m.state, m.tier) for m in report.models} == {(ModelState.ABSENT, Tier.DISK)}
    assert report.memory.host_bytes == 0
    assert psutil.Process(agent.process.pid).children(recursive=True) == []
    assert list_fds(agent) - fds == Counter()


def held_bytes(agent: Agent) -> int:
    """What the GPU processes hold alone, as the kernel sums it up."""
    total_bytes = 0
    for pid in agent.pids("gpu"):
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        found = re.search(r"^Private_Dirty: +(\d+) kB$", rollup, re.MULTILINE)
        assert found
        total_bytes += int(found[1]) * 1024
    return total_bytes


def arena_bytes(agent: Agent) -> int:
    """The pages that the arenas have, by their files."""
    files: dict[tuple[int, int], int] = {}
    for pid in agent.pids("template"):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            if "vram-arena" in str(link.readlink()):
                # Each mapping holds a descriptor of its own to the one file.
                status = link.stat()
                files[pid, status.st_ino] = status.st_blocks * 512
    return sum(files.values())


def list_fds(agent: Agent) -> Counter[str]:
    """The agent's own descriptors by kind; sockets and pipes have numbers in their names."""
    links = Path(f"/proc/{agent.process.pid}/fd").iterdir()
    return Counter(str(link.readlink()).partition("[")[0] for link in links)
