"""Decides whether a control call was signed by the operator, for this pod and this very call.

Why it exists: whoever reaches the control port could otherwise restart pods. Called by
``control.py``. It knows no HTTP and no clock (``now`` is an argument); it reads one file, the
public keys, whenever that changes. The token's algorithm is fixed here and never taken from the
token: https://datatracker.ietf.org/doc/html/rfc8725#section-3.1
"""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import msgspec
import structlog

from vram_agent.errors import AgentError
from vram_agent.protocol import MAX_TOKEN_LIFETIME_SECONDS
from vram_agent.serving.watched import WatchedKeys

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

_log = structlog.get_logger(__name__)

ALGORITHM = "EdDSA"
_MAX_SPENT = 10_000
_PEM = re.compile(rb"-----BEGIN PUBLIC KEY-----.+?-----END PUBLIC KEY-----", re.DOTALL)


class UnauthenticatedError(AgentError):
    """There is no token, or it is not one of the operator's that is valid now."""

    status = 401
    code = "unauthenticated"


class ForbiddenError(AgentError):
    """The token is good but for another pod or call, or spent; or none can be accepted here."""

    status = 403
    code = "forbidden"


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedCall:
    """The call as it was received: ``target`` is the path as sent, with its query."""

    method: str
    target: str
    body: bytes

    @property
    def action(self) -> str:
        """What the claim ``act`` must say."""
        return f"{self.method} {self.target}"

    @property
    def body_digest(self) -> str:
        """What the claim ``bsha`` must say."""
        return hashlib.sha256(self.body).hexdigest()


class Claims(msgspec.Struct, frozen=True, kw_only=True):
    """The claims that every token has; others are ignored, but for ``nbf``."""

    aud: str
    exp: float
    jti: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    act: str
    bsha: str
    nbf: float | None = None


class PublicKeys:
    """The operator's public keys in a PEM file: the current one and, while it rotates, another."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._keys = WatchedKeys(path, lambda text: _parse_keys(text, path))

    def current(self) -> tuple[Ed25519PublicKey, ...]:
        """Return the keys of the file as it is now; none where it cannot be read."""
        return self._keys.current()


class TokenVerifier:
    """Verifies tokens and remembers the spent ones until they would have expired anyway."""

    def __init__(self, keys: PublicKeys, audience: str) -> None:
        self._keys = keys
        self._audience = audience
        self._spent: dict[str, float] = {}

    def verify(self, token: str, call: SignedCall, now: float) -> None:
        """Return when the call may be carried out; its token is spent then.

        1. This agent can verify none: 403.
        2. Not signed by one of the keys, or claims are missing or expired: 401.
        3. For another pod, another call or another body: 403.
        4. Spent: 403.

        Only a token that passes 1 to 3 spends its ``jti``. ``now`` in seconds since the epoch.
        """
        # 1.
        keys = self._keys.current()
        if not self._audience:
            raise ForbiddenError("control calls are refused: POD_UID is not set")
        if not keys:
            raise ForbiddenError(
                f"control calls are refused: there is no Ed25519 public key in {self._keys.path}"
            )
        # 2.
        claims = _authentic_claims(token, keys)
        _ensure_timely(claims, now)
        # 3.
        if not _same(claims.aud, self._audience):
            raise ForbiddenError("the token is for another pod")
        if not _same(claims.act, call.action):
            raise ForbiddenError(f"the token is not for {call.action}")
        if not _same(claims.bsha.lower(), call.body_digest):
            raise ForbiddenError("the token is for another body")
        # 4.
        self._spend(claims, now)

    def _spend(self, claims: Claims, now: float) -> None:
        self._spent = {jti: exp for jti, exp in self._spent.items() if exp > now}
        if claims.jti in self._spent:
            raise ForbiddenError("the token is spent")
        if len(self._spent) >= _MAX_SPENT:  # forgetting one would let it be used again
            raise ForbiddenError("too many control calls within a minute; try again later")
        self._spent[claims.jti] = claims.exp


def _authentic_claims(token: str, keys: tuple[Ed25519PublicKey, ...]) -> Claims:
    import jwt  # noqa: PLC0415 - 0.3 s that the start of the agent does without

    signatures = jwt.PyJWS()
    for key in keys:
        try:
            payload = signatures.decode(token, key, algorithms=[ALGORITHM])
        except jwt.InvalidSignatureError:
            continue
        except jwt.InvalidTokenError as error:
            raise UnauthenticatedError(f"the token is no valid JWT: {error}") from error
        try:
            return msgspec.json.decode(payload, type=Claims)
        except msgspec.DecodeError as error:
            raise UnauthenticatedError(f"the token's claims are not valid: {error}") from error
    raise UnauthenticatedError("the token is not signed by the operator's key")


def _ensure_timely(claims: Claims, now: float) -> None:
    if claims.exp <= now:
        raise UnauthenticatedError("the token is expired")
    if claims.exp > now + MAX_TOKEN_LIFETIME_SECONDS:
        raise UnauthenticatedError(
            f"the token expires more than {MAX_TOKEN_LIFETIME_SECONDS} s from now"
        )
    if claims.nbf is not None and claims.nbf > now:
        raise UnauthenticatedError("the token is not valid yet")


def _parse_keys(text: bytes, path: str) -> tuple[Ed25519PublicKey, ...]:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (  # noqa: PLC0415 - as jwt above
        Ed25519PublicKey,
    )
    from cryptography.hazmat.primitives.serialization import (  # noqa: PLC0415
        load_pem_public_key,
    )

    keys = []
    for number, block in enumerate(_PEM.findall(text), start=1):
        try:
            key = load_pem_public_key(block)
        except ValueError:
            key = None
        if isinstance(key, Ed25519PublicKey):
            keys.append(key)
        else:
            _log.warning("public key ignored: it is no Ed25519 key", path=path, number=number)
    return tuple(keys)


def _same(claimed: str, expected: str) -> bool:
    return hmac.compare_digest(claimed.encode(), expected.encode())
