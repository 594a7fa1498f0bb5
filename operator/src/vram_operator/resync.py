"""Lists everything that is watched, to fill the cache at the start and to mend it now and then.

A watch that was interrupted for long never tells what was deleted meanwhile; a list does. Called
by `acting`: once before this replica acts, so that no restart is decided while the open ones are
not known yet, and then every RESYNC_SECONDS.
"""

from __future__ import annotations

from vram_agent.protocol import WORKLOAD_LABEL

from vram_operator.cache import Cache
from vram_operator.handlers import SELECTED_BY_LABEL, WATCHED
from vram_operator.kube import Api, Object, Resource

RESYNC_SECONDS = 600.0
PAGE_OBJECTS = "500"


async def resync(api: Api, cache: Cache, namespaces: tuple[str, ...]) -> None:
    """Make the cache agree with the cluster. Raises what the API raises."""
    for resource in WATCHED:
        for namespace in namespaces or (None,):
            objects, version = await _list(api, resource, namespace)
            cache.replace_all(resource, namespace, objects, version)


async def _list(api: Api, resource: Resource, namespace: str | None) -> tuple[list[Object], int]:
    params = {"limit": PAGE_OBJECTS}
    if resource in SELECTED_BY_LABEL:
        params["labelSelector"] = WORKLOAD_LABEL
    objects: list[Object] = []
    while True:
        page = await api.get(resource.path(namespace), **params)
        objects += page["items"]
        metadata = page["metadata"]
        if not metadata.get("continue"):
            return objects, int(metadata["resourceVersion"])
        params["continue"] = metadata["continue"]
