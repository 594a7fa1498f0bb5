"""The runtime ONNX: models run by ONNX Runtime.

Why it exists: sessions are made in the GPU process only, from files that were read into the arena
before. Imported by templates; it knows no session, which is engine/onnx.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vram_agent.backend import Task, TaskKind, TaskResult, Tensor, TensorSpec
from vram_agent.engine.arena import Arena
from vram_agent.engine.onnx import OnnxWeights, SessionChoices, map_model
from vram_agent.engine.onnx_file import BrokenOnnxError, Signature, find_beside, read_signature
from vram_agent.errors import BadInputError, ModelFailedError
from vram_agent.protocol import InvalidQuantityError, ModelSpec, parse_quantity
from vram_agent.runtimes.arrays import Array, as_array, as_tensor
from vram_agent.runtimes.base import Option, Reference, check_options, describe_spec, one_of

_OPTIMIZATIONS = {
    "all": "ORT_ENABLE_ALL",
    "extended": "ORT_ENABLE_EXTENDED",
    "basic": "ORT_ENABLE_BASIC",
    "disabled": "ORT_DISABLE_ALL",
}


def _is_quantity(value: object) -> bool:
    try:
        return isinstance(value, str) and parse_quantity(value) > 0
    except InvalidQuantityError:
        return False


_OPTIONS = {
    "graphOptimization": one_of(*_OPTIMIZATIONS).means("ONNX Runtime's optimization level", "all"),
    "gpuMemLimit": Option(_is_quantity, "a quantity such as 4Gi").means(
        "bounds ONNX Runtime's arena on CUDA"
    ),
}


class OnnxRuntime:
    """Reads ONNX files into the arena; sessions are made in the GPU process."""

    reference = Reference(
        library="ONNX Runtime",
        extra="onnx",
        sources=("a path to an `.onnx` file; files with external data lie beside it",),
        tasks={TaskKind.INFER: "the inputs and outputs that the file declares"},
        options=_OPTIONS,
        note="Parameters are ignored: clients of the Open Inference Protocol send parameters for "
        "other servers.",
    )

    def load(self, spec: ModelSpec, arena: Arena) -> OnnxModel:
        """Read the files and the signature. Raises ModelFailedError."""
        check_options(spec, _OPTIONS)
        path = Path(spec.source)
        if not path.is_file():
            raise ModelFailedError(
                f"model {spec.name}: there is no file {spec.source}; mount the .onnx file there"
            )
        choices = SessionChoices(
            optimization=_OPTIMIZATIONS[spec.options.get("graphOptimization", "all")],
            gpu_mem_limit_bytes=parse_quantity(spec.options.get("gpuMemLimit", "0")),
        )
        try:
            signature = read_signature(map_model(path))
            external = {name: _find_external(path, name, spec) for name in signature.external_files}
            weights = OnnxWeights(path, external, arena, choices)
        except BrokenOnnxError as error:
            raise ModelFailedError(
                f"model {spec.name}: {spec.source} cannot be used: {error}; copy the file again, "
                f"or export it with tensors as inputs and outputs"
            ) from error
        except OSError as error:
            raise ModelFailedError(
                f"model {spec.name}: {spec.source} cannot be read: {error}"
            ) from error
        return OnnxModel(spec, signature, weights)


def _find_external(model: Path, name: str, spec: ModelSpec) -> Path:
    path = find_beside(model, name)
    if path is None:
        raise ModelFailedError(
            f"model {spec.name}: its weights lie in {name}, which is no file in {model.parent}; "
            f"mount it beside the .onnx file"
        )
    return path


class OnnxModel:
    """A loaded ONNX model."""

    tasks = frozenset({TaskKind.INFER})

    def __init__(self, spec: ModelSpec, signature: Signature, weights: OnnxWeights) -> None:
        self._spec = spec
        self._any_rank = signature.any_rank
        self.inputs = signature.inputs
        self.outputs = signature.outputs
        self.weights = weights

    def run(self, task: Task) -> TaskResult:
        """Infer. Raises BadInputError that names what the model expects."""
        feeds = self._check_inputs(task.tensors)
        outputs = self.weights.run(feeds)
        return TaskResult(
            tensors=tuple(as_tensor(spec.name, outputs[spec.name]) for spec in self.outputs)
        )

    def _check_inputs(self, tensors: Sequence[Tensor]) -> dict[str, Array]:
        """1. Names that are unknown or missing. 2. Datatypes. 3. Shapes."""
        given = {tensor.name: tensor for tensor in tensors}
        expected = {spec.name: spec for spec in self.inputs}
        # 1
        for name in [*(given.keys() - expected.keys()), *(expected.keys() - given.keys())]:
            what = "unknown" if name in given else "missing"
            raise BadInputError(
                f"model {self._spec.name}: input {name} is {what}; it takes "
                f"{', '.join(map(describe_spec, self.inputs)) or 'none'}",
                param=name,
            )
        feeds: dict[str, Array] = {}
        for name, spec in expected.items():
            tensor = given[name]
            # 2, 3
            if tensor.datatype != spec.datatype or not self._fits(tensor.shape, spec):
                raise BadInputError(
                    f"model {self._spec.name}: input {name} must be {describe_spec(spec)}, not "
                    f"{tensor.datatype} {list(tensor.shape)}",
                    param=name,
                )
            feeds[name] = _as_feed(tensor)
        return feeds

    def _fits(self, shape: Sequence[int], spec: TensorSpec) -> bool:
        if spec.name in self._any_rank:
            return True
        return len(shape) == len(spec.shape) and all(
            wanted in (-1, given) for given, wanted in zip(shape, spec.shape, strict=True)
        )

    def forget(self) -> None:
        """Do nothing: nothing outlives a run but the session."""


def _as_feed(tensor: Tensor) -> Array:
    array = as_array(tensor)
    if tensor.datatype != "BYTES":
        return array
    try:
        # ONNX's strings are text to its Python binding.
        decoded = [item.decode("utf-8") for item in array.flat]
    except UnicodeDecodeError as error:
        raise BadInputError(
            f"input {tensor.name} is no UTF-8: {error}", param=tensor.name
        ) from None
    flat = array.copy().reshape(-1)
    flat[:] = decoded
    return flat.reshape(array.shape)
