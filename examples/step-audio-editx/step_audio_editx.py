"""Step-Audio-EditX as models of the runtime Python: factories around upstream's own classes.

Why it exists: upstream loads everything at its start and keeps it on the GPU. These factories make
the same objects in a template, on the CPU; the agent finds their tensors and ONNX sessions, and
moves them. Called by vram-agent, with upstream's folder on ``sys.path``.

What upstream does that a factory must know (stepfun-ai/Step-Audio-EditX@aacb90a):

- FunASR and CosyVoice take a GPU where they see one; the LLM and Whisper where they are told.
- A Whisper pipeline sends its inputs to the device that it was made on.
- ``WhisperWrapper.__call__`` turns every error into the text ``""``.
- 2.2 GB of buffers are for streaming, which ``clone`` and ``edit`` never do.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from model_folder import EDITX, FUNASR, TOKENIZER, VOICES, explain_missing, find_whisper
from vram_agent.errors import BadInputError

_STREAMING_BUFFERS = ("att_cache_buffer", "cnn_cache_buffer")
_NEEDS_WORDS = {"emotion", "style", "speed", "paralinguistic"}
_EDIT_PARAMETERS = ("edit_type", "edit_info", "audio_text", "text")
_WHISPER_WINDOW_SAMPLES = 30 * 16_000


def load_tts(model_path: str, voices: str = "") -> StepAudio:
    """Make ``StepAudioTTS`` and its tokenizer. Raises FileNotFoundError for what is missing."""
    folder = Path(model_path)
    if words := explain_missing(folder):
        raise FileNotFoundError(words)
    from config.edit_config import get_supported_edit_types  # noqa: PLC0415 - upstream's code
    from model_loader import ModelSource  # noqa: PLC0415
    from tokenizer import StepAudioTokenizer  # noqa: PLC0415
    from tts import StepAudioTTS  # noqa: PLC0415

    with _without_gpu():
        encoder = StepAudioTokenizer(
            str(folder / TOKENIZER), model_source=ModelSource.LOCAL, funasr_model_id=FUNASR
        )
        tts = StepAudioTTS(
            str(folder / EDITX), encoder, model_source=ModelSource.LOCAL, device_map="cpu"
        )
    _free_streaming_buffers(tts.cosy_model.cosy_impl)
    return StepAudio(tts, Path(voices) if voices else folder / VOICES, get_supported_edit_types())


def load_whisper(model_path: str) -> Transcriber:
    """Make ``WhisperWrapper``: of ``whisper-large-v3`` in the folder, else from the hub."""
    from whisper_wrapper import WhisperWrapper  # noqa: PLC0415 - upstream's code

    with _without_gpu():
        return Transcriber(WhisperWrapper(find_whisper(Path(model_path))))


class StepAudio:
    """Speech in a voice of the folder, and edits of recordings."""

    inputs = (("audio", "BYTES", (1,)),)
    outputs = (("audio", "BYTES", (1,)),)

    def __init__(self, tts: Any, voices: Path, edit_types: Mapping[str, list[str]]) -> None:
        self.tts = tts
        self._voices = voices
        self._edit_types = {name: info for name, info in edit_types.items() if name != "clone"}

    def speech(self, text: str, parameters: dict[str, Any]) -> tuple[Any, int]:
        """Return the text in the voice, and the rate. Raises BadInputError."""
        wanted = parameters.pop("voice", "")
        if parameters.pop("speed", 1) != 1 or parameters:
            raise BadInputError(
                "instructions and speed are not taken here: speak first, then edit what was "
                "spoken (edit_type style or speed)"
            )
        recording, words = self._find_voice(wanted)
        audio, rate = self.tts.clone(str(recording), words, text)
        return audio.squeeze(0).clamp(-1, 1).numpy(), rate

    def infer(self, inputs: dict[str, Any], parameters: dict[str, Any]) -> dict[str, Any]:
        """Edit the sound file ``audio``; return a WAV file. Raises BadInputError."""
        edit = _read_edit(parameters, self._edit_types)
        if "audio" not in inputs or inputs["audio"].size != 1:
            raise BadInputError("give one sound file: audio, BYTES of shape [1]", param="audio")
        with _sound_file(bytes(inputs["audio"].item())) as path:
            audio, rate = self.tts.edit(path, **edit)
        with io.BytesIO() as file:
            samples = audio.squeeze(0).clamp(-1, 1).numpy()
            soundfile.write(file, samples, rate, format="WAV", subtype="PCM_16")
            # An array of dtype S would lose the zeros that a file ends with.
            return {"audio": np.array([file.getvalue()], dtype=object)}

    def _find_voice(self, wanted: str) -> tuple[Path, str]:
        known = {path.stem: path for path in sorted(self._voices.glob("*.wav"))}
        if not known:
            raise BadInputError(
                f"there is no voice: put NAME.wav, and what it says in NAME.txt, into "
                f"{self._voices}",
                param="voice",
            )
        name = wanted or next(iter(known))
        if name not in known:
            raise BadInputError(
                f"voice {name[:64]!r} is not there; there are {', '.join(known)}", param="voice"
            )
        words = known[name].with_suffix(".txt")
        if not words.is_file():
            raise BadInputError(
                f"voice {name}: write what {name}.wav says into {words}", param="voice"
            )
        return known[name], words.read_text(encoding="utf-8").strip()


class Transcriber:
    """Recordings to text, for edits whose author does not know the words."""

    def __init__(self, wrapper: Any) -> None:
        self.wrapper = wrapper

    def transcribe(self, audio: Any, parameters: dict[str, Any]) -> str:
        """Return what is said. Raises BadInputError, and whatever the pipeline raises."""
        language = parameters.pop("language", None)
        if parameters:
            raise BadInputError(f"{min(parameters)} is not taken here; language is")
        pipeline = self.wrapper.model
        pipeline.device = next(pipeline.model.parameters()).device
        answer = pipeline(
            audio.copy(),
            return_timestamps=len(audio) > _WHISPER_WINDOW_SAMPLES,
            **({"generate_kwargs": {"language": language}} if language else {}),
        )
        return str(answer["text"]).strip()


def _read_edit(
    parameters: Mapping[str, Any], edit_types: Mapping[str, list[str]]
) -> dict[str, str | None]:
    """Return the arguments of ``StepAudioTTS.edit``. Raises BadInputError."""
    for name, value in parameters.items():
        if name not in _EDIT_PARAMETERS or not isinstance(value, str):
            raise BadInputError(
                f"parameter {name[:64]!r}: give texts named {', '.join(_EDIT_PARAMETERS)}",
                param=name,
            )
    edit_type = parameters.get("edit_type", "")
    if edit_type not in edit_types:
        raise BadInputError(
            f"edit_type {edit_type[:64]!r} is none of {', '.join(edit_types)}", param="edit_type"
        )
    edit_info = parameters.get("edit_info")
    if edit_types[edit_type] and edit_info not in edit_types[edit_type]:
        raise BadInputError(
            f"edit_info of {edit_type} is one of {', '.join(edit_types[edit_type])}",
            param="edit_info",
        )
    words = parameters.get("audio_text", "")
    if edit_type in _NEEDS_WORDS and not words.strip():
        raise BadInputError(
            f"{edit_type} needs audio_text, what the recording says; POST "
            f"/v1/audio/transcriptions tells it, where the agent serves whisper",
            param="audio_text",
        )
    text = parameters.get("text")
    if edit_type == "paralinguistic" and not text:
        raise BadInputError(
            "paralinguistic needs text, the new words with their tags", param="text"
        )
    return {"audio_text": words, "edit_type": edit_type, "edit_info": edit_info, "text": text}


@contextmanager
def _sound_file(data: bytes) -> Iterator[str]:
    """Yield the path of a file with these bytes. Raises BadInputError where they are no sound."""
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        file.write(data)
        file.flush()
        try:
            soundfile.info(file.name)
        except soundfile.LibsndfileError as error:
            raise BadInputError(
                f"audio is no sound file that libsndfile reads, such as WAV or FLAC: {error}",
                param="audio",
            ) from error
        yield file.name


@contextmanager
def _without_gpu() -> Iterator[None]:
    """Have upstream's constructors see no GPU: a template that touched one could not be forked.

    torch asks NVML there, which reads this variable each time; the GPU process sets its own.
    """
    name = "CUDA_VISIBLE_DEVICES"
    before = os.environ.get(name)
    os.environ[name] = ""
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _free_streaming_buffers(cosy_impl: Any) -> None:
    """Let go of what only ``token2wav_stream`` uses. ``rand_noise`` is no scratch: it stays."""
    for module in cosy_impl.modules():
        for name in _STREAMING_BUFFERS:
            buffer = getattr(module, name, None)
            if buffer is not None:
                setattr(module, name, buffer.new_empty(0))
