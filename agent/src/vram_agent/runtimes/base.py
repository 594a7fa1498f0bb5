"""What every runtime offers: a model loaded by its library's own loader, and its tasks.

Why it exists: templates and GPU processes host models without knowing their libraries. `load` runs
in a template (one thread, no CUDA, no ONNX session); `run` in the GPU process forked from it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from vram_agent.backend import Task, TaskKind, TaskPart, TaskResult, TensorSpec
from vram_agent.engine.arena import Arena
from vram_agent.engine.rules import is_rules
from vram_agent.engine.weights import Weights
from vram_agent.errors import BadInputError, ModelFailedError
from vram_agent.protocol import ModelSpec


class HostedModel(Protocol):
    """A loaded model: made in the template, run in the GPU process."""

    @property
    def tasks(self) -> frozenset[TaskKind]:
        """What it can be asked to do."""
        ...

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """For INFER: the inputs; empty where the model does not say."""
        ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """For INFER: the outputs; empty where the model does not say."""
        ...

    @property
    def weights(self) -> Weights:
        """What moves between host and device."""
        ...

    def run(self, task: Task) -> TaskResult:
        """Run a task on the device. Raises BadInputError when the input is at fault."""
        ...

    def forget(self) -> None:
        """Drop what tasks left behind in the library: caches by device, hooks. Never raises."""
        ...


Emit = Callable[[TaskPart], None]
"""Gives a part of a result away at once. It may block, and raises where nobody wants the rest."""


@runtime_checkable
class PartialModel(Protocol):
    """A model that can give parts of a result before the rest is done."""

    def run_in_parts(self, task: Task, emit: Emit) -> TaskResult:
        """Run a task as ``run`` does, with its parts to ``emit`` in their order.

        A transcription's result has the whole text again, speech only what was not emitted.
        """
        ...


class ModelRuntime(Protocol):
    """One library: how its models are loaded."""

    @property
    def reference(self) -> Reference:
        """What the generated reference says of it."""
        ...

    def load(self, spec: ModelSpec, arena: Arena) -> HostedModel:
        """Load a model and put its weights into the arena.

        Raises ModelFailedError: what, where, what to do.
        """
        ...


@dataclass(frozen=True, slots=True)
class Option:
    """An option or parameter: a test of its values and the words for them, and what it means.

    ``default`` is in words, for the reference; empty: nothing is assumed.
    """

    is_valid: Callable[[Any], bool]
    words: str
    meaning: str = field(default="", kw_only=True)
    default: str = field(default="", kw_only=True)

    def means(self, meaning: str, default: str = "") -> Option:
        """Return an option of the same values with this meaning."""
        return replace(self, meaning=meaning, default=default)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What a runtime takes: one table that both checks and documents. Texts are Markdown.

    ``library`` runs the models; ``extra`` of the distribution brings it. ``sources`` are the forms
    of ``source``; ``tasks`` say what goes in and comes out.
    """

    library: str
    extra: str
    sources: tuple[str, ...]
    tasks: Mapping[TaskKind, str]
    options: Mapping[str, Option] = field(default_factory=dict)
    parameters: Mapping[str, Option] = field(default_factory=dict)
    note: str = ""


def describe_spec(spec: TensorSpec) -> str:
    """Return the words for an input: ``x FP32 [-1, 2]``."""
    return f"{spec.name} {spec.datatype} {list(spec.shape)}"


def is_number(value: object) -> bool:
    """Whether a value is a number; a bool is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


TEXT = Option(lambda value: isinstance(value, str), "a text")
FLAG = Option(lambda value: isinstance(value, bool), "true or false")
NUMBER = Option(is_number, "a number")
COUNT = Option(lambda value: is_number(value) and value == int(value) and value > 0, "a count")
OBJECT = Option(lambda value: isinstance(value, dict), "an object")
TENSORS = Option(is_rules, "an object of path patterns, each move, drop or leave").means(
    "what happens to tensors by their path from the model, with `*` and `?`, when the model leaves "
    "VRAM: `move` keeps the values in host memory; `drop` is for scratch, which comes back as "
    "zeros of its shape; `leave` is for what stays where it is",
    "weights move, what tasks leave behind stays",
)
"""The option ``tensors`` of runtimes whose models hold more than weights."""


def one_of(*values: str) -> Option:
    """Return an option that takes these texts."""
    words = ", ".join(values[:-1])
    return Option(
        lambda value: isinstance(value, str) and value in values,
        f"{words} or {values[-1]}" if words else values[-1],
    )


def explain_fault(values: Mapping[str, Any], valid: Mapping[str, Option]) -> tuple[str, str]:
    """Return the first name that is unknown or has a bad value, and the words; empty for none."""
    for name, value in values.items():
        if name not in valid:
            return name, f"unknown; {_suggest(name, valid)}"
        if not valid[name].is_valid(value):
            return name, f"must be {valid[name].words}, not {value!r}"
    return "", ""


def _suggest(name: str, valid: Collection[str]) -> str:
    if not valid:
        return "there is none"
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.0)
    return f"did you mean {near[0]}? (valid: {', '.join(sorted(valid))})"


def check_options(spec: ModelSpec, valid: Mapping[str, Option]) -> None:
    """Raise ModelFailedError for an option that the runtime does not have, or a bad value."""
    name, words = explain_fault(spec.options, valid)
    if name:
        raise ModelFailedError(
            f"model {spec.name}: option {name} of runtime {spec.runtime.value}: {words}"
        )


def check_parameters(task: Task, valid: Mapping[str, Option]) -> None:
    """Raise BadInputError for a parameter of a task that is unknown or has a bad value."""
    name, words = explain_fault(task.parameters, valid)
    if name:
        raise BadInputError(f"parameter {name} of {task.kind.value}: {words}", param=name)
