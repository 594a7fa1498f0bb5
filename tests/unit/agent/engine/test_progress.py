"""What a load tells of itself, on a clock of the test's own."""

from __future__ import annotations

from vram_agent.progress import advance, measuring, step
from vram_agent.protocol import LoadProgress, LoadStep


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def progress(step_: LoadStep, done: int | None = None, total: int | None = None) -> LoadProgress:
    return LoadProgress(step=step_, done_bytes=done, total_bytes=total)


def test_a_step_is_told_at_once_and_its_bytes_ten_times_a_second() -> None:
    told: list[LoadProgress] = []
    clock = Clock()
    with measuring(told.append, clock), step(LoadStep.COPYING_TO_HOST, 100):
        for _ in range(10):
            clock.now += 0.03
            advance(10)
    copying = LoadStep.COPYING_TO_HOST
    assert told == [progress(copying, done, 100) for done in (0, 40, 80, 100)]


def test_what_is_not_known_is_left_out_and_an_outer_step_comes_back() -> None:
    told: list[LoadProgress] = []
    with measuring(told.append, Clock()), step(LoadStep.READING):
        with step(LoadStep.COPYING_TO_HOST, 5):
            advance(5)
        advance(1)
    assert told == [
        progress(LoadStep.READING),
        progress(LoadStep.COPYING_TO_HOST, 0, 5),
        progress(LoadStep.COPYING_TO_HOST, 5, 5),
        progress(LoadStep.READING, 1),
    ]


def test_files_that_a_library_reads_one_by_one_are_counted_together_without_a_total() -> None:
    told: list[LoadProgress] = []
    with measuring(told.append, Clock()), step(LoadStep.READING):
        for size in (3, 4):
            with step(LoadStep.READING, size):
                advance(size)
    assert told[-1] == progress(LoadStep.READING, 7)


def test_nothing_is_told_outside_of_a_load() -> None:
    told: list[LoadProgress] = []
    with measuring(told.append, Clock()):
        advance(1)
    with step(LoadStep.READING, 1):
        advance(1)
    assert told == []
