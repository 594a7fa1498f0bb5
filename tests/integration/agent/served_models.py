"""Models of the Python runtime for the clients' tests; loaded by templates by ``options.path``."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from vram_agent.errors import BadInputError

RATE_HERTZ = 22_050


class Echo:
    """Gives back what it gets, of any datatype, and refuses what its parameters tell it to."""

    def infer(
        self, inputs: dict[str, np.ndarray[Any, Any]], parameters: dict[str, Any]
    ) -> dict[str, np.ndarray[Any, Any]]:
        if "refuse" in parameters:
            raise BadInputError(parameters["refuse"])
        return inputs


class Sleeper:
    """Takes as many seconds as it is told, and gives back what it gets."""

    def infer(
        self, inputs: dict[str, np.ndarray[Any, Any]], parameters: dict[str, Any]
    ) -> dict[str, np.ndarray[Any, Any]]:
        time.sleep(float(parameters["seconds"]))
        return inputs


class Speaker:
    """Speaks a tone for each character; a voice is its pitch in hertz."""

    def speech(self, text: str, parameters: dict[str, Any]) -> tuple[np.ndarray[Any, Any], int]:
        if text == "refuse":
            raise BadInputError("that cannot be said")
        seconds = len(text) / float(parameters.get("speed", 1.0))
        turns = np.arange(int(seconds * RATE_HERTZ)) / RATE_HERTZ
        hertz = float(parameters.get("voice", "440"))
        return np.sin(2 * np.pi * hertz * turns).astype(np.float32) / 2, RATE_HERTZ


class Teller:
    """Says two words and a tone's two halves; goes on with the second when it may."""

    def __init__(self, fifo: str) -> None:
        self._fifo = Path(fifo)

    def transcribe(self, audio: Any, parameters: dict[str, Any]) -> Iterator[str]:
        yield "light "
        self._fifo.read_bytes()
        yield "five"

    async def speech(self, text: str, parameters: dict[str, Any]) -> AsyncIterator[Any]:
        yield np.zeros(24_000, np.float32), 24_000
        self._fifo.read_bytes()
        yield np.zeros(12_000, np.float32), 24_000


def make_teller(fifo: str) -> Teller:
    return Teller(fifo)


class Recogniser:
    """Finds the digit by a session that it made while it was loaded."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def infer(
        self, inputs: dict[str, np.ndarray[Any, Any]], parameters: dict[str, Any]
    ) -> dict[str, np.ndarray[Any, Any]]:
        (digit, _) = self._session.run(None, inputs)
        return {"digit": digit}


def make_recogniser(onnx: str, fifo: str) -> Recogniser:
    """Reads its file, says so, and goes on when it is told to."""
    import onnxruntime  # noqa: PLC0415 - takes a second

    session = onnxruntime.InferenceSession(onnx)
    Path(fifo).write_bytes(b"read")
    Path(fifo).read_bytes()
    return Recogniser(session)


def make_speaker() -> Speaker:
    return Speaker()


def make_sleeper() -> Sleeper:
    return Sleeper()


def make_echo() -> Echo:
    return Echo()
