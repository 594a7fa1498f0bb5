"""Structural OpenAPI v3 schemas from msgspec types, as CustomResourceDefinitions want them.

Why it exists: msgspec's own JSON schemas use ``$ref`` and ``anyOf``, which structural schemas
forbid, and say nothing of defaults that the apiserver is to fill in. Called by
``vram_operator.crds`` alone. Pure; it knows no particular type.

What maps to what:

1. a struct → an object with properties; a field without default is required;
2. a default → ``default``, but neither for what the operator writes (``Status``) nor for empty
   strings and containers, which are the same as absent;
3. ``X | None`` → ``X``: Kubernetes has no nulls, absent is absent;
4. ``int | str`` → ``x-kubernetes-int-or-string``;
5. ``dict[str, Any]`` → an object whose unknown fields are kept;
6. ``Meta.extra_json_schema`` → merged in, key by key, at any depth.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import msgspec
from msgspec import NODEFAULT, Struct, inspect

from vram_operator.api_wire import Status

Schema = dict[str, Any]


class UnsupportedTypeError(TypeError):
    """A type has no structural schema; the message names it. An error of the programmer."""


def structural_schema(of: type[Struct]) -> Schema:
    """Return the schema of a type; raises UnsupportedTypeError."""
    return _schema(inspect.type_info(of))


def _schema(info: inspect.Type) -> Schema:
    match info:
        case inspect.Metadata():
            return _merged(_schema(info.type), info.extra_json_schema or {})
        case inspect.UnionType():
            return _union(info)
        case inspect.StructType():
            return _object(info)
        case inspect.ListType():
            items = {"type": "array", "items": _schema(info.item_type)}
            return items | _bounds(minItems=info.min_length, maxItems=info.max_length)
        case inspect.DictType():
            return _map(info)
        case _:
            return _scalar(info)


def _scalar(info: inspect.Type) -> Schema:
    match info:
        case inspect.StrType():
            return {"type": "string"} | _bounds(
                minLength=info.min_length, maxLength=info.max_length, pattern=info.pattern
            )
        case inspect.IntType():
            return {"type": "integer", "format": "int64"} | _bounds(
                minimum=info.ge, maximum=info.le
            )
        case inspect.BoolType():
            return {"type": "boolean"}
        case inspect.DateTimeType():
            return {"type": "string", "format": "date-time"}
        case inspect.EnumType():
            return {"type": "string", "enum": [one.value for one in info.cls]}
        case inspect.LiteralType():
            return {"type": "string", "enum": list(info.values)}
        case _:
            raise UnsupportedTypeError(f"no structural schema for {info}")


def _union(info: inspect.UnionType) -> Schema:
    members = [_schema(one) for one in info.types if not isinstance(one, inspect.NoneType)]
    if len(members) == 1:
        return members[0]
    if {one.get("type") for one in members} == {"integer", "string"}:
        joined: Schema = {"x-kubernetes-int-or-string": True}
        for one in members:
            joined |= {key: value for key, value in one.items() if key not in {"type", "format"}}
        return joined
    raise UnsupportedTypeError(f"no structural schema for the union {info}")


def _map(info: inspect.DictType) -> Schema:
    bounds = _bounds(maxProperties=info.max_length)
    if isinstance(info.value_type, inspect.AnyType):
        return {"type": "object", "x-kubernetes-preserve-unknown-fields": True} | bounds
    return {"type": "object", "additionalProperties": _schema(info.value_type)} | bounds


def _object(info: inspect.StructType) -> Schema:
    properties: Schema = {}
    for one in info.fields:
        schema = _schema(one.type)
        if not issubclass(info.cls, Status):
            schema |= _default(one)
        properties[one.encode_name] = schema
    required = [one.encode_name for one in info.fields if one.required]
    described: Schema = {"description": _first_paragraph(info.cls), "type": "object"}
    return described | ({"required": required} if required else {}) | {"properties": properties}


def _default(of: inspect.Field) -> Schema:
    if of.default_factory is not NODEFAULT:
        value = msgspec.to_builtins(of.default_factory())
        # The apiserver fills the fields of {} by their own defaults.
        is_struct = isinstance(of.default_factory, type) and issubclass(of.default_factory, Struct)
        return {"default": {}} if is_struct and value == {} else {}
    value = of.default.value if isinstance(of.default, Enum) else of.default
    return {} if value in (NODEFAULT, None, "") else {"default": value}


def _bounds(**named: Any) -> Schema:
    return {name: value for name, value in named.items() if value is not None}


def _first_paragraph(of: type) -> str:
    return " ".join((of.__doc__ or "").split("\n\n", 1)[0].split())


def _merged(into: Schema, extra: Schema) -> Schema:
    merged = dict(into)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    # A description reads first, in the file and in kubectl explain.
    return {key: merged[key] for key in sorted(merged, key=lambda key: key != "description")}


__all__ = ["Schema", "UnsupportedTypeError", "structural_schema"]
