"""Finding a model's tensors from any root object.

Why it exists: weights hide in attributes, lists and dicts of objects that are no Module, and a
state_dict misses non-persistent buffers and plain tensor attributes. Called by engine/torch.py,
which says what a leaf is. It knows no torch; it neither changes nor keeps what it walks.
"""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

_ATOMS = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    bytearray,
    memoryview,
    range,
    type,
    types.ModuleType,
    types.BuiltinFunctionType,
    types.CodeType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
)


@dataclass(frozen=True, slots=True)
class Found:
    """A leaf and one way to it, such as ``model.encoder.weights[0]``."""

    path: str
    value: Any


def _ignore(_: object) -> None:
    return


def walk(
    root: object, is_leaf: Callable[[object], bool], visit: Callable[[object], None] = _ignore
) -> Iterator[Found]:
    """Yield each leaf that can be reached from ``root`` once, nearest first.

    ``visit`` is called with every other object before its children are looked at. Walks attributes
    (``__dict__`` and slots), mappings, lists, tuples, sets, deques, partials, bound methods and
    closures; never modules, classes or globals. No property is called.
    """
    seen: set[int] = set()
    waiting: deque[Found] = deque([Found("model", root)])
    # Objects made on the way (a bound method's dict, say) must not free their id while we walk.
    kept: list[object] = []
    while waiting:
        found = waiting.popleft()
        value = found.value
        if isinstance(value, _ATOMS) or id(value) in seen:
            continue
        seen.add(id(value))
        kept.append(value)
        if is_leaf(value):
            yield found
            continue
        visit(value)
        waiting.extend(_children(found))


def _children(found: Found) -> Iterator[Found]:
    value, path = found.value, found.path
    if isinstance(value, (dict, types.MappingProxyType)):
        for key, item in list(value.items()):
            yield Found(f"{path}[{key!r}]", item)
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        for index, item in enumerate(list(value)):
            yield Found(f"{path}[{index}]", item)
    elif isinstance(value, functools.partial):
        yield Found(f"{path}.func", value.func)
        yield Found(f"{path}.args", value.args)
        yield Found(f"{path}.keywords", value.keywords)
    elif isinstance(value, types.MethodType):
        yield Found(f"{path}.__self__", value.__self__)
    elif isinstance(value, types.FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=False):
            try:
                yield Found(f"{path}.<{name}>", cell.cell_contents)
            except ValueError:  # the cell is still empty
                continue
        return
    yield from _attributes(value, path)


def _attributes(value: object, path: str) -> Iterator[Found]:
    # vars() alone, and slots through their descriptors: properties may compute, or raise.
    try:
        attributes = getattr(value, "__dict__", None)
    except Exception:  # any object may hang off a model, and its __getattribute__ is its own
        return
    if isinstance(attributes, dict):
        for name, item in list(attributes.items()):
            # The registries of a Module are no part of a path that a person would write.
            if name in {"_parameters", "_buffers", "_modules"} and isinstance(item, dict):
                for key, inner in list(item.items()):
                    yield Found(f"{path}.{key}", inner)
            else:
                yield Found(f"{path}.{name}", item)
    for base in type(value).__mro__:
        slots = base.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else tuple(slots):
            descriptor = base.__dict__.get(name)
            if isinstance(descriptor, types.MemberDescriptorType):
                try:
                    yield Found(f"{path}.{name}", descriptor.__get__(value))
                except AttributeError:  # the slot is empty
                    continue
