"""Asks the apiserver the few things that bring-up waits for.

A kubectl process costs 0.15 s of CPU per question, so polling goes straight over HTTPS. Takes any
kubeconfig that this package writes; the user's own kubeconfig is checked with kubectl instead.
"""

from __future__ import annotations

import base64
import json
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 5.0


@dataclass(frozen=True)
class Api:
    """One apiserver and one identity."""

    server: str
    token: str
    context: ssl.SSLContext

    def get(self, path: str) -> Any:
        """Return the JSON at ``path``; None while it is not there or nobody answers."""
        return self._send("GET", path, None)

    def patch_json(self, path: str, operations: list[dict[str, Any]]) -> Any:
        """Send a JSON patch; None if it was not carried out."""
        return self._send("PATCH", path, json.dumps(operations).encode())

    def is_ready(self) -> bool:
        """Does ``/readyz`` say ok?"""
        return self._read("GET", "/readyz", None) == b"ok"

    def _send(self, method: str, path: str, body: bytes | None) -> Any:
        answer = self._read(method, path, body)
        return None if answer is None else json.loads(answer)

    def _read(self, method: str, path: str, body: bytes | None) -> bytes | None:
        request = urllib.request.Request(self.server + path, data=body, method=method)  # noqa: S310
        request.add_header("Authorization", f"Bearer {self.token}")
        if body is not None:
            request.add_header("Content-Type", "application/json-patch+json")
        try:
            # No proxy: the address is this machine's.
            opener = urllib.request.build_opener(
                urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=self.context)
            )
            with opener.open(request, timeout=TIMEOUT_SECONDS) as response:
                content: bytes = response.read()
                return content
        except OSError:
            # URLError and HTTPError are OSErrors: not up yet, or not there yet.
            return None


def connect(kubeconfig: Path) -> Api:
    """Make a client from a kubeconfig that `pki` wrote. Sends nothing yet."""
    config = json.loads(kubeconfig.read_text())
    entry = config["clusters"][0]["cluster"]
    authority = base64.b64decode(entry["certificate-authority-data"]).decode()
    context = ssl.create_default_context(cadata=authority)
    return Api(entry["server"], config["users"][0]["user"]["token"], context)
