"""An application that is not ours: it knows no agent, and each POST of /leak keeps 64 MiB more."""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

kept: list[bytes] = []


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        if self.path == "/leak":
            kept.append(b"x" * (64 << 20))
        self._answer()

    def do_DELETE(self) -> None:
        self._answer()

    def _answer(self) -> None:
        said = str(len(kept)).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)


ThreadingHTTPServer(("0.0.0.0", 7860), Handler).serve_forever()
