"""Makes the certificates, keys, tokens and kubeconfigs of one cluster, with the openssl command.

Everything lasts a day longer than any test run needs and is deleted with the cluster. Identities
are bearer tokens in a file that the apiserver reads; only servers have certificates, and the
apiserver has one to show to the kubelet.
"""

from __future__ import annotations

import base64
import json
import secrets
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import ClusterError

VALID_DAYS = "30"
NODE_NAME = "node1"
ADMIN = "admin"
KCM = "system:kube-controller-manager"
SCHEDULER = "system:kube-scheduler"
PROXY = "system:kube-proxy"
KUBELET = f"system:node:{NODE_NAME}"
GROUPS = {ADMIN: "system:masters", KUBELET: "system:nodes", KCM: "", SCHEDULER: "", PROXY: ""}


@dataclass(frozen=True)
class Pki:
    """The files in ``folder``; every name below is a file there."""

    folder: Path

    @property
    def ca(self) -> Path:
        """The one CA: of the servers, of the apiserver as a client and of signed requests."""
        return self.folder / "ca.crt"

    def certificate(self, name: str) -> Path:
        """The certificate called ``name``."""
        return self.folder / f"{name}.crt"

    def key(self, name: str) -> Path:
        """The private key called ``name``."""
        return self.folder / f"{name}.key"

    @property
    def tokens(self) -> Path:
        """The apiserver's token file."""
        return self.folder / "tokens.csv"

    def token(self, user: str) -> str:
        """The bearer token of ``user``."""
        for line in self.tokens.read_text().splitlines():
            token, name, _ = line.split(",", 2)
            if name == user:
                return token
        raise KeyError(user)

    def write_kubeconfig(self, path: Path, user: str, server: str) -> Path:
        """Write a kubeconfig that stands alone, readable by the owner only."""
        authority = base64.b64encode(self.ca.read_bytes()).decode()
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "local",
            "clusters": [
                {
                    "name": "local",
                    "cluster": {"server": server, "certificate-authority-data": authority},
                }
            ],
            "users": [{"name": user, "user": {"token": self.token(user)}}],
            "contexts": [
                {
                    "name": "local",
                    "context": {"cluster": "local", "user": user, "namespace": "default"},
                }
            ],
        }
        path.touch(mode=0o600)
        path.write_text(json.dumps(config, indent=2) + "\n")
        return path


def create(folder: Path, addresses: Sequence[str]) -> Pki:
    """Make everything in the empty ``folder``; servers are valid for ``addresses``. Under 0.3 s."""
    folder.mkdir(mode=0o700, parents=True)
    pki = Pki(folder)
    _openssl(
        *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
        *("-subj", "/CN=local-cluster", "-days", VALID_DAYS),
        *("-addext", "keyUsage=critical,keyCertSign,cRLSign,digitalSignature"),
        *("-keyout", str(pki.key("ca")), "-out", str(pki.ca)),
    )
    hosts = [
        *("DNS:localhost", "DNS:kubernetes", "DNS:kubernetes.default"),
        *("DNS:kubernetes.default.svc", "DNS:kubernetes.default.svc.cluster.local"),
        *(f"IP:{address}" for address in addresses),
    ]
    _sign(pki, "apiserver", "/CN=kube-apiserver", hosts)
    _sign(pki, "kubelet", f"/O=system:nodes/CN={KUBELET}", [f"DNS:{NODE_NAME}", *hosts])
    _sign(pki, "apiserver-to-kubelet", "/O=system:masters/CN=apiserver-to-kubelet", [])
    _openssl("genrsa", "-out", str(pki.key("service-accounts")), "2048")
    lines = [
        f"{secrets.token_hex(16)},{user},{user}" + (f',"{group}"' if group else "")
        for user, group in GROUPS.items()
    ]
    pki.tokens.touch(mode=0o600)
    pki.tokens.write_text("\n".join(lines) + "\n")
    return pki


def _sign(pki: Pki, name: str, subject: str, hosts: Sequence[str]) -> None:
    """Make a key and have the CA sign a certificate for it, as a server if it has hosts."""
    request = pki.folder / f"{name}.csr"
    extensions = pki.folder / f"{name}.ext"
    usage = "serverAuth" if hosts else "clientAuth"
    lines = [f"extendedKeyUsage={usage}"]
    if hosts:
        lines.append(f"subjectAltName={','.join(hosts)}")
    extensions.write_text("\n".join(lines) + "\n")
    _openssl(
        *("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
        *("-subj", subject, "-keyout", str(pki.key(name)), "-out", str(request)),
    )
    _openssl(
        *("x509", "-req", "-in", str(request), "-days", VALID_DAYS),
        *("-CA", str(pki.ca), "-CAkey", str(pki.key("ca")), "-CAcreateserial"),
        *("-extfile", str(extensions), "-out", str(pki.certificate(name))),
    )


def _openssl(*arguments: str) -> None:
    try:
        done = subprocess.run(["openssl", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ClusterError(
            "openssl is not on PATH; it makes the cluster's certificates, install it"
        ) from error
    if done.returncode != 0:
        raise ClusterError(f"openssl {arguments[0]} failed: {done.stderr.strip()}")
