"""Shared host memory for the weights of one model group.

Why it exists: what is offloaded must be mapped by the template and by the GPU process alike, at no
cost per fork, and be given back model by model. One memfd, mapped ``MAP_SHARED`` region by region;
a GPU process inherits the mappings. Called by the runtimes (to place weights) and the engines.
It knows no torch.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from dataclasses import dataclass

from vram_agent.pages import HUGE_PAGE_BYTES, address_of, advise_huge_pages, align, populate


@dataclass(frozen=True, slots=True, kw_only=True)
class _Gap:
    offset: int
    nbytes: int


class Region:
    """A model's part of the arena: ``nbytes`` of shared memory, mapped in this process.

    Tensors may look into ``buffer``. ``release`` gives the pages back even if one still does; it
    then reads zeros, and the mapping goes with it.
    """

    def __init__(self, arena: Arena, offset: int, nbytes: int, reserved_bytes: int) -> None:
        self._arena = arena
        self.offset = offset
        self.nbytes = nbytes
        self.reserved_bytes = reserved_bytes
        self.buffer = mmap.mmap(arena.fd, reserved_bytes, mmap.MAP_SHARED, offset=offset)
        advise_huge_pages(self.buffer)
        self._is_released = False

    @property
    def address(self) -> int:
        """Address of the mapping in this process and, before its exec, in any fork of it."""
        return address_of(self.buffer)

    def populate(self, offset: int, nbytes: int) -> None:
        """Fault a part's pages in before it is written. Raises OSError when memory is out."""
        begin = offset - offset % mmap.PAGESIZE
        populate(self.address + begin, align(offset + nbytes, mmap.PAGESIZE) - begin)

    def release(self) -> None:
        """Give the pages back to the system, in every process that maps them. Idempotent."""
        if self._is_released:
            return
        self._is_released = True
        self.buffer.madvise(mmap.MADV_REMOVE)
        with contextlib.suppress(BufferError):
            self.buffer.close()
        self._arena.give_back(self)


class Arena:
    """One memfd; regions are taken and given back first fit. Not for use by several threads."""

    def __init__(self, name: str) -> None:
        self.fd = os.memfd_create(f"vram-arena-{name}"[:200], os.MFD_CLOEXEC)
        self._size = 0
        self._gaps: list[_Gap] = []
        self._regions: set[Region] = set()

    @property
    def used_bytes(self) -> int:
        """Bytes reserved by regions."""
        return sum(region.reserved_bytes for region in self._regions)

    def regions(self) -> frozenset[Region]:
        """Return the regions that are taken now."""
        return frozenset(self._regions)

    def allocate(self, nbytes: int) -> Region:
        """Return a region of at least ``nbytes``, zeroed. Raises OSError when memory is out."""
        # Multiples of a huge page, so that those and cudaHostRegister may cover each region.
        reserved = align(max(nbytes, 1), HUGE_PAGE_BYTES)
        for gap in self._gaps:
            if gap.nbytes >= reserved:
                self._gaps.remove(gap)
                if gap.nbytes > reserved:
                    rest = _Gap(offset=gap.offset + reserved, nbytes=gap.nbytes - reserved)
                    self._gaps.append(rest)
                offset = gap.offset
                break
        else:
            offset = self._size
            os.ftruncate(self.fd, offset + reserved)
            self._size += reserved
        region = Region(self, offset, nbytes, reserved)
        self._regions.add(region)
        return region

    def give_back(self, region: Region) -> None:
        """Take a released region's range for the next allocation; joins neighbours."""
        self._regions.discard(region)
        gaps = sorted(
            [*self._gaps, _Gap(offset=region.offset, nbytes=region.reserved_bytes)],
            key=lambda gap: gap.offset,
        )
        joined: list[_Gap] = []
        for gap in gaps:
            if joined and joined[-1].offset + joined[-1].nbytes == gap.offset:
                last = joined.pop()
                joined.append(_Gap(offset=last.offset, nbytes=last.nbytes + gap.nbytes))
            else:
                joined.append(gap)
        self._gaps = joined

    def let_go(self) -> int:
        """Unmap every region and close the memfd; return the bytes that something still looks into.

        Unlike ``close`` it takes nothing away: what is still looked into keeps its content, and
        its memory goes with the last look.
        """
        left_bytes = 0
        for region in self._regions:
            try:
                region.buffer.close()
            except BufferError:
                left_bytes += region.reserved_bytes
        self._regions.clear()
        os.close(self.fd)
        return left_bytes

    def close(self) -> None:
        """Release every region and close the memfd."""
        for region in list(self._regions):
            region.release()
        os.close(self.fd)
