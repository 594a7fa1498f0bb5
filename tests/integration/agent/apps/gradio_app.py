"""A real Gradio application whose button leaks; its port is the argument."""

from __future__ import annotations

import sys

import gradio

kept: list[bytes] = []


def leak(mebibytes: float) -> str:
    kept.append(b"x" * (int(mebibytes) << 20))
    return f"{len(kept)} kept"


gradio.Interface(leak, gradio.Number(), gradio.Textbox(), api_name="leak").launch(
    server_name="127.0.0.1", server_port=int(sys.argv[1]), quiet=True
)
