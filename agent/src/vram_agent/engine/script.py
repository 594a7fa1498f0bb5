"""The tensors of TorchScript, which live in C++.

Why it exists: no walk over attributes comes to them, and a frozen module keeps its weights as
constants of its graph. Called by engine/tensors.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def find_script_tensors(module: torch.jit.ScriptModule) -> Iterator[tuple[str, object]]:
    """Yield the tensors that forward uses: they live in C++, where no walk over attributes comes.

    1. Parameters and buffers. 2. Other tensors that forward reads from attributes. 3. Constants of
    its graph: the weights of a frozen module, too. Interpreters hold the same tensor objects, so
    pointing one elsewhere moves what they use.
    """
    # 1
    yield from module.named_parameters()
    yield from module.named_buffers()
    forward: Any = getattr(module, "forward", None)
    if forward is None:
        return
    graph = forward.inlined_graph
    own = next(iter(graph.inputs())).debugName()
    # 2
    for node in graph.findAllNodes("prim::GetAttr", recurse=True):
        if "Tensor" in str(node.output().type()):
            path = _attribute_path(node, own)
            if path:
                yield ".".join(path), _follow(module, path)
    # 3
    for index, node in enumerate(graph.findAllNodes("prim::Constant", recurse=True)):
        # Kinds of attributes: t is a tensor, ival holds lists and dicts of them.
        if node.hasAttribute("value") and node.kindOf("value") in {"t", "ival"}:
            value = node.t("value") if node.kindOf("value") == "t" else node.ival("value")
            yield f"constant{index}", value


def _attribute_path(node: torch._C.Node, own: str) -> list[str]:
    """Return the names that lead to an attribute; empty where it is not one of the module."""
    path: list[str] = []
    while node.kind() == "prim::GetAttr":
        path.insert(0, node.s("name"))
        source = node.inputsAt(0)
        if source.debugName() == own:
            return path
        node = source.node()
    return []


def _follow(module: object, path: list[str]) -> object:
    for name in path:
        module = getattr(module, name)
    return module
