"""Measure the committed models on voices they never heard, and write the manifest.

    python -m tests.models.measure

Exists so that a claim about accuracy has a command. Run by hand after `make_whisper`, `make_funasr`
and `make_onnx` with their default recipes, on the machine that ran them: the recipes and library
versions that `data/MANIFEST.json` records are the ones in force here. Needs espeak-ng, and minutes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import platform
import re
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnxruntime
import torch
import whisper

from . import DIGITS as DIGITS_MODEL
from . import FUNASR, MANIFEST, WHISPER, make_funasr, make_onnx, make_whisper
from .speech import (
    DIGITS,
    HELD_OUT_ACCENTS_POOL,
    HELD_OUT_POOL,
    SAMPLE_RATE_HZ,
    Samples,
    Utterance,
    VoicePool,
    build_corpus,
    draw_voice,
    dress,
    synthesise_all,
    synthesiser_version,
)

log = logging.getLogger(__name__)

PHRASES = 150
SECONDS = 400
STEADY_POOL = VoicePool(("m4", "f3", "Mike", "Alex"), odd=True)
"""The voices of the committed clips."""
TRAINING_LIBRARIES = ("torch", "numpy", "scipy")


def count_edits(wanted: Sequence[str], got: Sequence[str]) -> int:
    """The fewest words to insert, drop or replace that turn `wanted` into `got`."""
    row = list(range(len(got) + 1))
    for i, want in enumerate(wanted, 1):
        diagonal, row[0] = row[0], i
        for j, have in enumerate(got, 1):
            best = min(row[j] + 1, row[j - 1] + 1, diagonal + (want != have))
            diagonal, row[j] = row[j], best
    return row[-1]


def measure_phrases(transcribe: Callable[[Samples], str]) -> dict[str, Any]:
    """Words right, for each kind of held-out phrase."""
    rng = Random(5)
    clean = build_corpus(PHRASES, seed=99, pool=HELD_OUT_POOL)
    noisy = [
        dataclasses.replace(item, samples=dress(item.samples, rng).samples) for item in clean[:100]
    ]
    accents = build_corpus(PHRASES // 2, seed=98, pool=HELD_OUT_ACCENTS_POOL)
    steady = build_corpus(PHRASES // 2, seed=96, pool=STEADY_POOL, most_words=4)
    short = [item for item in clean if len(item.words) <= 4]
    return {
        "held-out voices, clean": score_phrases(transcribe, [_pad(item) for item in clean]),
        "held-out voices, clean, up to 4 words": score_phrases(
            transcribe, [_pad(i) for i in short]
        ),
        "held-out voices, noise and gain": score_phrases(transcribe, noisy),
        "held-out voices and accents, clean": score_phrases(transcribe, [_pad(i) for i in accents]),
        "m4, f3, Mike, Alex, clean, up to 4 words": score_phrases(
            transcribe, [_pad(i) for i in steady]
        ),
    }


def _pad(item: Utterance) -> Utterance:
    return dataclasses.replace(item, samples=np.pad(item.samples, SAMPLE_RATE_HZ // 5))


def score_phrases(
    transcribe: Callable[[Samples], str], items: Sequence[Utterance]
) -> dict[str, Any]:
    """Transcribe each item the stock way and count what is wrong."""
    edits = 0
    exact = 0
    for item in items:
        text = transcribe(item.samples)
        wrong = count_edits(item.words, re.sub(r"[^a-z ]", " ", text.lower()).split())
        if wrong:
            log.info("  %s: %r heard as %r", item.voice, item.text, text)
        edits += wrong
        exact += not wrong
    words = sum(len(item.words) for item in items)
    return {
        "word_accuracy": round(1 - edits / words, 4),
        "words": words,
        "exact_clips": exact,
        "clips": len(items),
    }


def fill_second(samples: Samples, _: Random) -> Samples:
    """The word after at most a tenth of a second of silence, without noise."""
    cut = samples[:SAMPLE_RATE_HZ]
    lead = min(SAMPLE_RATE_HZ // 10, SAMPLE_RATE_HZ - len(cut))
    return np.pad(cut, (lead, SAMPLE_RATE_HZ - lead - len(cut)))


def measure_digits(session: Any) -> dict[str, Any]:
    """Digits right, for each kind of held-out second."""
    return {
        "held-out voices, clean": score_digits(session, HELD_OUT_POOL, fill_second),
        "held-out voices, noise and gain": score_digits(
            session, HELD_OUT_POOL, make_onnx.fit_second
        ),
        "held-out voices and accents, clean": score_digits(
            session, HELD_OUT_ACCENTS_POOL, fill_second
        ),
    }


def score_digits(
    session: Any, pool: VoicePool, place: Callable[[Samples, Random], Samples]
) -> dict[str, Any]:
    """Classify `SECONDS` clips in voices of `pool`, each put into its second by `place`."""
    rng = Random(7)
    drawn = [(rng.randrange(10), draw_voice(rng, pool)) for _ in range(SECONDS)]
    spoken = synthesise_all([(DIGITS[digit], voice) for digit, voice in drawn])
    audio = np.stack([place(samples, rng) for samples in spoken])
    (found,) = session.run(["digit"], {"audio": audio})
    right = sum(int(got) == digit for got, (digit, _) in zip(found, drawn, strict=True))
    return {"accuracy": round(right / SECONDS, 4), "right": right, "clips": SECONDS}


def describe_file(
    path: Path,
    script: str,
    recipe: make_whisper.Recipe | make_onnx.Recipe | make_funasr.Recipe,
    libraries: tuple[str, ...],
) -> dict[str, Any]:
    """What the file is and what made it."""
    arguments = [f"--{name}={value}" for name, value in dataclasses.asdict(recipe).items()]
    versions = {name: version(name) for name in (*TRAINING_LIBRARIES, *libraries)}
    return {
        "script": script,
        "command": f"python -m tests.models.{script} {path.name} {' '.join(arguments)}",
        **dataclasses.asdict(recipe),
        "versions": {
            "python": platform.python_version(),
            "espeak-ng": synthesiser_version(),
            **versions,
        },
        "sha256": digest(path),
        "bytes": sum(one.stat().st_size for one in list_files(path)),
    }


def list_files(path: Path) -> list[Path]:
    """The file, or the files of a folder, by name."""
    return sorted(path.iterdir()) if path.is_dir() else [path]


def digest(path: Path) -> str:
    """SHA-256 of a file, or of a folder's files one after the other, by name."""
    whole = hashlib.sha256()
    for one in list_files(path):
        whole.update(one.read_bytes())
    return whole.hexdigest()


def main() -> None:
    """Measure the models and write the manifest."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(2)
    speech = describe_file(
        WHISPER, "make_whisper", make_whisper.Recipe(), libraries=("openai-whisper",)
    )
    digits = describe_file(DIGITS_MODEL, "make_onnx", make_onnx.Recipe(), libraries=("onnx",))
    session = onnxruntime.InferenceSession(DIGITS_MODEL, providers=["CPUExecutionProvider"])
    digits["held_out"] = measure_digits(session)
    stock = whisper.load_model(str(WHISPER), device="cpu")
    speech["held_out"] = measure_phrases(
        lambda samples: stock.transcribe(samples, language="en", fp16=False)["text"]
    )
    words = describe_file(FUNASR, "make_funasr", make_funasr.Recipe(), libraries=("funasr",))
    auto = make_funasr.open_model(FUNASR, threads=2)
    words["held_out"] = measure_phrases(lambda samples: auto.generate(input=samples)[0]["text"])
    manifest = {WHISPER.name: speech, DIGITS_MODEL.name: digits, FUNASR.name: words}
    MANIFEST.write_text(json.dumps(manifest, indent=2) + "\n")
    log.info("%s", json.dumps(manifest, indent=2))


if __name__ == "__main__":
    main()
