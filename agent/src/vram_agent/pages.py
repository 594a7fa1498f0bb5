"""Pages of memory: huge where the system allows, faulted in at once, by several threads.

Why it exists: a fault for each 4 KiB costs more than the copy that follows it. Called by the arena
(host memory) and by the CPU device. It knows no model and no library.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import threading

HUGE_PAGE_BYTES = 1 << 21
_MADV_POPULATE_WRITE = 23
"""Linux 5.14: fault pages in at once; an error instead of a signal where memory is out."""
_POPULATING_THREADS = 4
"""More bring nothing: clearing pages is then bound by the memory itself."""
_libc = ctypes.CDLL(None, use_errno=True)


def align(nbytes: int, unit: int) -> int:
    """Return the least multiple of ``unit`` that is not below ``nbytes``."""
    return -(-nbytes // unit) * unit


def advise_huge_pages(buffer: mmap.mmap) -> None:
    """Ask for huge pages; nothing where the system does not allow them."""
    with contextlib.suppress(OSError, AttributeError):
        buffer.madvise(mmap.MADV_HUGEPAGE)


def address_of(buffer: mmap.mmap) -> int:
    """Return where a mapping lies in this process."""
    probe = ctypes.c_char.from_buffer(buffer)
    try:
        return ctypes.addressof(probe)
    finally:
        del probe


def populate(address: int, nbytes: int) -> None:
    """Fault all pages of a mapping in, by several threads that have ended when this returns.

    Nothing on kernels before 5.14: their pages come one by one as they are written. Raises OSError
    when memory is out.
    """
    count = max(
        1, min(_POPULATING_THREADS, len(os.sched_getaffinity(0)), nbytes // HUGE_PAGE_BYTES)
    )
    share = align(-(-nbytes // count), HUGE_PAGE_BYTES)
    faults: list[int] = []

    def work(start: int) -> None:
        length = min(share, nbytes - start)
        if length > 0 and _libc.madvise(
            ctypes.c_void_p(address + start), ctypes.c_size_t(length), _MADV_POPULATE_WRITE
        ):
            faults.append(ctypes.get_errno())

    threads = [threading.Thread(target=work, args=(n * share,)) for n in range(1, count)]
    for thread in threads:
        thread.start()
    work(0)
    for thread in threads:
        thread.join()
    fault = next((number for number in faults if number != errno.EINVAL), 0)
    if fault:
        raise OSError(fault, f"{nbytes} bytes of memory cannot be had: {os.strerror(fault)}")
