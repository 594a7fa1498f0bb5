"""Models for the Python runtime under test. Loaded by templates through ``options.path``.

Imports torch only in the factories that need it, so that tests of processes alone start quickly.
"""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path
from typing import Any

import numpy as np
from vram_agent.errors import BadInputError


class Doubler:
    """No weights: gives back twice what it gets, and does as its parameters say."""

    inputs = (("x", "FP32", (-1,)),)
    outputs = (("y", "FP32", (-1,)),)

    def infer(
        self, inputs: dict[str, np.ndarray[Any, Any]], parameters: dict[str, Any]
    ) -> dict[str, np.ndarray[Any, Any]]:
        if "block" in parameters:
            # The reader knows that the task runs once this open returns to it; it never answers.
            Path(parameters["block"]).write_bytes(b"running")
            threading.Event().wait()
        if "raise" in parameters:
            raise ValueError(parameters["raise"])
        if "refuse" in parameters:
            raise BadInputError(parameters["refuse"], param="x")
        if "spawn" in parameters:
            process = subprocess.Popen(parameters["spawn"])
            return {"pid": np.array([process.pid], np.int64)}
        if "exit" in parameters:
            os._exit(parameters["exit"])
        return {"y": inputs["x"] * 2}


def make_doubler() -> Doubler:
    return Doubler()


def make_blocked(fifo: str) -> Doubler:
    Path(fifo).write_bytes(b"loading")
    threading.Event().wait()
    return Doubler()


def make_threaded() -> Doubler:
    threading.Thread(target=threading.Event().wait, name="foreign", daemon=True).start()
    return Doubler()


class Streaming:
    """Transcribes word by word: waits for each one's leave, or counts what it has made."""

    def transcribe(self, audio: Any, parameters: dict[str, Any]) -> Any:
        made = Path(parameters["made"])
        try:
            for number in range(parameters["words"]):
                yield f"{number} "
                made.write_text(str(number + 1))
                if "leave" in parameters:
                    Path(parameters["leave"]).read_bytes()
                if number + 1 == parameters.get("exit_after"):
                    os._exit(3)
        finally:
            Path(parameters["closed"]).write_bytes(b"closed")

    def speech(self, text: str, parameters: dict[str, Any]) -> Any:
        made = Path(parameters["made"])
        for number in range(parameters["chunks"]):
            yield np.full(parameters["samples"], number, np.float32), 24_000
            made.write_text(str(number + 1))


def make_streaming() -> Streaming:
    return Streaming()


class Linear:
    """y = x @ weight, with weights in places where a state_dict would not look."""

    def __init__(self, rows: int, columns: int) -> None:
        import torch  # noqa: PLC0415 - takes seconds

        self.torch = torch
        values = torch.arange(rows * columns, dtype=torch.float32).remainder_(7)
        self.layers = [{"weight": values.reshape(rows, columns)}]
        self.tied = self.layers[0]["weight"]
        self.leaked: list[Any] = []

    def infer(
        self, inputs: dict[str, np.ndarray[Any, Any]], parameters: dict[str, Any]
    ) -> dict[str, np.ndarray[Any, Any]]:
        torch = self.torch
        weight = self.layers[0]["weight"]
        if "leak_mib" in parameters:
            shape = (parameters["leak_mib"], 1 << 18)
            self.leaked.append(torch.ones(shape, device=weight.device))
        if "allocate_gib" in parameters:
            torch.empty(parameters["allocate_gib"] << 30, dtype=torch.uint8, device=weight.device)
        if "add" in parameters:
            weight.add_(parameters["add"])
        x = torch.from_numpy(inputs["x"]).to(weight.device)
        assert self.tied.data_ptr() == weight.data_ptr()
        return {"y": (x @ weight).cpu().numpy()}


def make_linear(rows: int, columns: int) -> Linear:
    return Linear(rows, columns)
