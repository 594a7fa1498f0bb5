"""What the runtime Torch loads: TorchScript files, torch.export archives, modules of a factory.

Why it exists: three kinds of callables with three ways to say what they take, made into one. Called
by runtimes/torch.py in the template; ``call`` in the GPU process. It knows no request.
"""

from __future__ import annotations

import inspect
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from vram_agent.backend import TensorSpec
from vram_agent.engine.tensors import find_tensors
from vram_agent.runtimes.torch_tensors import name_outputs, spec_of


class UnfitModuleError(Exception):
    """A module that was read, and that this runtime cannot serve; the message says why."""


@dataclass(frozen=True, slots=True)
class Argument:
    """An input of a module: its name, whether a call needs it, and what it must be, if known."""

    name: str
    is_required: bool
    spec: TensorSpec | None = None


class Callee(Protocol):
    """A module as the runtime sees it."""

    @property
    def arguments(self) -> tuple[Argument, ...]:
        """What it takes, in order."""
        ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What it returns; empty where it does not say."""
        ...

    @property
    def root(self) -> object:
        """What the tensors hang off."""
        ...

    def call(self, inputs: Mapping[str, torch.Tensor], device: torch.device) -> object:
        """Run it. The inputs lie on the device, as the weights do."""
        ...


def read_kind(path: Path) -> str:
    """Return what a file is by its members: script, export, state, or nothing of these."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] for name in archive.namelist()}
    except zipfile.BadZipFile:
        return ""
    # Each of them is a zip under one folder; only TorchScript has constants beside its pickle.
    if "constants.pkl" in names:
        return "script"
    if "archive_format" in names:
        return "export"
    return "state" if "data.pkl" in names else ""


# --- TorchScript ----------------------------------------------------------------------------------


class ScriptCallee:
    """A TorchScript module: loaded from a file."""

    outputs: tuple[TensorSpec, ...] = ()

    def __init__(self, module: torch.jit.ScriptModule) -> None:
        """Raises UnfitModuleError where forward takes what no tensor can be."""
        self._module = module
        self.arguments = tuple(_script_arguments(module))
        self.root: object = module

    def call(self, inputs: Mapping[str, torch.Tensor], device: torch.device) -> object:  # noqa: ARG002 - the protocol's
        """Run forward; an optional tensor that is not given is None."""
        return self._module(**{one.name: inputs.get(one.name) for one in self.arguments})


def _script_arguments(module: torch.jit.ScriptModule) -> Iterator[Argument]:
    forward: Any = getattr(module, "forward", None)
    if forward is None:
        raise UnfitModuleError("it has no method forward")
    _, *arguments = forward.schema.arguments
    for argument in arguments:
        kind = str(argument.type)
        if kind in {"Tensor", "Optional[Tensor]"}:
            yield Argument(argument.name, is_required=kind == "Tensor")
        elif not argument.has_default_value():
            raise UnfitModuleError(
                f"its forward takes {argument.name}, a {kind}, and inputs are tensors; save a "
                f"module around it that takes tensors only"
            )


# --- torch.export ---------------------------------------------------------------------------------


class ExportCallee:
    """A program of torch.export: its archive declares what it takes and gives."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        """Raises UnfitModuleError where it takes what no tensor can be."""
        self._module: Any = program.module()
        self._structure = program.call_spec.in_spec
        values = {
            node.name: node.meta.get("val") for node in program.graph.nodes if node.op != "output"
        }
        self._leaves = [spec.arg for spec in program.graph_signature.input_specs if _is_user(spec)]
        self.arguments = tuple(
            Argument(leaf.name, is_required=True, spec=_spec_or_refuse(leaf.name, values))
            for leaf in self._leaves
            if not hasattr(leaf, "value")
        )
        self.outputs = tuple(_output_specs(program, values))
        # Not the module itself: its graph is full of fake tensors. Constants that exporting lifted
        # out of the graph are plain attributes.
        self.root: object = [
            dict(self._module.named_parameters()),
            dict(self._module.named_buffers()),
            [
                {name: value for name, value in vars(part).items() if _is_tensor(value)}
                for part in self._module.modules()
            ],
        ]
        self._device = torch.device("cpu")

    def call(self, inputs: Mapping[str, torch.Tensor], device: torch.device) -> object:
        """Run the program."""
        if device != self._device:
            retarget(self._module, device)
            self._device = device
        leaves = [
            leaf.value if hasattr(leaf, "value") else inputs[leaf.name] for leaf in self._leaves
        ]
        args, kwargs = pytree.tree_unflatten(leaves, self._structure)
        return self._module(*args, **kwargs)


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def _is_user(spec: Any) -> bool:
    return str(spec.kind.name).startswith("USER_")


def _spec_or_refuse(name: str, values: Mapping[str, Any]) -> TensorSpec:
    if not isinstance(values.get(name), torch.Tensor):
        raise UnfitModuleError(
            f"its input {name} is no tensor; export a module around it that takes tensors only"
        )
    try:
        return spec_of(name, values[name])
    except TypeError as error:
        raise UnfitModuleError(f"its input {error}") from None


def _output_specs(
    program: torch.export.ExportedProgram, values: Mapping[str, Any]
) -> Iterator[TensorSpec]:
    leaves = [
        getattr(spec.arg, "value", values.get(spec.arg.name))
        for spec in program.graph_signature.output_specs
        if str(spec.kind.name) == "USER_OUTPUT"
    ]
    found = pytree.tree_unflatten(leaves, program.call_spec.out_spec)
    for name, value in name_outputs(found):
        if isinstance(value, torch.Tensor):
            yield spec_of(name, value)


def retarget(module: torch.fx.GraphModule, device: torch.device) -> None:
    """Let what a graph creates be created on a device: exporting has written one into each node."""

    def replace(value: Any) -> Any:
        return device if isinstance(value, torch.device) else value

    for part in module.modules():
        if isinstance(part, torch.fx.GraphModule):
            for node in part.graph.nodes:
                node.args = map_aggregate(node.args, replace)
                node.kwargs = map_aggregate(node.kwargs, replace)
            part.recompile()


# --- modules --------------------------------------------------------------------------------------


class ModuleCallee:
    """A module that a factory made."""

    outputs: tuple[TensorSpec, ...] = ()

    def __init__(self, module: torch.nn.Module) -> None:
        """Raises UnfitModuleError where forward does not name its arguments."""
        self._module = module
        self.arguments = tuple(_forward_arguments(module))
        self.root: object = module

    def call(self, inputs: Mapping[str, torch.Tensor], device: torch.device) -> object:  # noqa: ARG002 - the protocol's
        """Run the module, its hooks too."""
        return self._module(**inputs)


def _forward_arguments(module: torch.nn.Module) -> Iterator[Argument]:
    if isinstance(module, torch.jit.ScriptModule):
        yield from _script_arguments(module)
        return
    for parameter in inspect.signature(module.forward).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            continue
        if parameter.kind in {
            inspect.Parameter.VAR_POSITIONAL,
            inspect.Parameter.POSITIONAL_ONLY,
        }:
            raise UnfitModuleError(
                f"the forward of {type(module).__name__} takes {parameter}, which has no name to "
                f"call it by; give its arguments names"
            )
        yield Argument(parameter.name, is_required=parameter.default is inspect.Parameter.empty)


def find_on_meta(module: torch.nn.Module) -> str:
    """Return the path of a tensor that has no data; empty for none."""
    return next((one.path for one in find_tensors(module) if one.value.is_meta), "")
