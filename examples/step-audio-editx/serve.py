"""Step-Audio-EditX behind vram-agent, with the flags of the application that it stands for.

Why it exists: one command for a workstation and for a pod. It turns the flags into an AgentConfig
and is ``vram-agent serve`` from then on; the models are those of ``step_audio_editx.py``. Run it
where upstream's code lies, or name that folder with ``--code``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import vram_agent
from model_folder import explain_missing
from vram_agent.__main__ import EXIT_INVALID
from vram_agent.__main__ import main as agent_main

HERE = Path(__file__).resolve().parent
TENSORS = {
    # The k-means table meets samples on the CPU (tokenizer.py, dump_label).
    "tts.audio_tokenizer.kms": "leave",
    # FunASR keeps its last call's cache and attention maps; the next call makes its own.
    "tts.audio_tokenizer.funasr_model.kwargs[[]'cache']*": "drop",
    "tts.audio_tokenizer.funasr_model.model.*.attn": "drop",
    # What transformers keeps of the last text where a static cache is asked for.
    "tts.llm._cache*": "drop",
    # Made anew, on the GPU, for an utterance that is longer than any before.
    "tts.cosy_model.cosy_impl.flow.*.pe": "move",
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser: upstream's flags, the library's, and where to listen."""
    parser = argparse.ArgumentParser(
        description="Step-Audio-EditX on the GPU only while it speaks or edits."
    )
    parser.add_argument(
        "--model-path",
        type=Path,
        required=True,
        metavar="DIR",
        help="the folder with Step-Audio-EditX and Step-Audio-Tokenizer",
    )
    parser.add_argument(
        "--code",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="a clone of stepfun-ai/Step-Audio-EditX (default: the current folder)",
    )
    parser.add_argument(
        "--voices",
        type=Path,
        metavar="DIR",
        help="NAME.wav and NAME.txt of each voice (default: voices in the model path)",
    )
    parser.add_argument(
        "--enable-auto-transcribe",
        action="store_true",
        help="offer Whisper too, for edits whose words nobody wrote down",
    )
    vram_agent.add_arguments(parser)
    parser.add_argument("--device", choices=("Auto", "CUDA", "CPU"), default="Auto")
    parser.add_argument("--listen-serving", default="0.0.0.0:8000", metavar="HOST:PORT")
    parser.add_argument("--listen-control", default="0.0.0.0:8001", metavar="HOST:PORT")
    return parser


def explain_fault(options: argparse.Namespace) -> str:
    """Return what is wrong with the folders; empty when they can be used."""
    if not (options.code / "tts.py").is_file():
        return (
            f"code {options.code.resolve()}: there is no tts.py; give --code the folder of a clone "
            f"of stepfun-ai/Step-Audio-EditX"
        )
    return explain_missing(options.model_path)


def make_config(options: argparse.Namespace) -> dict[str, Any]:
    """Return the AgentConfig that the flags say."""
    residency: dict[str, Any] = {"load": "Eager", "afterTask": "Keep", "idleTimeoutSeconds": 0}
    if options.enable_gpu_management:
        residency = {
            "load": "Lazy",
            "afterTask": "Offload",
            "offloadTier": "PinnedHost",
            "idleTimeoutSeconds": options.gpu_idle_timeout,
            "idleTier": "Host",
        }
    code = [str(HERE), str(options.code.resolve())]
    model_path = str(options.model_path.resolve())
    voices = {"voices": str(options.voices.resolve())} if options.voices else {}
    models = [
        {
            "name": "step-audio",
            "runtime": "Python",
            "source": "step_audio_editx:load_tts",
            "options": {
                "path": code,
                "arguments": {"model_path": model_path, **voices},
                "tensors": TENSORS,
            },
            "residency": residency,
        }
    ]
    if options.enable_auto_transcribe:
        models.append(
            {
                "name": "whisper",
                "runtime": "Python",
                "source": "step_audio_editx:load_whisper",
                "options": {"path": code, "arguments": {"model_path": model_path}},
                "residency": residency,
            }
        )
    return {
        "apiVersion": "vram.dev/v1alpha1",
        "kind": "AgentConfig",
        "device": options.device,
        "listen": {"serving": options.listen_serving, "control": options.listen_control},
        "models": models,
    }


def main() -> int:
    """Serve until a signal; return the agent's exit status, 2 for folders that cannot be used."""
    options = build_parser().parse_args()
    if fault := explain_fault(options):
        print(fault, file=sys.stderr)
        return EXIT_INVALID
    # The agent reads a file: this one needs no folder that can be written.
    config = os.memfd_create("step-audio-config")
    os.write(config, json.dumps(make_config(options)).encode())
    return agent_main(["serve", "--config", f"/proc/self/fd/{config}"])


if __name__ == "__main__":
    sys.exit(main())
