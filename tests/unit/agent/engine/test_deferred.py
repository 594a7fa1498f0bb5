"""Sessions that a wrapper makes while a model loads are ours: in the arena, with our options."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from vram_agent.devices.base import Placement
from vram_agent.devices.cpu import AnonymousMemory
from vram_agent.engine.arena import Arena
from vram_agent.engine.deferred import defer_sessions
from vram_agent.engine.weights import CombinedWeights, Offloaded
from vram_agent.errors import ModelFailedError
from vram_agent.protocol import DeviceKind

from tests import models

os.environ["ORT_DISABLE_TELEMETRY"] = "1"


def open_memory(kind: DeviceKind = DeviceKind.CPU) -> AnonymousMemory:
    return AnonymousMemory(Placement(kind=kind, index=0, uuid="D", total_bytes=1 << 40))


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena("t")
    yield made
    made.close()


# jieba, which the wrapper imports, warns of its own source and of pkg_resources.
@pytest.mark.filterwarnings("ignore")
def test_a_real_wrapper_runs_with_a_session_that_comes_and_goes(arena: Arena) -> None:
    with defer_sessions(arena) as sessions:
        # Its module takes the class at its import, which so must come within a load.
        from funasr_onnx.utils.utils import OrtInferSession  # noqa: PLC0415 - see above

        wrapper: Any = OrtInferSession(str(models.DIGITS), device_id=0)
    (weights,) = sessions
    assert arena.used_bytes >= models.DIGITS.stat().st_size
    assert wrapper.get_input_names() == ["audio"]
    assert wrapper.get_output_names() == ["probabilities", "digit"]
    assert wrapper.session.get_inputs()[0].type == "tensor(float)"
    assert wrapper.session.get_inputs()[0].shape == [None, 16_000]
    clip = models.digit_clips()[0]
    audio = models.read_samples(clip.path)[None]
    with pytest.raises(Exception, match="failed") as caught:
        wrapper([audio])
    assert "not on the device" in str(caught.value.__cause__)
    for _ in range(2):
        weights.restore(open_memory(), 1)
        assert wrapper([audio])[1].tolist() == [clip.digit]
        assert wrapper.session.get_providers() == ["CPUExecutionProvider"]
        assert wrapper.session.get_session_options().enable_cpu_mem_arena is False
        assert weights.offload() == Offloaded(held_bytes=0)


def test_a_session_of_bytes_and_one_outside_of_a_load(arena: Arena) -> None:
    import onnxruntime  # noqa: PLC0415 - after the environment is set

    with defer_sessions(arena) as sessions:
        deferred = onnxruntime.InferenceSession(models.DIGITS.read_bytes())
        assert isinstance(deferred, onnxruntime.InferenceSession)
    sessions[0].restore(open_memory(), 1)
    own = onnxruntime.InferenceSession(str(models.DIGITS), providers=["CPUExecutionProvider"])
    audio = np.zeros((2, 16_000), np.float32)
    expected = own.run(["probabilities"], {"audio": audio})
    assert len(sessions) == 1
    assert np.array_equal(deferred.run(["probabilities"], {"audio": audio}), expected)
    assert len(deferred.run(None, {"audio": audio})) == 2


def test_a_session_that_another_thread_makes_during_a_load_is_its_own(arena: Arena) -> None:
    import onnxruntime  # noqa: PLC0415 - after the environment is set

    made: list[Any] = []

    def make() -> None:
        made.append(
            onnxruntime.InferenceSession(str(models.DIGITS), providers=["CPUExecutionProvider"])
        )

    with defer_sessions(arena) as sessions:
        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
    assert sessions == []
    audio = np.zeros((1, 16_000), np.float32)
    assert made[0].run(["digit"], {"audio": audio})[0].shape == (1,)


def test_a_session_that_names_no_gpu_stays_on_the_cpu_and_others_do_not(arena: Arena) -> None:
    import onnxruntime  # noqa: PLC0415 - after the environment is set

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    with defer_sessions(arena) as sessions:
        onnxruntime.InferenceSession(
            str(models.DIGITS), options, providers=["CPUExecutionProvider"]
        )
        onnxruntime.InferenceSession(str(models.DIGITS), providers=["CUDAExecutionProvider"])
    on_host, on_device = sessions
    assert on_host._choices.optimization == "ORT_DISABLE_ALL"
    memory = open_memory(DeviceKind.CUDA)
    on_host.restore(memory, 1)
    assert on_host.session.get_providers() == ["CPUExecutionProvider"]
    # This build has no CUDA provider; it must not quietly be the CPU instead.
    with pytest.raises(ModelFailedError, match="built for the CPU only"):
        on_device.restore(memory, 1)


def test_a_file_that_is_missing_is_the_callers_own_error(arena: Arena) -> None:
    import onnxruntime  # noqa: PLC0415 - after the environment is set

    with defer_sessions(arena) as sessions, pytest.raises(FileNotFoundError):
        onnxruntime.InferenceSession("/no/such.onnx")
    assert sessions == []


def test_the_class_is_replaced_when_the_models_code_imports_it_and_no_thread_is_left() -> None:
    script = textwrap.dedent(f"""
        import sys
        from vram_agent.engine.arena import Arena
        from vram_agent.engine.deferred import defer_sessions
        from vram_agent.processes.linux import list_foreign_threads

        with defer_sessions(Arena("t")) as sessions:
            assert "onnxruntime" not in sys.modules
            from onnxruntime import InferenceSession
            made = InferenceSession({str(models.DIGITS)!r})
        print(len(sessions), made.get_outputs()[1].name, list_foreign_threads())
    """)
    environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "1 digit []"


class Part:
    """Weights that do as they are told, and write it down."""

    notes = ""
    stray_bytes = 0
    weight_bytes = 3

    def __init__(self, log: list[str], name: str, *, fails: bool = False) -> None:
        self._log, self._name, self._fails = log, name, fails

    def restore(self, memory: object, threads: int) -> int:
        if self._fails:
            raise OSError("no")
        self._log.append(f"restore {self._name}")
        return 5

    def offload(self) -> Offloaded:
        self._log.append(f"offload {self._name}")
        return Offloaded(held_bytes=1, message=self._name)

    def release(self) -> None:
        self._log.append(f"release {self._name}")


def test_combined_weights_move_together_or_not_at_all() -> None:
    log: list[str] = []
    both = CombinedWeights([Part(log, "a"), Part(log, "b")])
    assert both.weight_bytes == 6
    assert both.restore(open_memory(), 1) == 10
    assert both.offload() == Offloaded(held_bytes=2, message="a; b")
    log.clear()
    failing = CombinedWeights([Part(log, "a"), Part(log, "b"), Part(log, "c", fails=True)])
    with pytest.raises(OSError, match="no"):
        failing.restore(open_memory(), 1)
    assert log == ["restore a", "restore b", "offload b", "offload a"]
