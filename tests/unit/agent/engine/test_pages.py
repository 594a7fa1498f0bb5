"""Pages can be had all at once; where they cannot, that is an error and no signal."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest
from vram_agent.pages import address_of, populate

MIB = 1 << 20


def resident_bytes(address: int) -> int:
    """What of the mapping at an address is in memory, as the kernel says."""
    found = 0
    is_ours = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            first, last = (int(part, 16) for part in head.split("-"))
            is_ours = first <= address < last
        elif is_ours and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


@pytest.mark.parametrize("nbytes", [4096, 2 * MIB, 9 * MIB + 4096])
def test_every_page_is_there_before_it_is_written(nbytes: int) -> None:
    fd = os.memfd_create("t")
    os.ftruncate(fd, nbytes)
    with mmap.mmap(fd, nbytes) as pages:
        assert resident_bytes(address_of(pages)) == 0
        populate(address_of(pages), nbytes)
        assert resident_bytes(address_of(pages)) == nbytes
    os.close(fd)


def test_pages_that_cannot_be_had_are_an_error() -> None:
    fd = os.memfd_create("t")
    os.ftruncate(fd, MIB)
    with mmap.mmap(fd, MIB) as pages:
        # Behind the end of the file there is nothing to map: a write would be a SIGBUS.
        os.ftruncate(fd, 0)
        with pytest.raises(OSError, match="1048576 bytes of memory cannot be had"):
            populate(address_of(pages), MIB)
    os.close(fd)
