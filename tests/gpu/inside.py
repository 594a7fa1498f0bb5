"""What runs in a process of its own, with a context of its own: the test's process has none.

Functions of this module are called by ``call_apart``; they return what is to be asserted.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from vram_agent.devices.base import Placement
from vram_agent.engine.arena import Arena
from vram_agent.engine.cuda import CudaMemory
from vram_agent.engine.memory import open_memory
from vram_agent.engine.torch import TorchWeights

MIB = 1 << 20
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8)
SLEEP_CYCLES = 2_000_000_000
"""About a second of a kernel that does nothing."""


def call_apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what the function returns in a fresh interpreter."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def open_cuda(placement: Placement) -> CudaMemory:
    memory = open_memory(placement)
    assert isinstance(memory, CudaMemory)
    return memory


def make_bits(nbytes: int, seed: int) -> dict[str, torch.Tensor]:
    """Tensors of every width, with any bits: NaN with its payload among them."""
    generator = torch.Generator().manual_seed(seed)
    return {
        str(dtype): torch.randint(
            0, 256, (nbytes // len(DTYPES) // 8 * 8,), dtype=torch.uint8, generator=generator
        ).view(dtype)
        for dtype in DTYPES
    }


def are_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(
        torch.equal(one[name].cpu().view(torch.uint8), other[name].view(torch.uint8))
        for name in other
    )


def restore_loose_and_locked(placement: Placement, nbytes: int) -> dict[str, Any]:
    """The first restore goes through the ring of staging buffers, the second from locked pages."""
    memory = open_cuda(placement)
    tensors = make_bits(nbytes, seed=1)
    wanted = {name: tensor.clone() for name, tensor in tensors.items()}
    weights = TorchWeights(tensors, Arena("gpu"))
    found: dict[str, Any] = {"same": [], "devices": set(), "locked": []}
    for _ in range(3):
        found["locked"].append(memory._pages.pinned_bytes)
        weights.restore(memory, 1)
        found["devices"] |= {tensor.device.type for tensor in tensors.values()}
        found["same"].append(are_same_bits(tensors, wanted))
        weights.offload()
        found["same"].append(are_same_bits(tensors, wanted))
        memory._pages.wait()
    found["words"] = memory.explain_copies()
    return found


def restore_where_the_driver_refuses(placement: Placement, nbytes: int) -> dict[str, Any]:
    """The driver refuses to lock what is locked already, so somebody else locks it first."""
    memory = open_cuda(placement)
    tensors = make_bits(nbytes, seed=2)
    wanted = {name: tensor.clone() for name, tensor in tensors.items()}
    weights = TorchWeights(tensors, Arena("gpu"))
    address = min(tensor.data_ptr() for tensor in tensors.values())
    cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    assert int(cudart.cudaHostRegister(address, nbytes // 2, 0)) == 0
    same = []
    words = []
    for _ in range(2):
        weights.restore(memory, 1)
        memory._pages.wait()
        same.append(are_same_bits(tensors, wanted))
        words.append(weights.offload().message)
    return {"same": same, "words": words, "locked": memory._pages.pinned_bytes}


def reuse_a_block_that_a_kernel_still_reads(placement: Placement, nbytes: int) -> dict[str, Any]:
    """A slow kernel is to read the first model's weights when the second takes their memory."""
    memory = open_cuda(placement)
    arena = Arena("gpu")
    models = [[torch.full((nbytes // 4,), value)] for value in (1.0, 2.0)]
    first, second = (TorchWeights(model, arena) for model in models)
    sums, addresses = [], []
    for _ in range(3):
        first.restore(memory, 1)
        addresses.append(models[0][0].data_ptr())
        # A kernel of torch's own tests: it only spends cycles.
        torch.cuda._sleep(SLEEP_CYCLES)  # type: ignore[no-untyped-call]
        pending = models[0][0].sum(dtype=torch.float64)
        first.offload()
        second.restore(memory, 1)
        addresses.append(models[1][0].data_ptr())
        after = models[1][0].sum(dtype=torch.float64)
        sums.append((pending.item(), after.item()))
        second.offload()
    return {"sums": sums, "addresses": len(set(addresses))}


def hold_memory(placement: Placement, left_bytes: int, connection: Any) -> None:
    """Take all of the device but ``left_bytes``, say so, and hold it until told to end."""
    open_cuda(placement)
    free_bytes, _ = torch.cuda.mem_get_info()
    held = torch.empty(free_bytes - left_bytes, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    connection.send(held.nbytes)
    connection.recv()
