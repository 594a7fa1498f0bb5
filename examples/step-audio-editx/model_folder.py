"""What lies in the folder of ``--model-path``, as upstream's README has it downloaded.

Why it exists: upstream answers a missing folder by asking a hub, and its error is then about the
network. Read by serve.py at its start and by the factory; it imports nothing that takes long.
"""

from __future__ import annotations

from pathlib import Path

EDITX = "Step-Audio-EditX"
TOKENIZER = "Step-Audio-Tokenizer"
FUNASR = "dengcunqin/speech_paraformer-large_asr_nat-zh-cantonese-en-16k-vocab8501-online"
VOICES = "voices"
WHISPER = "whisper-large-v3"
_REQUIRED = (
    EDITX,
    f"{EDITX}/CosyVoice-300M-25Hz",
    TOKENIZER,
    f"{TOKENIZER}/speech_tokenizer_v1.onnx",
    f"{TOKENIZER}/linguistic_tokenizer.npy",
    f"{TOKENIZER}/{FUNASR}",
)


def explain_missing(folder: Path) -> str:
    """Return what is missing first, and what to do; empty when all is there."""
    for name in ("", *_REQUIRED):
        if not (folder / name).exists():
            return (
                f"model path {folder}: {name or 'the folder'} is missing; it needs {EDITX} and "
                f"{TOKENIZER}, as stepfun-ai publishes them"
            )
    return ""


def find_whisper(folder: Path) -> str:
    """Return the Whisper beside the other models, else its name on the hub."""
    local = folder / WHISPER
    return str(local) if local.exists() else f"openai/{WHISPER}"
