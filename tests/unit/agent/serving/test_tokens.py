from __future__ import annotations

import base64
import hmac
import json
import os
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from vram_agent.serving.tokens import (
    ForbiddenError,
    PublicKeys,
    SignedCall,
    TokenVerifier,
    UnauthenticatedError,
)

NOW = 1_800_000_000.0
POD = "5b1c7d1e-pod"
CALL = SignedCall(method="POST", target="/models/a/offload?tier=Host", body=b'{"x": 1}')
BODY_SHA256 = "613fe5aa65343dbb1b9abe6abac6773f5c91bd60d3f2ffb7e2eae69e1db8b227"
OPERATOR = Ed25519PrivateKey.generate()
NEXT_OPERATOR = Ed25519PrivateKey.generate()
STRANGER = Ed25519PrivateKey.generate()


def pem(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def good_claims(**changes: Any) -> dict[str, Any]:
    claims = {
        "aud": POD,
        "exp": NOW + 30,
        "jti": "one",
        "act": "POST /models/a/offload?tier=Host",
        "bsha": BODY_SHA256,
    }
    claims.update(changes)
    return {name: value for name, value in claims.items() if value is not None}


def signed(key: Any = OPERATOR, algorithm: str = "EdDSA", **changes: Any) -> str:
    return jwt.encode(good_claims(**changes), key, algorithm=algorithm)


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.pem"
    path.write_bytes(pem(OPERATOR))
    return path


@pytest.fixture
def verifier(key_file: Path) -> TokenVerifier:
    return TokenVerifier(PublicKeys(str(key_file)), POD)


def test_a_good_token_is_accepted(verifier: TokenVerifier) -> None:
    verifier.verify(signed(), CALL, NOW)


def test_a_token_is_good_once(verifier: TokenVerifier) -> None:
    token = signed()
    verifier.verify(token, CALL, NOW)
    with pytest.raises(ForbiddenError, match="spent"):
        verifier.verify(token, CALL, NOW + 1)


def test_the_same_jti_in_another_token_is_spent_too(verifier: TokenVerifier) -> None:
    verifier.verify(signed(), CALL, NOW)
    with pytest.raises(ForbiddenError, match="spent"):
        verifier.verify(signed(exp=NOW + 40), CALL, NOW)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        pytest.param({"aud": "another-pod"}, "another pod", id="for another pod"),
        pytest.param({"act": "POST /restart"}, "not for POST", id="for another path"),
        pytest.param(
            {"act": "POST /models/a/offload"}, "not for POST", id="for the path without its query"
        ),
        pytest.param(
            {"act": "GET /models/a/offload?tier=Host"}, "not for POST", id="for another method"
        ),
        pytest.param({"bsha": "0" * 64}, "another body", id="for another body"),
        pytest.param({"bsha": ""}, "another body", id="for no body"),
    ],
)
def test_a_token_for_something_else_is_forbidden(
    verifier: TokenVerifier, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ForbiddenError, match=reason):
        verifier.verify(signed(**changes), CALL, NOW)
    verifier.verify(signed(), CALL, NOW)  # its jti was not spent by the refusal


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        pytest.param({"exp": NOW}, "expired", id="expired just now"),
        pytest.param({"exp": NOW - 3600}, "expired", id="expired long ago"),
        pytest.param({"exp": NOW + 61}, "more than 60 s", id="valid for too long"),
        pytest.param({"nbf": NOW + 10}, "not valid yet", id="not valid yet"),
        *[
            pytest.param({name: None}, f"required field `{name}`", id=f"without {name}")
            for name in ("aud", "exp", "jti", "act", "bsha")
        ],
        pytest.param({"jti": ""}, "claims are not valid", id="empty jti"),
        pytest.param({"jti": "x" * 300}, "claims are not valid", id="endless jti"),
        pytest.param({"aud": [POD]}, "claims are not valid", id="a list of audiences"),
    ],
)
def test_a_token_that_is_not_valid_now_is_unauthenticated(
    verifier: TokenVerifier, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UnauthenticatedError, match=reason):
        verifier.verify(signed(**changes), CALL, NOW)


def test_exactly_60_seconds_ahead_is_accepted(verifier: TokenVerifier) -> None:
    verifier.verify(signed(exp=NOW + 60), CALL, NOW)


def test_a_stranger_s_signature_is_unauthenticated(verifier: TokenVerifier) -> None:
    with pytest.raises(UnauthenticatedError, match="not signed by the operator"):
        verifier.verify(signed(STRANGER), CALL, NOW)


@pytest.mark.parametrize("token", ["", "x", "a.b.c", "....", "é.é.é"])
def test_what_is_no_token_is_unauthenticated(verifier: TokenVerifier, token: str) -> None:
    with pytest.raises(UnauthenticatedError):
        verifier.verify(token, CALL, NOW)


def _encode(part: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode()


def test_a_public_key_used_as_hmac_secret_is_unauthenticated(verifier: TokenVerifier) -> None:
    message = f"{_encode({'alg': 'HS256', 'typ': 'JWT'})}.{_encode(good_claims())}"
    digest = hmac.new(pem(OPERATOR), message.encode(), "sha256").digest()
    token = f"{message}.{base64.urlsafe_b64encode(digest).rstrip(b'=').decode()}"
    with pytest.raises(UnauthenticatedError, match="alg"):
        verifier.verify(token, CALL, NOW)


def test_alg_none_is_unauthenticated(verifier: TokenVerifier) -> None:
    with pytest.raises(UnauthenticatedError, match="alg"):
        verifier.verify(
            f"{_encode({'alg': 'none', 'typ': 'JWT'})}.{_encode(good_claims())}.", CALL, NOW
        )


def test_an_altered_claim_breaks_the_signature(verifier: TokenVerifier) -> None:
    head, _, signature = signed(aud="another-pod").split(".")
    with pytest.raises(UnauthenticatedError, match="not signed"):
        verifier.verify(f"{head}.{_encode(good_claims())}.{signature}", CALL, NOW)


def test_two_keys_are_valid_at_once_while_they_rotate(
    verifier: TokenVerifier, key_file: Path
) -> None:
    key_file.write_bytes(b"# current\n" + pem(NEXT_OPERATOR) + b"# previous\n" + pem(OPERATOR))
    verifier.verify(signed(OPERATOR, jti="old"), CALL, NOW)
    verifier.verify(signed(NEXT_OPERATOR, jti="new"), CALL, NOW)


def test_a_configmap_swap_is_seen_and_the_old_key_is_gone(tmp_path: Path) -> None:
    for name, key in (("first", OPERATOR), ("second", NEXT_OPERATOR)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "keys.pem").write_bytes(pem(key))
    (tmp_path / "..data").symlink_to("first")
    (tmp_path / "keys.pem").symlink_to("..data/keys.pem")
    verifier = TokenVerifier(PublicKeys(str(tmp_path / "keys.pem")), POD)
    verifier.verify(signed(OPERATOR, jti="1"), CALL, NOW)
    (tmp_path / "..data_tmp").symlink_to("second")
    os.replace(tmp_path / "..data_tmp", tmp_path / "..data")  # noqa: PTH105 - as kubelet does
    with pytest.raises(UnauthenticatedError):
        verifier.verify(signed(OPERATOR, jti="2"), CALL, NOW)
    verifier.verify(signed(NEXT_OPERATOR, jti="3"), CALL, NOW)


def test_a_key_file_that_goes_away_takes_the_trust_along(
    verifier: TokenVerifier, key_file: Path
) -> None:
    verifier.verify(signed(jti="1"), CALL, NOW)
    key_file.unlink()
    with pytest.raises(ForbiddenError, match=f"no Ed25519 public key in {key_file}"):
        verifier.verify(signed(jti="2"), CALL, NOW)


def test_keys_of_another_kind_and_broken_ones_are_ignored(
    verifier: TokenVerifier, key_file: Path
) -> None:
    rsa = generate_private_key(65537, 2048).public_key()
    key_file.write_bytes(
        b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"
        + rsa.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        + pem(OPERATOR)
    )
    verifier.verify(signed(), CALL, NOW)


def test_without_a_pod_uid_every_call_is_forbidden(key_file: Path) -> None:
    verifier = TokenVerifier(PublicKeys(str(key_file)), "")
    with pytest.raises(ForbiddenError, match="POD_UID is not set"):
        verifier.verify(signed(aud=""), CALL, NOW)


def test_spent_tokens_are_forgotten_once_expired_and_never_before(verifier: TokenVerifier) -> None:
    for number in range(50):
        verifier.verify(signed(jti=str(number), exp=NOW + 10), CALL, NOW)
    assert len(verifier._spent) == 50
    verifier.verify(signed(jti="later", exp=NOW + 40), CALL, NOW + 10)
    assert list(verifier._spent) == ["later"]


def test_a_full_memory_refuses_and_forgets_nothing(
    verifier: TokenVerifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vram_agent.serving.tokens._MAX_SPENT", 2)
    verifier.verify(signed(jti="1"), CALL, NOW)
    verifier.verify(signed(jti="2"), CALL, NOW)
    with pytest.raises(ForbiddenError, match="too many"):
        verifier.verify(signed(jti="3"), CALL, NOW)
    with pytest.raises(ForbiddenError, match="spent"):
        verifier.verify(signed(jti="1"), CALL, NOW)
