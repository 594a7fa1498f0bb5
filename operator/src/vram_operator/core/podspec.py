"""Merging a user's partial PodSpec over the generated one.

Why it exists: a template is only useful when every field of a pod can be reached through it, and
only safe when what is not mentioned stays. Called by ``resources``. It follows strategic merge
patch: objects merge, ``null`` removes, lists with a merge key merge by it, other lists replace.
An environment variable or volume that is named again is replaced as a whole, since two sources of
one value are invalid.
"""

from __future__ import annotations

from typing import Any

_MERGE_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "ephemeralContainers": "name",
    "ports": "name",
    "volumeMounts": "mountPath",
    "volumeDevices": "devicePath",
    "imagePullSecrets": "name",
    "hostAliases": "ip",
}
_REPLACE_KEYS = {"env": "name", "volumes": "name"}


class InvalidTemplateError(ValueError):
    """``spec.template.spec`` is no partial PodSpec: the user's to correct; names the field."""


def merge_pod_spec(generated: dict[str, Any], partial: dict[str, Any]) -> dict[str, Any]:
    """Return the generated PodSpec with the partial one merged over it. Changes neither.

    Raises InvalidTemplateError.
    """
    return _merge_objects(generated, partial, "template.spec")


def _merge_objects(base: dict[str, Any], over: dict[str, Any], path: str) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = _merge_values(base.get(key), value, f"{path}.{key}")
    return merged


def _merge_values(base: Any, over: Any, path: str) -> Any:
    if isinstance(base, dict):
        if not isinstance(over, dict):
            raise InvalidTemplateError(f"{path} must be an object")
        return _merge_objects(base, over, path)
    key = path.rsplit(".", 1)[-1]
    name = _MERGE_KEYS.get(key) or _REPLACE_KEYS.get(key)
    if name is None:
        return over
    if not isinstance(over, list) or not all(isinstance(item, dict) for item in over):
        raise InvalidTemplateError(f"{path} must be a list of objects")
    return _merge_lists(base or [], over, name, path)


def _merge_lists(
    base: list[dict[str, Any]], over: list[dict[str, Any]], name: str, path: str
) -> list[dict[str, Any]]:
    replaces = path.rsplit(".", 1)[-1] in _REPLACE_KEYS
    merged = list(base)
    for item in over:
        if item.get(name) is None:
            if path.endswith(".ports"):
                merged.append(item)
                continue
            raise InvalidTemplateError(f"{path}: every item needs a {name}")
        where = next((n for n, old in enumerate(merged) if old.get(name) == item[name]), None)
        if where is None:
            merged.append(item)
        elif replaces:
            merged[where] = item
        else:
            merged[where] = _merge_objects(merged[where], item, f"{path}[{item[name]}]")
    return merged
