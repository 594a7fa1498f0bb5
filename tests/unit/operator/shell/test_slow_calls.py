"""Nobody waits for an agent that takes its time over a new config."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest
from vram_agent.protocol import AgentConfig, ConfigMetadata
from vram_operator.core.plan import Knock, PushConfig
from vram_operator.core.snapshot import PushAnswer
from vram_operator.facts import Facts
from vram_operator.slow_calls import SlowCalls

from tests.support.clocks import StoppedClock
from tests.support.factories import NOW, ago, make_pod

KEY = ("lab", "speech")
POD = make_pod()


@dataclass
class Agents:
    """Answers a call when it is let go."""

    go: asyncio.Event = field(default_factory=asyncio.Event)
    begun: list[Any] = field(default_factory=list)
    ended: list[Any] = field(default_factory=list)
    failure: Exception | None = None

    async def carry_out(self, namespace: str, action: Any) -> None:
        assert namespace == "lab"
        self.begun.append(action)
        await self.go.wait()
        if self.failure is not None:
            raise self.failure
        self.ended.append(action)


def push(generation: int) -> PushConfig:
    config = AgentConfig(metadata=ConfigMetadata(generation=generation))
    return PushConfig(pod=POD, config=config)


@dataclass
class Bench:
    agents: Agents = field(default_factory=Agents)
    facts: Facts = field(default_factory=Facts)
    news: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        pods: Any = self.agents
        self.calls = SlowCalls(pods, self.facts, StoppedClock())
        self.calls.on_answer = self.news.append

    async def settle(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)


@pytest.fixture
async def bench() -> Bench:
    return Bench()


async def test_a_push_under_way_counts_as_one_not_answered_and_its_end_is_news(
    bench: Bench,
) -> None:
    bench.calls.begin(KEY, push(3))
    known = bench.facts.agent(POD.uid).push
    assert known is not None
    assert (known.generation, known.status, known.at) == (3, 0, NOW)
    await bench.settle()
    assert bench.news == []
    bench.agents.go.set()
    await bench.settle()
    assert (bench.agents.ended, bench.news) == ([push(3)], [KEY])


async def test_a_newer_config_takes_the_place_of_one_under_way(bench: Bench) -> None:
    for generation in (3, 4):
        bench.calls.begin(KEY, push(generation))
        await bench.settle()
    bench.agents.go.set()
    await bench.settle()
    assert bench.agents.begun == [push(3), push(4)]
    assert (bench.agents.ended, bench.news) == ([push(4)], [KEY])


async def test_a_knock_under_way_is_not_planned_again(bench: Bench) -> None:
    bench.facts.record_word(POD.uid, 401, ago(60))
    bench.calls.begin(KEY, Knock(pod=POD))
    assert bench.facts.agent(POD.uid).refused_at == NOW
    bench.agents.go.set()
    await bench.settle()


async def test_a_call_that_breaks_is_told_and_ends(bench: Bench) -> None:
    bench.agents.failure = RuntimeError("a fault of ours")
    bench.agents.go.set()
    bench.calls.begin(KEY, push(3))
    await bench.settle()
    assert bench.news == [KEY]


@pytest.mark.parametrize(
    ("generation", "status", "said"),
    [
        pytest.param(3, 400, 400, id="why it was refused stays said"),
        pytest.param(2, 400, 0, id="of another config it says nothing"),
        pytest.param(3, 401, 0, id="the agent takes our calls by now"),
    ],
)
async def test_what_is_said_of_a_config_that_is_pushed_again(
    bench: Bench, generation: int, status: int, said: int
) -> None:
    bench.facts.record_push(POD.uid, PushAnswer(generation=generation, at=ago(300), status=status))
    bench.facts.record_word(POD.uid, 404, ago(1))
    bench.calls.begin(KEY, push(3))
    agent = bench.facts.agent(POD.uid)
    assert agent.push is not None
    assert (agent.push.generation, agent.push.status, agent.push.at) == (3, said, NOW)
    assert not agent.refuses
    bench.agents.go.set()
    await bench.settle()
