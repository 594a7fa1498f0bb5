"""An application with a port and a drain hook; ``hang`` as second argument: a hook without end."""

from __future__ import annotations

import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BUSY = threading.Event()
HANGS = sys.argv[2:] == ["hang"]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._answer(503 if self.path == "/idle" and BUSY.is_set() else 200)

    def do_POST(self) -> None:
        if self.path == "/busy":
            BUSY.set()
        elif self.path == "/free":
            BUSY.clear()
        else:
            say("told to drain")
            if HANGS:
                threading.Event().wait()
        self._answer(202)

    def do_DELETE(self) -> None:
        say("told to go on")
        self._answer(200)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()


def end(*_: object) -> None:
    say("told to end")
    sys.exit(5)


signal.signal(signal.SIGTERM, end)
server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
server.daemon_threads = True
server.serve_forever()
