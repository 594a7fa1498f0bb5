"""Shared memory for weights: nothing overlaps, and what is released goes back to the system."""

from __future__ import annotations

import itertools
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vram_agent.engine.arena import Arena, Region
from vram_agent.pages import HUGE_PAGE_BYTES, align

MIB = 1 << 20


def held_bytes(arena: Arena) -> int:
    return os.fstat(arena.fd).st_blocks * 512


@pytest.mark.parametrize(("nbytes", "aligned"), [(0, 0), (1, 512), (512, 512), (513, 1024)])
def test_alignment(nbytes: int, aligned: int) -> None:
    assert align(nbytes, 512) == aligned


def test_what_is_still_looked_into_outlives_an_arena_that_lets_go() -> None:
    arena = Arena("t")
    kept, dropped = arena.allocate(10), arena.allocate(10)
    kept.buffer[:5] = b"whole"
    with memoryview(kept.buffer) as look:
        assert arena.let_go() == kept.reserved_bytes
        assert bytes(look[:5]) == b"whole"
    assert dropped.buffer.closed
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(arena.fd)


def test_a_released_region_goes_back_while_the_others_stay() -> None:
    arena = Arena("t")
    one, other = arena.allocate(8 * MIB), arena.allocate(4 * MIB)
    one.buffer[:] = b"1" * len(one.buffer)
    other.buffer[:] = b"2" * len(other.buffer)
    assert held_bytes(arena) == 12 * MIB
    one.release()
    one.release()
    assert held_bytes(arena) == 4 * MIB
    assert arena.used_bytes == 4 * MIB
    assert bytes(other.buffer[:4]) == b"2222"
    arena.close()


def test_a_region_that_is_still_looked_into_gives_its_pages_back_all_the_same() -> None:
    arena = Arena("t")
    region = arena.allocate(4 * MIB)
    region.buffer[:] = b"x" * len(region.buffer)
    with memoryview(region.buffer) as view:
        region.release()
        assert held_bytes(arena) == 0
        assert bytes(view[:2]) == b"\0\0"
    arena.close()


def test_a_fork_sees_what_is_written_later() -> None:
    arena = Arena("t")
    region = arena.allocate(MIB)
    ready, go = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.read(go[0], 1)
        os._exit(0 if region.buffer[:5] == b"later" else 1)
    region.buffer[:5] = b"later"
    os.write(go[1], b"!")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    for fd in (*ready, *go):
        os.close(fd)
    arena.close()


def test_regions_begin_where_huge_pages_may() -> None:
    arena = Arena("t")
    regions = [arena.allocate(size) for size in (1, HUGE_PAGE_BYTES, HUGE_PAGE_BYTES + 1, 0)]
    assert [region.offset // HUGE_PAGE_BYTES for region in regions] == [0, 1, 2, 4]
    assert all(region.offset % HUGE_PAGE_BYTES == 0 for region in regions)
    assert all(region.address % 4096 == 0 for region in regions)
    arena.close()


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("allocate"), st.integers(1, 3 * HUGE_PAGE_BYTES)),
            st.tuples(st.just("release"), st.integers(0, 100)),
        ),
        max_size=20,
    )
)
def test_regions_never_overlap_and_gaps_are_used_again(steps: list[tuple[str, int]]) -> None:
    arena = Arena("t")
    held: list[tuple[Region, bytes]] = []
    for number, (step, value) in enumerate(steps):
        if step == "allocate":
            region = arena.allocate(value)
            mark = number.to_bytes(2, "little") * 8
            assert region.buffer[: len(mark)] == bytes(len(mark))
            region.buffer[: len(mark)] = mark
            held.append((region, mark))
        elif held:
            region, _ = held.pop(value % len(held))
            region.release()
        spans = sorted((r.offset, r.offset + r.reserved_bytes) for r, _ in held)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
        for region, mark in held:
            assert region.buffer[: len(mark)] == mark
        total = sum(r.reserved_bytes for r, _ in held)
        assert arena.used_bytes == total
    for region, _ in held:
        region.release()
    assert held_bytes(arena) == 0
    # Everything is one gap again: the next allocation begins at the start.
    assert arena.allocate(1).offset == 0
    arena.close()
