"""Reads from the apiserver, just before acting, what a plan took from the watches.

Called by `apply` and `pod_actions`. What is read goes into the cache too, so that the next plan
rests on it.
"""

from __future__ import annotations

from vram_operator.cache import Cache
from vram_operator.core.snapshot import Pod
from vram_operator.kube import PODS, RESTARTS, Api, Object, Resource
from vram_operator.queue import RetryError


class StaleError(RetryError):
    """The cluster is not as the plan thought. Nothing was done; plan again."""


class Live:
    """The cluster as it is at this moment."""

    def __init__(self, api: Api, cache: Cache) -> None:
        self._api = api
        self._cache = cache

    async def refresh(self, resource: Resource, known: Object) -> Object | None:
        """Read an object live into the cache; None when it is gone or another of its name."""
        metadata = known["metadata"]
        live = await self._api.find(resource.path(metadata["namespace"], metadata["name"]))
        if live is None:
            self._cache.observe_deletion(resource, known)
            return None
        self._cache.observe(resource, live)
        return live if live["metadata"]["uid"] == metadata["uid"] else None

    async def pod(self, namespace: str, pod: Pod) -> Object:
        """Return the pod as it is now. Raises StaleError if it is not the one that was meant."""
        known = {
            "metadata": {
                "namespace": namespace,
                "name": pod.name,
                "uid": pod.uid,
                "resourceVersion": pod.resource_version,
            }
        }
        live = await self.refresh(PODS, known)
        if live is None:
            raise StaleError(f"pod {pod.name} with uid {pod.uid} is gone")
        return live

    async def ensure_no_news(self, namespace: str, pod_name: str) -> None:
        """Raise StaleError if there is a pod of that name that the watches have not shown as it is.

        A list may be older than the pod; what is decided because a pod is missing cannot be undone.
        """
        live = await self._api.find(PODS.path(namespace, pod_name))
        if live is not None and self._cache.observe(PODS, live) is not None:
            raise StaleError(f"pod {pod_name} is not as the watches showed it")

    async def ensure_open(self, namespace: str, restart_name: str) -> None:
        """Raise StaleError unless the GPUPodRestart is as the plan saw it and not finished."""
        known = self._cache.find(RESTARTS, namespace, restart_name)
        if known is None:
            raise StaleError(f"GPUPodRestart {restart_name} is gone")
        version = known["metadata"]["resourceVersion"]
        live = await self.refresh(RESTARTS, known)
        if live is None or live["metadata"]["resourceVersion"] != version:
            raise StaleError(f"GPUPodRestart {restart_name} has changed")
