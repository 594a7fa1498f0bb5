"""The runtime Torch: TorchScript, torch.export, and modules of a factory with a weights file.

Why it exists: these need no code of one's own, unlike the runtime Python. Imported by templates.
Tasks run under ``torch.no_grad``, not in inference mode: what a model keeps from a task (a cache, a
running mean) then stays an ordinary tensor, which can be pointed elsewhere and written to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from vram_agent.backend import Task, TaskKind, TaskResult, Tensor, TensorSpec
from vram_agent.engine.arena import Arena
from vram_agent.engine.rules import read_rules
from vram_agent.engine.tensors import explain_unmovable, find_tensors
from vram_agent.engine.torch import TorchWeights
from vram_agent.errors import BadInputError, ModelFailedError
from vram_agent.protocol import ModelSpec
from vram_agent.runtimes.base import (
    FLAG,
    TENSORS,
    TEXT,
    Option,
    Reference,
    check_options,
    describe_spec,
    one_of,
)
from vram_agent.runtimes.python import FACTORY_OPTIONS, call_factory, extend_path, find_factory
from vram_agent.runtimes.torch_sources import (
    Argument,
    Callee,
    ExportCallee,
    ModuleCallee,
    ScriptCallee,
    UnfitModuleError,
    read_kind,
)
from vram_agent.runtimes.torch_tensors import DATATYPES, from_torch, name_outputs, to_torch
from vram_agent.runtimes.torch_weights import (
    BROKEN_FILE,
    UnsafeFileError,
    build,
    ensure_safe_export,
    read_state,
)

T = TypeVar("T")
M = TypeVar("M", bound=torch.nn.Module)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def _are_specs(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, dict)
        and item.keys() == {"name", "datatype", "shape"}
        and isinstance(item["name"], str)
        and item["datatype"] in DATATYPES.values()
        and isinstance(item["shape"], list)
        and all(type(size) is int and size >= -1 for size in item["shape"])
        for item in value
    )


_SPECS = Option(_are_specs, "a list of {name, datatype, shape}, with -1 for a free dimension")
_OPTIONS = {
    **FACTORY_OPTIONS,
    "tensors": TENSORS,
    "weights": TEXT.means(
        "for a factory: a `.safetensors` file, or a state dict saved by `torch.save`; the module "
        "is made without data, where that works, and gets these tensors",
        "the factory's own",
    ),
    "allowPickle": FLAG.means(
        "read files that hold more than tensors: **they run code**; else they are refused", "false"
    ),
    "dtype": one_of(*DTYPES).means(
        "cast floating weights when they are loaded, and floating inputs at each call; outputs "
        "come back as FP32. Not for `.pt2`, whose graph has its dtypes written in",
        "the file's",
    ),
    "inputs": _SPECS.means(
        "shown to clients, and checked: by the names of forward's arguments, or else in their "
        "order",
        "forward's arguments; a `.pt2` declares its inputs",
    ),
    "outputs": _SPECS.means(
        "shown to clients: by the keys of what forward returns, or else in its order",
        "`output`, `output0` …, or the keys",
    ),
}


class TorchRuntime:
    """Loads torch modules on the CPU."""

    reference = Reference(
        library="torch",
        extra="torch",
        sources=(
            "a path to a TorchScript file (`torch.jit.save`), scripted, traced or frozen",
            "a path to an archive of `torch.export.save` (`.pt2`)",
            "`module:factory`; `factory(**arguments)`, a function or class, gives an `nn.Module`",
        ),
        tasks={TaskKind.INFER: "the arguments of forward in, what it returns out"},
        options=_OPTIONS,
        note="Parameters are ignored: clients of the Open Inference Protocol send parameters for "
        "other servers.",
    )

    def load(self, spec: ModelSpec, arena: Arena) -> TorchModel:
        """Read the file or call the factory. Raises ModelFailedError."""
        check_options(spec, _OPTIONS)
        try:
            callee = _read(spec)
            signature = Signature.of(spec, callee)
        except UnsafeFileError as error:
            raise ModelFailedError(
                f"model {spec.name}: {error}, which runs code when it is read; save its tensors "
                f"alone (safetensors), or set options.allowPickle: true if you trust its origin"
            ) from error
        except UnfitModuleError as error:
            raise ModelFailedError(
                f"model {spec.name}: {spec.source} cannot be used: {error}"
            ) from error
        rules = read_rules(spec.options.get("tensors", {}))
        weights = TorchWeights(callee.root, arena, rules)
        return TorchModel(spec, callee, signature, weights)


def _read(spec: ModelSpec) -> Callee:
    """1. A file, by what is in it. 2. A factory. Raises what ``load`` turns into words."""
    path = Path(spec.source)
    # 1
    if path.is_file():
        for name in ("weights", *FACTORY_OPTIONS):
            if name in spec.options:
                raise ModelFailedError(
                    f"model {spec.name}: option {name} is for a source module:factory, and "
                    f"{spec.source} is a file"
                )
        return _guard(spec, path, lambda: _read_file(spec, path))
    if ":" not in spec.source:
        raise ModelFailedError(
            f"model {spec.name}: there is no file {spec.source}; mount it there, or name a "
            f"module:factory"
        )
    # 2
    extend_path(spec)
    factory = find_factory(spec)
    if "weights" in spec.options:
        weights = Path(spec.options["weights"])
        if not weights.is_file():
            raise ModelFailedError(
                f"model {spec.name}: there is no file {weights}; mount the weights there"
            )
        allow_pickle = spec.options.get("allowPickle", False)
        state = _guard(spec, weights, lambda: read_state(weights, allow_pickle=allow_pickle))
        module = build(lambda: call_factory(spec, factory), state)
    else:
        module = call_factory(spec, factory)
    if not isinstance(module, torch.nn.Module):
        raise UnfitModuleError(f"it returned a {type(module).__name__}, and no torch.nn.Module")
    return ModuleCallee(_prepare(spec, module))


def _guard(spec: ModelSpec, path: Path, read: Callable[[], T]) -> T:
    try:
        return read()
    except BROKEN_FILE as error:
        first = str(error).split("\n", 1)[0][:200]
        raise ModelFailedError(
            f"model {spec.name}: {path} cannot be read ({type(error).__name__}: {first}); copy the "
            f"file again, or save it by a torch that is not newer than {torch.__version__}"
        ) from error


def _read_file(spec: ModelSpec, path: Path) -> Callee:
    kind = read_kind(path)
    if kind == "script":
        module = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
        return ScriptCallee(_prepare(spec, module))
    if kind == "export":
        if "dtype" in spec.options:
            raise UnfitModuleError("dtype is not for .pt2; export the module in that dtype")
        if not spec.options.get("allowPickle", False):
            ensure_safe_export(path)
        return ExportCallee(torch.export.load(path))
    if kind == "state":
        raise UnfitModuleError(
            "it is what torch.save wrote, not a module: name a module:factory as the source, and "
            "this file in options.weights"
        )
    raise UnfitModuleError(
        "it is neither TorchScript nor an archive of torch.export, or it is cut off; copy the file "
        "again"
    )


def _prepare(spec: ModelSpec, module: M) -> M:
    """Put a module into evaluation mode and into the dtype that the options name."""
    if "dtype" in spec.options:
        module.to(DTYPES[spec.options["dtype"]])
    module.eval()
    return module


class Signature:
    """What clients call the inputs and outputs of a module, and what is checked of them."""

    def __init__(self, arguments: Mapping[str, Argument], outputs: Sequence[TensorSpec]) -> None:
        self._arguments = arguments
        specs = [(name, argument.spec) for name, argument in arguments.items()]
        self.inputs = tuple(spec for _, spec in specs if spec is not None)
        if len(self.inputs) < len(specs):
            self.inputs = ()
        self.outputs = tuple(outputs)

    @classmethod
    def of(cls, spec: ModelSpec, callee: Callee) -> Signature:
        """Return the module's own signature, as the options name it.

        Raises UnfitModuleError where the options name more inputs than there are, or leave one out.
        """
        outputs = _read_specs(spec, "outputs") or callee.outputs
        own = {argument.name: argument for argument in callee.arguments}
        named = {one.name: one for one in _read_specs(spec, "inputs")}
        if not named:
            return cls(own, outputs)
        chosen = own if named.keys() <= own.keys() else dict(zip(named, own.values(), strict=False))
        arguments = {
            name: Argument(chosen[name].name, is_required=True, spec=one)
            for name, one in named.items()
            if name in chosen
        }
        left_out = {one.name for one in own.values() if one.is_required}
        left_out -= {argument.name for argument in arguments.values()}
        if left_out or len(arguments) < len(named):
            raise UnfitModuleError(
                f"options.inputs names {', '.join(named)}, and forward takes {', '.join(own)}"
            )
        return cls(arguments, outputs)

    def bind(self, model: str, tensors: Sequence[Tensor]) -> dict[str, torch.Tensor]:
        """Return the inputs by the names of forward's arguments, on the CPU.

        1. Names that are unknown or missing. 2. Datatypes and shapes. Raises BadInputError.
        """
        given = {tensor.name: tensor for tensor in tensors}
        required = {name for name, one in self._arguments.items() if one.is_required}
        # 1
        for name in [*(given.keys() - self._arguments.keys()), *(required - given.keys())]:
            what = "unknown" if name in given else "missing"
            raise BadInputError(
                f"model {model}: input {name} is {what}; it takes {self._describe()}", param=name
            )
        # 2
        for name, tensor in given.items():
            spec = self._arguments[name].spec
            if spec is not None and not _fits(tensor, spec):
                raise BadInputError(
                    f"model {model}: input {name} must be {describe_spec(spec)}, not "
                    f"{tensor.datatype} {list(tensor.shape)}",
                    param=name,
                )
        return {self._arguments[name].name: to_torch(tensor) for name, tensor in given.items()}

    def _describe(self) -> str:
        words = [
            f"{name}{'' if one.is_required else ' (optional)'}"
            if one.spec is None
            else describe_spec(one.spec)
            for name, one in self._arguments.items()
        ]
        return ", ".join(words) or "none"

    def name(self, found: object) -> dict[str, object]:
        """Return what forward gave by the names of the outputs. Raises ValueError for too few."""
        own = dict(name_outputs(found))
        names = [spec.name for spec in self.outputs]
        if not names:
            return own
        if own.keys() >= set(names):
            return {name: own[name] for name in names}
        if len(own) < len(names):
            raise ValueError(
                f"forward returned {', '.join(own) or 'nothing'}, and the outputs are "
                f"{', '.join(names)}; name as many in options.outputs"
            )
        return dict(zip(names, own.values(), strict=False))


def _read_specs(spec: ModelSpec, option: str) -> list[TensorSpec]:
    return [
        TensorSpec(name=one["name"], datatype=one["datatype"], shape=tuple(one["shape"]))
        for one in spec.options.get(option, ())
    ]


def _fits(tensor: Tensor, spec: TensorSpec) -> bool:
    return (
        tensor.datatype == spec.datatype
        and len(tensor.shape) == len(spec.shape)
        and all(
            wanted in (-1, given) for given, wanted in zip(tensor.shape, spec.shape, strict=True)
        )
    )


class TorchModel:
    """A loaded module."""

    tasks = frozenset({TaskKind.INFER})

    def __init__(
        self, spec: ModelSpec, callee: Callee, signature: Signature, weights: TorchWeights
    ) -> None:
        self._spec = spec
        self._callee = callee
        self._signature = signature
        self._dtype = DTYPES.get(spec.options.get("dtype", ""))
        # Where this one is, the others are: the engine moves all of them, or none.
        self._beacon: torch.Tensor | None = next(
            (one.value for one in find_tensors(callee.root) if not explain_unmovable(one.value)),
            None,
        )
        self.inputs = signature.inputs
        self.outputs = signature.outputs
        self.weights = weights

    def run(self, task: Task) -> TaskResult:
        """Infer. Raises BadInputError that names what the module expects."""
        feeds = self._signature.bind(self._spec.name, task.tensors)
        device = self._beacon.device if self._beacon is not None else torch.device("cpu")
        inputs = {name: self._to_device(tensor, device) for name, tensor in feeds.items()}
        with torch.no_grad():
            found = self._callee.call(inputs, device)
        outputs = self._signature.name(found)
        return TaskResult(
            tensors=[from_torch(name, self._to_client(value)) for name, value in outputs.items()]
        )

    def _to_device(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        return tensor.to(device, self._dtype if tensor.is_floating_point() else None)

    def _to_client(self, value: Any) -> Any:
        if (
            self._dtype is not None
            and isinstance(value, torch.Tensor)
            and value.dtype == self._dtype
        ):
            return value.float()
        return value

    def forget(self) -> None:
        """Do nothing: what a module keeps is its own."""
