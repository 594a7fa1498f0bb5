"""The keyed queue, in fake time: when, how often and one at a time."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

import pytest
from vram_operator.queue import KeyedQueue, RetryError, retry_seconds

pytestmark = pytest.mark.looptime


class Recorder:
    """Handles keys as scripted and writes down when."""

    def __init__(self) -> None:
        self.visits: list[tuple[float, str]] = []
        self.errors: list[Exception] = []
        self.answers: list[float | Exception | None] = []
        self.duration = 0.0
        self.running: set[str] = set()
        self.overlaps = 0

    async def handle(self, key: str) -> float | None:
        self.overlaps += key in self.running
        self.running.add(key)
        try:
            self.visits.append((asyncio.get_running_loop().time(), key))
            await asyncio.sleep(self.duration)
            answer = self.answers.pop(0) if self.answers else None
            if isinstance(answer, Exception):
                raise answer
            return answer
        finally:
            self.running.discard(key)

    def on_error(self, key: str, error: Exception) -> None:
        self.errors.append(error)

    @property
    def times(self) -> list[float]:
        return [round(when, 3) for when, _ in self.visits]


async def play(
    recorder: Recorder, seconds: float, script: Callable[[KeyedQueue[str]], Any]
) -> KeyedQueue[str]:
    queue: KeyedQueue[str] = KeyedQueue(recorder.handle, recorder.on_error, lambda: 0.0)
    task = asyncio.create_task(queue.run(workers=4))
    done = script(queue)
    if inspect.isawaitable(done):
        await done
    await asyncio.sleep(seconds)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    return queue


async def test_a_key_added_many_times_is_handled_once() -> None:
    recorder = Recorder()
    await play(recorder, 1, lambda queue: list(map(queue.add, "aaaaaaaaa")))
    assert recorder.visits == [(0, "a")]


async def test_the_answer_of_a_visit_says_when_the_next_one_is() -> None:
    recorder = Recorder()
    recorder.answers = [5.0, 7.0, None]
    await play(recorder, 100, lambda queue: queue.add("a"))
    assert recorder.times == [0, 5, 12]


async def test_of_two_times_the_earlier_counts() -> None:
    recorder = Recorder()

    def script(queue: KeyedQueue[str]) -> None:
        queue.add_after("a", 8)
        queue.add_after("a", 3)
        queue.add_after("a", 5)

    await play(recorder, 100, script)
    assert recorder.times == [3]


async def test_adding_now_replaces_a_later_time() -> None:
    recorder = Recorder()

    def script(queue: KeyedQueue[str]) -> None:
        queue.add_after("a", 8)
        queue.add("a")

    await play(recorder, 100, script)
    assert recorder.times == [0]


async def test_a_key_is_never_handled_twice_at_the_same_time() -> None:
    recorder = Recorder()
    recorder.duration = 10

    async def script(queue: KeyedQueue[str]) -> None:
        for _ in range(5):
            queue.add("a")
            await asyncio.sleep(1)

    await play(recorder, 100, script)
    assert recorder.overlaps == 0
    assert recorder.times == [0, 10]


async def test_different_keys_are_handled_side_by_side() -> None:
    recorder = Recorder()
    recorder.duration = 10
    await play(recorder, 100, lambda queue: list(map(queue.add, "abc")))
    assert recorder.times == [0, 0, 0]


async def test_errors_are_told_and_come_back_with_growing_delays() -> None:
    recorder = Recorder()
    recorder.answers = [ValueError("1"), ValueError("2"), ValueError("3"), None]
    await play(recorder, 100, lambda queue: queue.add("a"))
    assert recorder.times == [0, 0.5, 1.5, 3.5]
    assert [str(error) for error in recorder.errors] == ["1", "2", "3"]


async def test_a_success_lets_the_delays_start_over() -> None:
    recorder = Recorder()
    recorder.answers = [ValueError(), ValueError(), 1.0, ValueError(), None]
    await play(recorder, 100, lambda queue: queue.add("a"))
    assert recorder.times == [0, 0.5, 1.5, 2.5, 3.0]


async def test_the_server_may_ask_for_a_longer_delay() -> None:
    recorder = Recorder()
    recorder.answers = [RetryError("throttled", after_seconds=10), None]
    await play(recorder, 100, lambda queue: queue.add("a"))
    assert recorder.times == [0, 10]


async def test_events_during_a_failed_visit_do_not_undo_its_delay() -> None:
    recorder = Recorder()
    recorder.duration = 1
    recorder.answers = [ValueError(), None]

    async def script(queue: KeyedQueue[str]) -> None:
        queue.add("a")
        await asyncio.sleep(0.5)
        queue.add("a")

    await play(recorder, 100, script)
    assert recorder.times == [0, 1.5]


async def test_the_length_counts_keys_that_are_due() -> None:
    recorder = Recorder()
    recorder.duration = 10
    seen: list[int] = []

    async def script(queue: KeyedQueue[str]) -> None:
        for key in "abcdef":
            queue.add(key)
        queue.add_after("later", 50)
        await asyncio.sleep(1)
        seen.append(len(queue))

    await play(recorder, 100, script)
    assert seen == [2]


async def test_nothing_is_left_running_after_a_cancellation() -> None:
    recorder = Recorder()
    recorder.duration = 1000
    queue = await play(recorder, 1, lambda queue: queue.add("a"))
    assert recorder.running == set()
    queue.add_after("b", 5)


@pytest.mark.parametrize(
    ("failures", "jitter", "seconds"),
    [(1, 0, 0.5), (2, 0, 1.0), (1, 1, 0.25), (8, 0, 60.0), (9999, 0, 60.0), (9999, 1, 30.0)],
)
def test_delays_double_up_to_a_minute_and_jitter_takes_off_up_to_half(
    failures: int, jitter: float, seconds: float
) -> None:
    assert retry_seconds(failures, jitter) == seconds
