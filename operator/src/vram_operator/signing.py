"""Signs the operator's control calls with a key that only the operator's namespace holds.

The private Ed25519 key lives in a Secret of the operator's own namespace. The plan puts the current
and the previous public key into a ConfigMap of each namespace that has a workload; agents mount it
and check each call offline. A token is good for one call to one pod, once, for under a minute.
"""

from __future__ import annotations

import base64
import hashlib
import uuid
from dataclasses import dataclass

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from vram_agent.protocol import MAX_TOKEN_LIFETIME_SECONDS

from vram_operator.api import FIELD_MANAGER
from vram_operator.clock import Clock
from vram_operator.kube import SECRETS, Api, ApiError, Object

SECRET_NAME = "vram-operator-signing-key"  # noqa: S105 - the name of an object
PRIVATE_KEY = "private.pem"
PREVIOUS_PUBLIC_KEY = "previous-public.pem"
ISSUER = "vram-operator"
# Half of what agents allow, so that clocks may differ by as much.
TOKEN_LIFETIME_SECONDS = MAX_TOKEN_LIFETIME_SECONDS // 2


class UnusableKeyError(Exception):
    """The Secret with the signing key holds something else; the message says what to do."""


@dataclass(frozen=True)
class Signer:
    """Makes tokens with one private key."""

    key: Ed25519PrivateKey
    public_keys_pem: str
    clock: Clock

    def token(self, pod_uid: str, act: str, body: bytes) -> str:
        """Return a token for one call, ``act`` being its method and path as they are sent."""
        now = int(self.clock.now().timestamp())
        claims = {
            "iss": ISSUER,
            "aud": pod_uid,
            "iat": now,
            "exp": now + TOKEN_LIFETIME_SECONDS,
            "jti": str(uuid.uuid4()),
            "act": act,
            "bsha": hashlib.sha256(body).hexdigest(),
        }
        return jwt.encode(claims, self.key, algorithm="EdDSA")


def public_pem(key: Ed25519PrivateKey) -> str:
    """Return the public half of ``key`` in PEM."""
    return (
        key.public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        .decode()
    )


async def ensure_signer(api: Api, namespace: str, clock: Clock) -> Signer:
    """Read the key's Secret in ``namespace``, or create it. Whoever creates it first decides.

    Raises UnusableKeyError, and what the API raises.
    """
    path = SECRETS.path(namespace, SECRET_NAME)
    secret = await api.find(path)
    if secret is None:
        try:
            secret = await api.create(SECRETS.path(namespace), _new_secret(namespace))
        except ApiError as error:
            if not error.is_conflict:
                raise
            secret = await api.get(path)
    return _read_secret(secret, clock)


def _new_secret(namespace: str) -> Object:
    pem = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": "Opaque",
        "metadata": {
            "name": SECRET_NAME,
            "namespace": namespace,
            "labels": {"app.kubernetes.io/managed-by": FIELD_MANAGER},
        },
        "data": {PRIVATE_KEY: base64.b64encode(pem).decode()},
    }


def _read_secret(secret: Object, clock: Clock) -> Signer:
    data = secret.get("data") or {}
    try:
        key = serialization.load_pem_private_key(base64.b64decode(data[PRIVATE_KEY]), password=None)
    except (KeyError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise UnusableKeyError(_unusable(secret)) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise UnusableKeyError(_unusable(secret))
    previous = base64.b64decode(data.get(PREVIOUS_PUBLIC_KEY, "")).decode()
    return Signer(key, public_pem(key) + previous, clock)


def _unusable(secret: Object) -> str:
    metadata = secret["metadata"]
    return (
        f"Secret {metadata['namespace']}/{metadata['name']} has no Ed25519 key in PEM under "
        f"{PRIVATE_KEY}; delete it and the operator makes a new one"
    )
