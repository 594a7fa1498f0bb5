"""Host memory is locked in the background, within its budget, and the rest stays pageable."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path

from vram_agent.engine.pinning import CHUNK_BYTES, PinnedPages
from vram_agent.pages import address_of

MIB = 1 << 20
_libc = ctypes.CDLL(None, use_errno=True)


class Locker:
    """Locks pages with mlock: what a driver does, without a device."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []

    def register(self, address: int, nbytes: int) -> str:
        self.calls.append(("register", address, nbytes))
        if _libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(nbytes)):
            return os.strerror(ctypes.get_errno())
        return ""

    def unregister(self, address: int) -> None:
        self.calls.append(("unregister", address, 0))
        length = next(n for kind, at, n in self.calls if kind == "register" and at == address)
        assert _libc.munlock(ctypes.c_void_p(address), ctypes.c_size_t(length)) == 0


class Scripted:
    """Answers as the test says; ``answer`` runs on the locking thread."""

    def __init__(self, answer: Callable[[int], str]) -> None:
        self.answer = answer
        self.tried: list[int] = []
        self.unregistered: list[int] = []

    def register(self, address: int, nbytes: int) -> str:
        self.tried.append(address)
        return self.answer(address)

    def unregister(self, address: int) -> None:
        self.unregistered.append(address)


def locked_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmLck:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmLck")


def test_what_is_wanted_is_locked_and_what_is_forgotten_is_not() -> None:
    nbytes = 3 * MIB + 100
    with mmap.mmap(-1, 4 * MIB) as pages:
        address, before = address_of(pages), locked_bytes()
        pinned = PinnedPages(Locker(), 1 << 40)
        pinned.want(address, nbytes)
        pinned.wait()
        assert pinned.refusal == ""
        assert pinned.is_pinned(address)
        # Whole pages: 3 MiB and one of 4 KiB.
        assert pinned.pinned_bytes == 3 * MIB + 4096
        assert locked_bytes() - before == 3 * MIB + 4096
        pinned.forget(address, nbytes)
        assert not pinned.is_pinned(address)
        assert locked_bytes() == before


def test_a_chunk_is_locked_once_however_often_it_is_wanted() -> None:
    registrar = Scripted(lambda _: "")
    pages = PinnedPages(registrar, 1 << 40)
    for _ in range(3):
        pages.want(0, 2 * CHUNK_BYTES + 1)
        pages.wait()
    assert registrar.tried == [0, CHUNK_BYTES, 2 * CHUNK_BYTES]


def test_the_budget_bounds_what_is_locked_and_is_named() -> None:
    registrar = Scripted(lambda _: "")
    pages = PinnedPages(registrar, 2 * CHUNK_BYTES)
    pages.want(0, 5 * CHUNK_BYTES)
    pages.wait()
    assert pages.pinned_bytes == 2 * CHUNK_BYTES
    assert pages.refusal == "the budget of 128 MiB is used up"
    assert not pages.is_pinned(2 * CHUNK_BYTES)


def test_after_a_refusal_no_other_chunk_is_tried() -> None:
    registrar = Scripted(lambda address: "limit" if address else "")
    pages = PinnedPages(registrar, 1 << 40)
    pages.want(0, 4 * CHUNK_BYTES)
    pages.wait()
    pages.want(8 * CHUNK_BYTES, CHUNK_BYTES)
    pages.wait()
    assert registrar.tried == [0, CHUNK_BYTES]
    assert pages.refusal == "limit"
    assert pages.is_pinned(0)


def test_a_registrar_that_raises_is_a_refusal() -> None:
    def fail(_: int) -> str:
        raise RuntimeError("no driver")

    pages = PinnedPages(Scripted(fail), 1 << 40)
    pages.want(0, 1)
    pages.wait()
    assert "failed" in pages.refusal


def test_forgetting_waits_for_the_chunk_that_is_being_locked_and_drops_the_rest() -> None:
    begun, may_end = threading.Event(), threading.Event()

    def answer(_: int) -> str:
        begun.set()
        assert may_end.wait(20)
        return ""

    registrar = Scripted(answer)
    pages = PinnedPages(registrar, 1 << 40)
    pages.want(0, 3 * CHUNK_BYTES)
    assert begun.wait(20)
    forgetting = threading.Thread(target=pages.forget, args=(0, 3 * CHUNK_BYTES))
    forgetting.start()
    assert registrar.unregistered == []
    may_end.set()
    forgetting.join(20)
    assert not forgetting.is_alive()
    assert registrar.tried == [0]
    assert registrar.unregistered == [0]
    assert pages.pinned_bytes == 0
