"""Every leaf that hangs off a root is found, once, wherever it hides."""

from __future__ import annotations

import functools
import types
from collections import OrderedDict, deque
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vram_agent.engine.discovery import walk


class Leaf:
    """What is looked for; leaves are told apart by identity."""


class Holder:
    def __init__(self, value: object) -> None:
        self.value = value


class Slotted:
    __slots__ = ("empty", "value")

    def __init__(self, value: object) -> None:
        self.value = value

    def method(self) -> None:
        """Bound methods keep their object."""


class Heir(Slotted):
    __slots__ = ("more",)


class Hostile:
    """Nothing on it may be called."""

    def __init__(self, value: object) -> None:
        self.__dict__["value"] = value

    @property
    def computed(self) -> object:
        raise AssertionError("a property was called")

    def __getattr__(self, name: str) -> object:
        raise AssertionError(f"{name} was looked up")

    def __eq__(self, other: object) -> bool:
        raise AssertionError("it was compared")

    __hash__ = None  # type: ignore[assignment]


def is_leaf(value: object) -> bool:
    return isinstance(value, Leaf)


def find(root: object) -> list[Leaf]:
    return [found.value for found in walk(root, is_leaf)]


def enclose(value: object) -> object:
    return lambda: value


WRAPPERS: dict[str, Any] = {
    "attribute": Holder,
    "list": lambda value: [1, value],
    "tuple": lambda value: (None, value),
    "dict value": lambda value: {"key": value},
    "ordered dict": lambda value: OrderedDict(key=value),
    "read-only dict": lambda value: types.MappingProxyType({"key": value}),
    "deque": lambda value: deque([value]),
    "slot": Slotted,
    "slot of a base class": Heir,
    "bound method": lambda value: Slotted(value).method,
    "partial": lambda value: functools.partial(print, value, end=value),
    "closure": enclose,
    "hostile object": Hostile,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_a_leaf_is_found_in(wrap: Any) -> None:
    leaf = Leaf()
    assert find(wrap(leaf)) == [leaf]


def test_paths_are_what_a_person_would_write() -> None:
    root = Holder([{"a": Leaf()}])
    assert [found.path for found in walk(root, is_leaf)] == ["model.value[0]['a']"]


def test_a_modules_registries_are_no_part_of_the_path() -> None:
    root = types.SimpleNamespace(
        _modules={"layer": types.SimpleNamespace(_parameters={"w": Leaf()})}
    )
    assert [found.path for found in walk(root, is_leaf)] == ["model.layer.w"]


def test_cycles_end_and_what_is_reached_twice_counts_once() -> None:
    leaf = Leaf()
    root: list[Any] = [leaf, leaf, {"again": leaf}]
    root.append(root)
    assert find(root) == [leaf]


def test_modules_classes_and_globals_are_no_part_of_a_model() -> None:
    module = types.ModuleType("m")
    module.leaf = Leaf()  # type: ignore[attr-defined]
    kind = type("Kind", (), {"leaf": Leaf()})
    assert find([module, kind, find, print, "text", 3]) == []


def build(shape: Any, planted: list[Leaf]) -> object:
    if shape is None:
        planted.append(Leaf())
        return planted[-1]
    name, children = shape
    parts = [build(child, planted) for child in children]
    return WRAPPERS[name](parts[0] if len(parts) == 1 else parts)


@given(
    st.recursive(
        st.none(),
        lambda inner: st.tuples(
            st.sampled_from(sorted(WRAPPERS)), st.lists(inner, min_size=1, max_size=3)
        ),
        max_leaves=15,
    )
)
def test_all_that_is_planted_is_found_exactly_once(shape: Any) -> None:
    planted: list[Leaf] = []
    root = build(shape, planted)
    found = find(root)
    assert len(found) == len(planted)
    assert {id(leaf) for leaf in found} == {id(leaf) for leaf in planted}
