"""The engine on a real device: the same bits, in the right order, with or without locked pages."""

from __future__ import annotations

from vram_agent.devices.cuda import CudaDevice

from tests.gpu.inside import (
    MIB,
    call_apart,
    restore_loose_and_locked,
    restore_where_the_driver_refuses,
    reuse_a_block_that_a_kernel_still_reads,
)

NBYTES = 200 * MIB
"""More than a chunk that is locked at a time, and no multiple of one."""


def test_weights_come_back_bit_by_bit_from_loose_and_from_locked_pages(cuda: CudaDevice) -> None:
    found = call_apart(restore_loose_and_locked, cuda.place(""), NBYTES)
    assert found["same"] == [True] * 6
    assert found["devices"] == {"cuda"}
    assert found["words"] == ""
    # Nothing at first; all of it, in whole pages, from the second restore on.
    assert found["locked"][0] == 0
    assert NBYTES * 0.99 < found["locked"][1] == found["locked"][2] < NBYTES * 1.01


def test_where_the_driver_refuses_to_lock_pages_copies_are_pageable_and_it_is_said(
    cuda: CudaDevice,
) -> None:
    found = call_apart(restore_where_the_driver_refuses, cuda.place(""), NBYTES)
    assert found["same"] == [True, True]
    assert found["locked"] == 0
    for words in found["words"]:
        assert "stay in pageable memory: cudaHostRegister answers" in words


def test_no_copy_overtakes_a_kernel_that_still_reads_the_block(cuda: CudaDevice) -> None:
    found = call_apart(reuse_a_block_that_a_kernel_still_reads, cuda.place(""), 256 * MIB)
    items = 256 * MIB // 4
    assert found["sums"] == [(1.0 * items, 2.0 * items)] * 3
    # Else the second model never lay where the first had been, and nothing was shown.
    assert found["addresses"] == 1
