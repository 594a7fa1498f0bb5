"""Edit a recording, as upstream's page does: what it says is asked of Whisper unless it is given.

    python edit.py angry.wav -o calm.wav --edit-type emotion --edit-info remove

Why it exists: the Open Inference Protocol carries files as binary tensors, which curl cannot write.
Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.error
import urllib.request
import uuid
from pathlib import Path

_LENGTH = "Inference-Header-Content-Length"


class RefusedError(Exception):
    """The agent's own words."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(description="Edit a recording with Step-Audio-EditX.")
    parser.add_argument("recording", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="WAV")
    parser.add_argument("--edit-type", required=True)
    parser.add_argument("--edit-info")
    parser.add_argument("--audio-text", help="what the recording says")
    parser.add_argument("--text", help="paralinguistic: the new words with their tags")
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--api-key", default="")
    return parser


class Agent:
    """The two calls."""

    def __init__(self, url: str, api_key: str) -> None:
        self._url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def transcribe(self, recording: bytes) -> str:
        """Return what a recording says."""
        mark = uuid.uuid4().hex
        fields = {"model": "whisper", "response_format": "text"}
        body = "".join(
            f'--{mark}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
            for name, value in fields.items()
        )
        head = 'Content-Disposition: form-data; name="file"; filename="recording"'
        whole = (
            f"{body}--{mark}\r\n{head}\r\n\r\n".encode() + recording + f"\r\n--{mark}--".encode()
        )
        kind = {"Content-Type": f"multipart/form-data; boundary={mark}"}
        return self._post("/v1/audio/transcriptions", whole, kind)[0].decode().strip()

    def edit(self, recording: bytes, parameters: dict[str, str]) -> bytes:
        """Return the edited recording, a WAV file."""
        tensor = len(recording).to_bytes(4, "little") + recording
        described = {
            "name": "audio",
            "datatype": "BYTES",
            "shape": [1],
            "parameters": {"binary_data_size": len(tensor)},
        }
        question = {
            "parameters": {**parameters, "binary_data_output": True},
            "inputs": [described],
        }
        head = json.dumps(question).encode()
        kind = {"Content-Type": "application/octet-stream", _LENGTH: str(len(head))}
        answer, headers = self._post("/v2/models/step-audio/infer", head + tensor, kind)
        # One tensor of one element, with its length in four bytes before it.
        return answer[int(headers[_LENGTH]) + 4 :]

    def _post(
        self, path: str, body: bytes, headers: dict[str, str]
    ) -> tuple[bytes, dict[str, str]]:
        request = urllib.request.Request(  # noqa: S310 - the user's own URL
            self._url + path, body, {**self._headers, **headers}
        )
        try:
            with urllib.request.urlopen(request) as answer:  # noqa: S310
                return answer.read(), dict(answer.headers)
        except urllib.error.HTTPError as error:
            with error:
                words = error.read().decode(errors="replace")
            raise RefusedError(f"{path}: {error.code} {words}") from None


def main() -> int:
    """Edit; 1 with the agent's words where it refuses."""
    options = build_parser().parse_args()
    agent = Agent(options.url, options.api_key)
    recording = options.recording.read_bytes()
    names = ("edit_type", "edit_info", "audio_text", "text")
    parameters = {name: value for name in names if (value := getattr(options, name)) is not None}
    try:
        if "audio_text" not in parameters and options.edit_type not in {"denoise", "vad"}:
            parameters["audio_text"] = agent.transcribe(recording)
            print(f"it says: {parameters['audio_text']}", file=sys.stderr)
        options.output.write_bytes(agent.edit(recording, parameters))
    except RefusedError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
