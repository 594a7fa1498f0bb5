"""The tensors of a model: found from any root, grouped by storage, with what may be done to each.

Why it exists: tied weights and views must move once and stay tied, and some tensors cannot move at
all; both are seen only when all of them are looked at together. Called by engine/torch.py. It
moves nothing but what it is told to point elsewhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from vram_agent.engine.discovery import Found, walk
from vram_agent.engine.rules import TensorRule, TensorRules
from vram_agent.engine.script import find_script_tensors

WANTED = "its rule is leave"


@dataclass(slots=True)
class Member:
    """One tensor object that looks into a storage."""

    path: str
    tensor: torch.Tensor
    shape: torch.Size
    stride: tuple[int, ...]
    offset_items: int
    dtype: torch.dtype
    is_inference: bool = False
    version: int | None = 0

    def view_of(self, flat: torch.Tensor, offset_bytes: int) -> torch.Tensor:
        """Return the same view, of the storage that lies at ``offset_bytes`` of ``flat``."""
        items = offset_bytes // self.dtype.itemsize + self.offset_items
        if not self.is_inference:
            return torch.as_strided(flat.view(self.dtype), self.shape, self.stride, items)
        # One made in inference mode must stay one: pointed at a normal tensor, it has no version
        # counter that a view of it could share, and slicing it raises.
        with torch.inference_mode():
            empty = torch.empty(0, dtype=self.dtype, device=flat.device)
            return empty.set_(flat.untyped_storage(), items, self.shape, self.stride)

    def point(self, target: torch.Tensor) -> None:
        """Have the tensor look at what ``target`` looks at."""
        self.tensor.data = target
        self.version = read_version(self.tensor)


@dataclass(slots=True)
class SharedStorage:
    """One storage, and every tensor that looks into it: tied weights stay tied."""

    nbytes: int
    source: torch.UntypedStorage | None
    members: list[Member]
    offset_bytes: int = 0

    def slice_of(self, flat: torch.Tensor) -> torch.Tensor:
        """Return this storage's bytes of ``flat``."""
        return flat[self.offset_bytes : self.offset_bytes + self.nbytes]

    def take_source(self) -> torch.Tensor:
        """Return the storage as flat bytes, and hold on to it no more."""
        assert self.source is not None  # noqa: S101 - it is taken once
        flat = torch.empty(0, dtype=torch.uint8, device=self.source.device)
        flat.set_(self.source)
        self.source = None
        return flat

    def point(self, flat: torch.Tensor) -> None:
        """Have every member look into this storage's place in ``flat``."""
        for member in self.members:
            member.point(member.view_of(flat, self.offset_bytes))

    def empty(self) -> None:
        """Have every member look at nothing, with as many dimensions as before."""
        for member in self.members:
            with torch.inference_mode(mode=member.is_inference):
                member.point(torch.empty([0] * len(member.shape), dtype=member.dtype))


@dataclass(frozen=True, slots=True)
class LeftAlone:
    """A tensor that is not moved, and why."""

    path: str
    reason: str


@dataclass(slots=True)
class Tensors:
    """What was found, by what happens to it."""

    moved: list[SharedStorage] = field(default_factory=list)
    dropped: list[SharedStorage] = field(default_factory=list)
    left: list[LeftAlone] = field(default_factory=list)


def find_tensors(root: object, *, reads_graphs: bool = True) -> Iterator[Found]:
    """Yield every tensor object that hangs off ``root``, each once.

    ``reads_graphs``: those of TorchScript too, whose graphs take a while to read.
    """
    seen: set[int] = set()
    for found in walk(root, _is_leaf, _drop_cached_device):
        if isinstance(found.value, torch.Tensor):
            seen.add(id(found.value))
            yield found
            continue
        if reads_graphs:
            for name, value in find_script_tensors(found.value):
                for inner in walk(value, lambda leaf: isinstance(leaf, torch.Tensor)):
                    if id(inner.value) not in seen:
                        seen.add(id(inner.value))
                        yield Found(f"{found.path}.{name}", inner.value)


def find_graph(root: object) -> str:
    """Return the path of a CUDA graph that hangs off ``root``; empty where none is found."""
    graphs = walk(root, lambda value: isinstance(value, torch.cuda.CUDAGraph))
    return next((found.path for found in graphs), "")


def _is_leaf(value: object) -> bool:
    return isinstance(value, (torch.Tensor, torch.jit.ScriptModule))


def _drop_cached_device(value: object) -> None:
    # A cached property that was read while the weights were on the host would send inputs there
    # for ever (stepfun-ai/Step-Audio-EditX, CosyVoice's `device`).
    attributes = getattr(value, "__dict__", None)
    if not isinstance(attributes, dict):
        return
    for name, cached in list(attributes.items()):
        if isinstance(cached, torch.device) and isinstance(
            getattr(type(value), name, None), functools.cached_property
        ):
            del attributes[name]


_UNMOVABLE: tuple[tuple[Callable[[torch.Tensor], bool], str], ...] = (
    (lambda t: t.layout != torch.strided, "its layout has no flat storage"),
    (lambda t: t.is_quantized, "quantised tensors carry their scales outside of the storage"),
    # bitsandbytes#1815: Int8Params keeps its row statistics and a second copy beside the tensor.
    (lambda t: type(t).__name__ == "Int8Params", "bitsandbytes keeps its scales outside of it"),
    (lambda t: t.device.type not in {"cpu", "cuda"}, "its device holds no bytes that could move"),
    (
        lambda t: type(t).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl,  # noqa: SLF001 - torch has no public test for this
        "its class decides itself what its data is",
    ),
    (lambda t: t.is_conj() or t.is_neg(), "it is a lazy conjugate or negative"),
)


def explain_unmovable(tensor: torch.Tensor) -> str:
    """Return why a tensor must stay where it is; empty when it can be moved."""
    return next((words for applies, words in _UNMOVABLE if applies(tensor)), "")


def as_bytes(buffer: Any) -> torch.Tensor:
    """Return a writable buffer as a flat uint8 tensor, without a copy."""
    # frombuffer keeps the object alive and not its export; only a memoryview between the two keeps
    # a mapping from being closed under a tensor that still looks into it.
    return torch.frombuffer(memoryview(buffer), dtype=torch.uint8)


def read_version(tensor: torch.Tensor) -> int | None:
    """Return how often a tensor was written to; None for one of inference mode: nobody counts."""
    try:
        return int(tensor._version)  # noqa: SLF001 - torch's only sign of a write
    except RuntimeError:
        return None


def storage_key(tensor: torch.Tensor) -> int:
    """Return what tells storages apart: data_ptr is 0 for every empty one."""
    return int(tensor.untyped_storage()._cdata)  # noqa: SLF001 - torch has no public identity of it


def group_tensors(tensors: Iterable[Found], rules: TensorRules) -> Tensors:
    """Group tensors by storage; those of one storage share one fate.

    1. One of them cannot move, or is to be left: all are left.
    2. All of them are to be dropped: dropped.
    3. Else moved.
    """
    found = Tensors()
    by_storage: dict[int, SharedStorage] = {}
    wishes: dict[int, list[TensorRule]] = {}
    fixed: dict[int, str] = {}
    for one in tensors:
        tensor: torch.Tensor = one.value
        rule = rules.find(one.path) or TensorRule.MOVE
        reason = explain_unmovable(tensor)
        if not reason and rule is TensorRule.LEAVE:
            reason = WANTED
        if reason:
            found.left.append(LeftAlone(one.path, reason))
            if tensor.layout == torch.strided and tensor.device.type != "meta":
                fixed[storage_key(tensor)] = one.path
            continue
        if tensor.untyped_storage().nbytes() == 0:
            continue
        key = storage_key(tensor)
        storage = tensor.untyped_storage()
        shared = by_storage.setdefault(key, SharedStorage(storage.nbytes(), storage, []))
        begin_bytes = int(tensor.storage_offset()) * tensor.dtype.itemsize
        shared.members.append(describe_view(one, begin_bytes))
        wishes.setdefault(key, []).append(rule)
    # 1
    for key, path in fixed.items():
        for member in by_storage.pop(key).members if key in by_storage else ():
            found.left.append(LeftAlone(member.path, f"it shares its storage with {path}"))
    # 2, 3
    for key, shared in by_storage.items():
        is_scratch = all(rule is TensorRule.DROP for rule in wishes[key])
        (found.dropped if is_scratch else found.moved).append(shared)
    return found


def describe_view(found: Found, begin_bytes: int) -> Member:
    """Return a tensor as a view of flat bytes, of which it begins at ``begin_bytes``."""
    tensor: torch.Tensor = found.value
    items = begin_bytes // tensor.dtype.itemsize
    return Member(
        found.path,
        tensor,
        tensor.shape,
        tensor.stride(),
        items,
        tensor.dtype,
        tensor.is_inference(),
    )
