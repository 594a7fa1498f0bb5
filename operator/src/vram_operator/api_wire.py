"""Bases, scalars and the tolerant reading and writing of custom resources.

Why it exists: an operator that is older than the CRD must still read its objects, so unknown
fields are dropped here and nowhere else; and Kubernetes has no nulls, so absent values stay
unwritten. Called by whatever turns an object of the apiserver into a type of
``vram_operator.api`` or back. It knows no Kubernetes client and no clock.
"""

from __future__ import annotations

from datetime import UTC, datetime
from functools import cache
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct, inspect

from vram_operator.api_names import ConditionStatus

T = TypeVar("T", bound=Struct)

# RFC 3339, always with an offset; the apiserver checks the format date-time.
Timestamp = Annotated[datetime, Meta(tz=True)]
DrainTimeoutSeconds = Annotated[
    int,
    Meta(
        ge=0,
        le=86_400,
        description="How long accepted requests may take before the restart goes on without them.",
    ),
]
ObservedGeneration = Annotated[
    int, Meta(ge=0, description="The generation of the spec that this status is about.")
]
# Conditions merge by their type: each writer owns the ones that it sets.
MAP_BY_TYPE = {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}


class Spec(Struct, rename="camel", frozen=True, kw_only=True, omit_defaults=True):
    """Base of what a person writes; read through ``decode``, which tolerates unknown fields."""


class Status(Struct, rename="camel", frozen=True, kw_only=True):
    """Base of what the operator writes; ``None`` stays unwritten, see ``encode``."""


class Condition(Status, frozen=True, kw_only=True):
    """One condition, as in the Kubernetes API conventions."""

    type: Annotated[str, Meta(max_length=64, description="What the condition is about.")]
    status: Annotated[ConditionStatus, Meta(description="True, False or Unknown.")]
    reason: Annotated[
        str,
        Meta(
            min_length=1,
            max_length=128,
            pattern="^[A-Za-z]([A-Za-z0-9_]*[A-Za-z0-9])?$",
            description="Why, as one documented word.",
        ),
    ]
    message: Annotated[
        str, Meta(max_length=4096, description="Why, as a sentence with figures and names.")
    ] = ""
    last_transition_time: Annotated[Timestamp, Meta(description="When status changed last.")]
    observed_generation: Annotated[
        int, Meta(ge=0, description="The generation of the object that this was said about.")
    ] = 0


def decode(value: dict[str, Any], to: type[T]) -> T:
    """Read a spec or status as the apiserver sent it.

    Unknown fields and nulls are dropped at every level, free-form parts (options, template.spec)
    are kept as they are. Raises msgspec.ValidationError, whose message has the path of the fault.
    """
    return msgspec.convert(_pruned(value, _type_info(to)), to)


def encode(value: Struct) -> dict[str, Any]:
    """Return what is to be written: camelCase, times in whole seconds of UTC, nulls left out."""
    encoded: dict[str, Any] = _without_nulls(msgspec.to_builtins(value, builtin_types=(datetime,)))
    return encoded


@cache
def _type_info(of: type[Struct]) -> inspect.Type:
    return inspect.type_info(of)


def _pruned(value: Any, info: inspect.Type) -> Any:
    match info:
        case inspect.Metadata():
            return _pruned(value, info.type)
        case inspect.UnionType():
            structs = [one for one in info.types if isinstance(one, inspect.StructType)]
            return _pruned(value, structs[0]) if structs else value
        case inspect.ListType() if isinstance(value, list):
            return [_pruned(item, info.item_type) for item in value]
        case inspect.StructType() if isinstance(value, dict):
            return {
                one.encode_name: _pruned(value[one.encode_name], one.type)
                for one in info.fields
                if value.get(one.encode_name) is not None
            }
        case _:
            return value


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, datetime):
        return value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return value


__all__ = [
    "MAP_BY_TYPE",
    "Condition",
    "DrainTimeoutSeconds",
    "ObservedGeneration",
    "Spec",
    "Status",
    "Timestamp",
    "decode",
    "encode",
]
