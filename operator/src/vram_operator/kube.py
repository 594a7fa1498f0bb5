"""Talks to the apiserver in raw JSON, for everything that acts.

The official client finds and refreshes the credentials (in the cluster, from a kubeconfig, from an
exec plugin); the requests are plain, since typed models are 16 times slower and refuse what they
do not know. One `Connection` serves this module and the watches of `handlers`. Knows nothing of
workloads.

Errors: `ApiError` is an answer of the server, `ApiUnavailableError` is none.
"""

from __future__ import annotations

import asyncio
import json
import os
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp.client_middlewares import ClientHandlerType
from kubernetes.aio.client import Configuration
from kubernetes.aio.config import (
    ConfigException,
    list_kube_config_contexts,
    load_incluster_config,
    load_kube_config,
)

from vram_operator.queue import RetryError

JSON = "application/json"
APPLY_PATCH = "application/apply-patch+yaml"
MERGE_PATCH = "application/merge-patch+json"
JSON_PATCH = "application/json-patch+json"
CONNECT_TIMEOUT_SECONDS = 5.0
REQUEST_TIMEOUT_SECONDS = 20.0
SERVICE_ACCOUNT_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")

Object = dict[str, Any]


class ConnectionConfigError(Exception):
    """There is no way to reach a cluster: neither a service account nor a usable kubeconfig."""


class ApiUnavailableError(RetryError):
    """The apiserver did not answer. The cluster's fault; try again."""


class ApiError(RetryError):
    """The apiserver answered with an error. ``status`` decides what it means for the caller."""

    def __init__(self, what: str, status: int, answer: Mapping[str, Any]) -> None:
        self.status = status
        self.reason = str(answer.get("reason") or "")
        self.message = str(answer.get("message") or f"HTTP {status}")
        self.details: Mapping[str, Any] = answer.get("details") or {}
        after = self.details.get("retryAfterSeconds")
        super().__init__(
            f"{what}: {status} {self.message}", None if after is None else float(after)
        )

    @property
    def is_conflict(self) -> bool:
        """Did the object change or exist in between?"""
        return self.status == 409

    @property
    def is_missing(self) -> bool:
        """Is the object not there?"""
        return self.status == 404

    @property
    def causes(self) -> list[Mapping[str, Any]]:
        """The causes that the server names, such as the budget that blocks an eviction."""
        return list(self.details.get("causes") or [])


@dataclass(frozen=True)
class Traffic:
    """One answered request, for metrics and for the health of watches."""

    method: str
    url_path: str
    is_watch: bool
    response: aiohttp.ClientResponse


class Connection:
    """Where the cluster is and how to show who we are. Safe to use from several event loops."""

    def __init__(self, configuration: Configuration, namespace: str) -> None:
        self.configuration = configuration
        self.namespace = namespace
        self.observers: list[Callable[[Traffic], None]] = []

    @property
    def server(self) -> str:
        """The URL of the apiserver."""
        return str(self.configuration.host).rstrip("/")

    def session(self) -> aiohttp.ClientSession:
        """Open a session of the running loop; the caller closes it."""
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=self._ssl_context()),
            middlewares=(self._authenticate,),
            headers={"User-Agent": "vram-operator", "Accept": JSON},
            proxy=self.configuration.proxy,
            json_serialize=json.dumps,
        )

    def _ssl_context(self) -> ssl.SSLContext:
        config = self.configuration
        context = ssl.create_default_context(cafile=config.ssl_ca_cert)
        if config.cert_file:
            context.load_cert_chain(config.cert_file, config.key_file)
        if not config.verify_ssl:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context

    async def _authenticate(
        self, request: aiohttp.ClientRequest, handler: ClientHandlerType
    ) -> aiohttp.ClientResponse:
        # The client reads a rotated service-account token again by itself, each minute.
        header = await self.configuration.get_api_key_with_prefix("BearerToken")
        if header:
            request.headers["Authorization"] = header
        response = await handler(request)
        if response.status == 401:
            await self.reload()
        is_watch = request.url.query.get("watch") in {"true", "1"}
        traffic = Traffic(request.method, request.url.path, is_watch, response)
        for observe in self.observers:
            observe(traffic)
        return response

    async def reload(self) -> None:
        """Read the credentials again: an exec plugin's token or a kubeconfig may have changed."""
        try:
            self.configuration = await _load_configuration()
        except ConnectionConfigError:
            # Those that were good until now are all there is; the server's answer tells the rest.
            return


async def connect() -> Connection:
    """Find the cluster and the operator's own namespace.

    Raises ConnectionConfigError. Reads files, or runs an exec plugin; sends nothing.
    """
    configuration = await _load_configuration()
    return Connection(configuration, _own_namespace())


async def _load_configuration() -> Configuration:
    configuration = Configuration()
    try:
        load_incluster_config(configuration)  # type: ignore[no-untyped-call]
    except ConfigException:
        try:
            await load_kube_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
        except (ConfigException, OSError, TypeError) as error:
            raise ConnectionConfigError(
                f"no cluster: this is no pod with a service account, and the kubeconfig "
                f"{os.environ.get('KUBECONFIG', '~/.kube/config')} cannot be used ({error})"
            ) from error
    return configuration


def _own_namespace() -> str:
    if os.environ.get("POD_NAMESPACE"):
        return os.environ["POD_NAMESPACE"]
    if SERVICE_ACCOUNT_NAMESPACE.is_file():
        return SERVICE_ACCOUNT_NAMESPACE.read_text().strip()
    try:
        _, active = list_kube_config_contexts()  # type: ignore[no-untyped-call]
    except (ConfigException, OSError):
        return "default"
    return str((active.get("context") or {}).get("namespace") or "default")


@dataclass(frozen=True)
class Resource:
    """One kind of object in the API. ``prefix`` is ``/api/v1`` or ``/apis/<group>/<version>``."""

    prefix: str
    plural: str

    def path(self, namespace: str | None = None, name: str = "", subresource: str = "") -> str:
        """Return the path of a collection, an object or a subresource."""
        parts = [self.prefix]
        if namespace is not None:
            parts += ["namespaces", namespace]
        parts.append(self.plural)
        parts += [part for part in (name, subresource) if part]
        return "/".join(parts)


CONFIG_MAPS = Resource("/api/v1", "configmaps")
PODS = Resource("/api/v1", "pods")
SECRETS = Resource("/api/v1", "secrets")
SERVICES = Resource("/api/v1", "services")
DEPLOYMENTS = Resource("/apis/apps/v1", "deployments")
STATEFUL_SETS = Resource("/apis/apps/v1", "statefulsets")
LEASES = Resource("/apis/coordination.k8s.io/v1", "leases")
EVENTS = Resource("/apis/events.k8s.io/v1", "events")
WORKLOADS = Resource("/apis/vram.dev/v1alpha1", "gpumodelworkloads")
RESTARTS = Resource("/apis/vram.dev/v1alpha1", "gpupodrestarts")


@dataclass(frozen=True)
class Call:
    """One request: everything but the identity of the caller."""

    method: str
    path: str
    body: Any = None
    content_type: str = JSON
    params: Mapping[str, str] = field(default_factory=dict)


class Api:
    """Sends requests and returns the JSON of the answers.

    ``guard`` is called before each request that changes something and raises when this process may
    not act any more; that is how a lost Lease stops everything at once. Nothing is retried here.
    """

    def __init__(
        self,
        connection: Connection,
        session: aiohttp.ClientSession,
        guard: Callable[[], None] | None = None,
    ) -> None:
        self._connection = connection
        self._session = session
        self._guard = guard

    def guarded(self, guard: Callable[[], None]) -> Api:
        """Return the same with a guard before each change."""
        return Api(self._connection, self._session, guard)

    async def get(self, path: str, **params: str) -> Object:
        """Return an object or a list."""
        return await self.send(Call("GET", path, params=params))

    async def find(self, path: str) -> Object | None:
        """Return an object, or None if there is none."""
        try:
            return await self.get(path)
        except ApiError as error:
            if error.is_missing:
                return None
            raise

    async def create(self, path: str, body: Object, **params: str) -> Object:
        """Create an object in the collection at ``path``."""
        return await self.send(Call("POST", path, body, params=params))

    async def replace(self, path: str, body: Object) -> Object:
        """Replace an object; its resourceVersion guards against a lost update."""
        return await self.send(Call("PUT", path, body))

    async def merge(self, path: str, body: Object) -> Object:
        """Merge ``body`` into an object; a resourceVersion in it guards against a lost update."""
        return await self.send(Call("PATCH", path, body, MERGE_PATCH))

    async def apply(self, path: str, body: Object, manager: str) -> Object:
        """Server-side apply as ``manager``, taking over fields that others own."""
        params = {"fieldManager": manager, "force": "true"}
        return await self.send(Call("PATCH", path, body, APPLY_PATCH, params))

    async def delete(self, path: str, uid: str) -> None:
        """Delete the object with this uid; that it is gone already is fine."""
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": {"uid": uid}}
        try:
            await self.send(Call("DELETE", path, body))
        except ApiError as error:
            if not (error.is_missing or error.is_conflict):
                raise

    async def send(self, call: Call) -> Object:
        """Send one request. Raises ApiError, ApiUnavailableError and what the guard raises."""
        if self._guard is not None and call.method != "GET":
            self._guard()
        what = f"{call.method} {call.path}"
        try:
            status, content, retry_after = await self._exchange(call)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ApiUnavailableError(f"{what}: {error or type(error).__name__}") from error
        answer = _parse(content)
        if status >= 400:
            if retry_after.isdecimal():
                details = answer.get("details") or {}
                answer["details"] = {"retryAfterSeconds": int(retry_after), **details}
            raise ApiError(what, status, answer)
        return answer

    async def _exchange(self, call: Call) -> tuple[int, bytes, str]:
        timeout = aiohttp.ClientTimeout(
            total=REQUEST_TIMEOUT_SECONDS, sock_connect=CONNECT_TIMEOUT_SECONDS
        )
        data = None if call.body is None else json.dumps(call.body).encode()
        headers = {} if data is None else {"Content-Type": call.content_type}
        async with asyncio.timeout(REQUEST_TIMEOUT_SECONDS):
            async with self._session.request(
                call.method,
                self._connection.server + call.path,
                data=data,
                params=call.params,
                headers=headers,
                timeout=timeout,
            ) as response:
                retry_after = response.headers.get("Retry-After", "")
                return response.status, await response.read(), retry_after


def _parse(content: bytes) -> Object:
    try:
        answer = json.loads(content)
    except ValueError:
        return {"message": content[:200].decode(errors="replace").strip()}
    return answer if isinstance(answer, dict) else {"message": str(answer)[:200]}
