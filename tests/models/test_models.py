"""The committed models are the ones the manifest describes, and answer exactly as promised."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import whisper

from tests.models import (
    CLIPS,
    DIGITS,
    FUNASR,
    MANIFEST,
    WHISPER,
    Clip,
    DigitClip,
    clips,
    digit_clips,
    make_funasr,
    make_onnx,
    make_whisper,
    read_samples,
    speech,
)
from tests.models.measure import list_files
from tests.models.shapes import (
    WhisperShape,
    make_onnx_matmul,
    make_whisper_shape,
    whisper_shape_near,
)

# whisper leaves the file of its tokenizer open for the garbage collector to close:
# https://github.com/openai/whisper/blob/v20250625/whisper/tokenizer.py#L335
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in.*multilingual.tiktoken:pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(scope="module")
def model() -> Any:
    return whisper.load_model(str(WHISPER), device="cpu")


@pytest.fixture(scope="module")
def words() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make_funasr.open_model(FUNASR, threads=2)


@pytest.fixture(scope="module")
def session() -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(DIGITS, providers=["CPUExecutionProvider"])


def name_of(clip: Clip | DigitClip) -> str:
    return clip.path.stem


@pytest.mark.parametrize("path", [WHISPER, DIGITS, FUNASR], ids=lambda path: path.name)
def test_the_committed_file_is_the_one_in_the_manifest(path: Path) -> None:
    entry = json.loads(MANIFEST.read_text())[path.name]
    content = b"".join(one.read_bytes() for one in list_files(path))
    assert hashlib.sha256(content).hexdigest() == entry["sha256"]
    assert len(content) == entry["bytes"]


@pytest.mark.parametrize(
    ("path", "script"), [(WHISPER, make_whisper), (DIGITS, make_onnx), (FUNASR, make_funasr)]
)
def test_the_manifest_names_the_script_and_its_default_recipe(path: Path, script: Any) -> None:
    entry = json.loads(MANIFEST.read_text())[path.name]
    assert script.__name__ == f"tests.models.{entry['script']}"
    recipe = dataclasses.asdict(script.Recipe())
    assert {name: entry[name] for name in recipe} == recipe


@pytest.mark.parametrize("clip", clips(), ids=name_of)
def test_stock_whisper_hears_every_word_of_the_clip(model: Any, clip: Clip) -> None:
    result = model.transcribe(read_samples(clip.path), language="en", fp16=False)
    assert result["text"].strip() == clip.text


# What FunASR imports warns of its own sources.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("clip", clips(), ids=name_of)
def test_stock_funasr_hears_every_word_of_the_clip(words: Any, clip: Clip) -> None:
    assert words.generate(input=read_samples(clip.path))[0]["text"] == clip.text


@pytest.mark.parametrize("clip", digit_clips(), ids=name_of)
def test_the_classifier_finds_the_digit_of_the_clip(
    session: onnxruntime.InferenceSession, clip: DigitClip
) -> None:
    probabilities, digit = session.run(
        ["probabilities", "digit"], {"audio": read_samples(clip.path)[None]}
    )
    assert digit.tolist() == [clip.digit]
    assert probabilities.shape == (1, 10)
    assert probabilities[0, clip.digit] > 0.5
    assert probabilities.sum() == pytest.approx(1, abs=1e-5)


def test_the_classifier_takes_a_batch(session: onnxruntime.InferenceSession) -> None:
    batch = np.stack([read_samples(clip.path) for clip in digit_clips()])
    (digits,) = session.run(["digit"], {"audio": batch})
    assert digits.dtype == np.int64
    assert digits.tolist() == [clip.digit for clip in digit_clips()]


def test_every_committed_clip_has_an_expected_answer() -> None:
    expected = {clip.path for clip in clips()} | {clip.path for clip in digit_clips()}
    assert set(CLIPS.glob("*.wav")) == expected


def test_a_digit_clip_is_exactly_one_second() -> None:
    assert {len(read_samples(clip.path)) for clip in digit_clips()} == {16_000}


def test_a_wav_of_another_form_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "other.wav"
    wav = bytearray(clips()[0].path.read_bytes())
    wav[24:28] = (8_000).to_bytes(4, "little")
    path.write_bytes(wav)
    with pytest.raises(ValueError, match=r"8000.*ffmpeg"):
        read_samples(path)


def test_a_missing_synthesiser_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(speech.EspeakMissingError, match="apt-get install espeak-ng"):
        speech.synthesise("one", speech.Voice("en-us+m4"))


def test_asking_for_the_models_imports_neither_torch_nor_numpy() -> None:
    code = "import sys, tests.models as m; m.clips(); print({'torch', 'numpy'} & set(sys.modules))"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    "shape",
    [WhisperShape(64, 1), WhisperShape(128, 2, torch.float32)],
    ids=["half precision", "single precision"],
)
def test_a_whisper_shape_loads_and_has_the_bytes_it_promises(
    tmp_path: Path, shape: WhisperShape
) -> None:
    path = tmp_path / "shape.pt"
    make_whisper_shape(path, shape)
    loaded = whisper.load_model(str(path), device="cpu")
    assert shape.file_bytes <= path.stat().st_size < shape.file_bytes + 64 * 1024
    state = loaded.state_dict().values()
    assert sum(tensor.nbytes for tensor in state) == shape.loaded_bytes
    with torch.inference_mode():
        assert loaded.encoder(torch.zeros(1, 80, 3000)).isfinite().all()


def test_the_same_seed_gives_the_same_whisper_shape(tmp_path: Path) -> None:
    states = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        make_whisper_shape(tmp_path / name, WhisperShape(64, 1), seed)
        state = torch.load(tmp_path / name, weights_only=True)["model_state_dict"]
        states.append(state["decoder.token_embedding.weight"])
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


@pytest.mark.parametrize("megabytes", [20, 75, 500, 1500, 3000])
def test_the_nearest_whisper_shape_is_within_a_tenth_of_the_bytes_asked_for(
    megabytes: int,
) -> None:
    shape = whisper_shape_near(megabytes * 1_000_000)
    assert shape.file_bytes == pytest.approx(megabytes * 1_000_000, rel=0.1)


def test_the_shape_of_whisper_tiny_has_its_published_number_of_parameters() -> None:
    # 37,184,640 parameters, and the sinusoids of the encoder that Whisper keeps as a buffer.
    assert WhisperShape().parameters == 37_184_640 + 1500 * 384


def test_a_matmul_gives_back_the_row_of_its_seeded_weight(tmp_path: Path) -> None:
    path = tmp_path / "matmul.onnx"
    make_onnx_matmul(path, megabytes=3, seed=5)
    assert 3 * 1024 * 1024 <= path.stat().st_size < 3 * 1024 * 1024 + 1024
    one_hot = np.zeros((1, 1024), np.float32)
    one_hot[0, 17] = 1
    loaded = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (output,) = loaded.run(["output"], {"input": one_hot})
    weight = np.random.default_rng(5).standard_normal((1024, 768), np.float32)
    np.testing.assert_array_equal(output[0], weight[17])


@pytest.mark.parametrize("megabytes", [0, 2001])
def test_a_matmul_that_no_onnx_file_can_hold_is_refused(tmp_path: Path, megabytes: int) -> None:
    path = tmp_path / "matmul.onnx"
    with pytest.raises(ValueError, match=str(megabytes)):
        make_onnx_matmul(path, megabytes)
    assert not path.exists()
