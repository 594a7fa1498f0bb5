from __future__ import annotations

import asyncio
from functools import partial

import pytest
from vram_agent.serial import Serial


class Steps:
    """Work that says what it does and goes on when it is let."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.may_end = asyncio.Event()

    async def take(self, name: str) -> str:
        self.said.append(f"{name} begins")
        await self.may_end.wait()
        self.said.append(f"{name} ends")
        return name


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_work_is_done_one_after_the_other_in_the_order_it_was_asked_for() -> None:
    serial, steps = Serial(), Steps()
    asked = [asyncio.create_task(serial.run(partial(steps.take, name))) for name in "abc"]
    await settle()
    assert steps.said == ["a begins"]
    steps.may_end.set()
    assert await asyncio.gather(*asked) == ["a", "b", "c"]
    assert steps.said == [f"{name} {word}" for name in "abc" for word in ("begins", "ends")]


@pytest.mark.parametrize("given_up", ["a", "b"], ids=["while it runs", "before its turn"])
async def test_work_that_its_caller_gives_up_is_done_all_the_same(given_up: str) -> None:
    serial, steps = Serial(), Steps()
    asked = {name: asyncio.create_task(serial.run(partial(steps.take, name))) for name in "abc"}
    await settle()
    asked[given_up].cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked[given_up]
    steps.may_end.set()
    assert await asked["c"] == "c"
    assert steps.said == [f"{name} {word}" for name in "abc" for word in ("begins", "ends")]


async def test_an_error_is_its_callers_and_the_next_has_its_turn() -> None:
    serial = Serial()

    async def fail() -> None:
        raise ValueError("broken")

    async def answer() -> int:
        return 7

    with pytest.raises(ValueError, match="broken"):
        await serial.run(fail)
    assert await serial.run(answer) == 7


async def test_nothing_is_made_for_a_caller_that_goes_before_the_loop_turns() -> None:
    """A coroutine made beforehand would be warned of as never awaited; warnings are errors here."""
    serial, steps = Serial(), Steps()
    first = asyncio.create_task(serial.run(partial(steps.take, "a")))
    await settle()
    loop_tasks = asyncio.all_tasks()
    second = asyncio.create_task(serial.run(partial(steps.take, "b")))
    await settle()
    (waiting,) = asyncio.all_tasks() - loop_tasks - {second}
    waiting.cancel()  # as the end of the loop does with whatever is left
    with pytest.raises(asyncio.CancelledError):
        await second
    steps.may_end.set()
    assert await first == "a"
    assert steps.said == ["a begins", "a ends"]
