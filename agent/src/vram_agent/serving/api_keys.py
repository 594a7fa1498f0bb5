"""Lets only clients with a key use the serving port, where the config names a file of keys.

Why it exists: a Service is reachable from the whole cluster, and often from further. Off without
``serving.apiKeyFile``. It knows no API and no model; what answers a probe stays open.
"""

from __future__ import annotations

import hashlib
import hmac

import structlog
from aiohttp import hdrs, web
from aiohttp.typedefs import Handler

from vram_agent.errors import AgentError
from vram_agent.serving.watched import WatchedKeys

_log = structlog.get_logger(__name__)

_OPEN_PATHS = frozenset({"/v2/health/live", "/v2/health/ready"})
_COMMENT = b"#"


class ApiKeyError(AgentError):
    """The request has no API key, or one that the agent does not know."""

    status = 401
    code = "invalid_api_key"


class ApiKeys:
    """Who may use the serving port: everyone where ``path`` is empty.

    A file that is missing or has no key admits nobody: a mistake must not open the port.
    """

    def __init__(self, path: str) -> None:
        self._digests = WatchedKeys(path, self._parse) if path else None
        self._path = path

    def ensure_known(self, authorization: str | None) -> None:
        """Raise ApiKeyError unless the value of the header ``Authorization`` has a known key.

        Digests are compared, each with all of them: time tells neither a key nor its length.
        """
        if self._digests is None:
            return
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise ApiKeyError("this agent needs an API key; send Authorization: Bearer <key>")
        digest = _digest(key.strip().encode("utf-8", "surrogateescape"))
        matches = [hmac.compare_digest(digest, known) for known in self._digests.current()]
        if not any(matches):
            raise ApiKeyError("the API key is not one that this agent knows")

    def _parse(self, text: bytes) -> tuple[bytes, ...]:
        """Return the digests: one key on each line, but for blank lines and comments."""
        lines = [line.strip() for line in text.splitlines()]
        digests = tuple(_digest(line) for line in lines if line and not line.startswith(_COMMENT))
        if digests:
            _log.info("API keys read", path=self._path, keys=len(digests))
        else:
            _log.warning("there is no API key in the file: every request gets 401", path=self._path)
        return digests


API_KEYS: web.AppKey[ApiKeys] = web.AppKey("api_keys", ApiKeys)


def ensure_admitted(request: web.Request) -> None:
    """Raise ApiKeyError for a request without a known key, but for probes.

    The route that will answer decides, not the path as written.
    """
    resource = request.match_info.route.resource
    if resource is None or resource.canonical not in _OPEN_PATHS:
        request.app[API_KEYS].ensure_known(request.headers.get(hdrs.AUTHORIZATION))


@web.middleware
async def known_keys_only(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Let probes and requests with a known key pass."""
    ensure_admitted(request)
    return await handler(request)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
