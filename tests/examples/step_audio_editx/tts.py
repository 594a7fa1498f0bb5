"""Stands for upstream's tts.py and stepvocoder: an LLM, a flow, a vocoder, and what they keep."""

from __future__ import annotations

import os
import threading
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from utils import cuda, frames_of, load_sound, note, wait_at_gate  # type: ignore[import-not-found]

WIDTH = 64
VOCABULARY = 512
STEPS = 10
HOP = 240
PREPARED_FRAMES = 64


class LLM(nn.Module):
    """Generates with a cache of keys that it keeps, greedily: the same words, the same sounds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.lm_head.weight = self.embed_tokens.weight
        self._cache: list[torch.Tensor] = []

    @torch.no_grad()
    def generate(self, ids: torch.Tensor) -> torch.Tensor:
        note(f"generate, GPUs {os.environ['CUDA_VISIBLE_DEVICES']!r}")
        wait_at_gate()
        self._cache = [self.embed_tokens(ids).mean(dim=1)]
        for _ in range(STEPS):
            state = self.embed_tokens(ids[:, -1]) + torch.stack(self._cache).mean(dim=0)
            self._cache.append(torch.tanh(self.mix(state)))
            logits = self.lm_head(self._cache[-1] * len(self._cache))
            ids = torch.cat([ids, logits.argmax(dim=-1, keepdim=True)], dim=1)
        return ids


class PositionalEncoding(nn.Module):
    """Its table is a plain attribute, made again in inference mode when it is too short."""

    def __init__(self) -> None:
        super().__init__()
        self.pe = torch.zeros(1, 0, WIDTH)
        self.extend_pe(torch.zeros(1, PREPARED_FRAMES))

    def extend_pe(self, x: torch.Tensor) -> None:
        if self.pe.size(1) >= x.size(1):
            if self.pe.device != x.device:
                note("pe moved")
                self.pe = self.pe.to(x.device)
            return
        note(f"pe made for {x.size(1)}")
        angle = torch.arange(x.size(1))[:, None] / 10 ** torch.linspace(0, 4, WIDTH)
        self.pe = torch.sin(angle)[None].to(x.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.extend_pe(x)
        return x + self.pe[:, : x.size(1)]


class CausalConditionalCFM(nn.Module):
    """``rand_noise`` no checkpoint brings back; the caches are for streams alone."""

    def __init__(self) -> None:
        super().__init__()
        self.estimator = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("rand_noise", torch.randn(1, 4096, WIDTH), persistent=False)
        self.register_buffer("cnn_cache_buffer", torch.zeros(1 << 20), persistent=False)
        self.register_buffer("att_cache_buffer", torch.zeros(16 << 20), persistent=False)

    def forward(self, mu: torch.Tensor) -> torch.Tensor:
        noise: Any = self.rand_noise
        return torch.tanh(self.estimator(mu) + noise[:, : mu.size(1)])


class CausalMaskedDiffWithXvec(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.pos_enc = PositionalEncoding()
        self.decoder = CausalConditionalCFM()

    @torch.inference_mode()
    def inference(
        self, token: torch.Tensor, feat: torch.Tensor, embedding: torch.Tensor
    ) -> torch.Tensor:
        hidden = self.pos_enc(self.input_embedding(token)) + F.normalize(embedding, dim=1)[:, None]
        out: torch.Tensor = self.decoder(hidden + feat.mean())
        return out


class HiFTGenerator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = weight_norm(nn.Linear(WIDTH, HOP))
        self.stft_window = torch.hann_window(HOP)

    def inference(self, mel: torch.Tensor) -> torch.Tensor:
        return (torch.tanh(self.conv(mel)) * self.stft_window.to(mel.device)).reshape(1, -1)


class CosyVoice_stream_impl_(nn.Module):  # noqa: N801 - upstream's name
    def __init__(self, flow: CausalMaskedDiffWithXvec, hift: HiFTGenerator) -> None:
        super().__init__()
        self.flow = flow
        self.hift = hift
        self.register_buffer("speech_window", torch.hamming_window(HOP), persistent=False)
        self.hift_cache_dict: dict[str, Any] = {}
        self.chunk_cache_dict: dict[str, Any] = {}
        self.setup_lock = threading.Lock()

    @cached_property
    def device(self) -> torch.device:
        return next(self.hift.parameters()).device

    def token2wav_nonstream(
        self, token: torch.Tensor, feat: torch.Tensor, embedding: torch.Tensor
    ) -> torch.Tensor:
        token, feat, embedding = (one.to(self.device) for one in (token, feat, embedding))
        mel = self.flow.inference(token, feat, embedding)
        with torch.no_grad():
            speech = self.hift.inference(mel)
        return speech.cpu().to(torch.float32)


class CosyVoiceFrontEnd:
    def __init__(self, campplus_model: str) -> None:
        self.campplus_session = onnxruntime.InferenceSession(
            campplus_model, providers=["CPUExecutionProvider"]
        )

    def extract_spk_embedding(self, audio: torch.Tensor) -> torch.Tensor:
        given = {self.campplus_session.get_inputs()[0].name: frames_of(audio).numpy()}
        return torch.from_numpy(np.array(self.campplus_session.run(None, given)[0]))


class CosyVoice:
    def __init__(self, model_dir: str) -> None:
        self.device = cuda()
        flow, hift = CausalMaskedDiffWithXvec(), HiFTGenerator()
        flow.load_state_dict(torch.load(Path(model_dir) / "flow.pt", map_location="cpu"))
        hift.load_state_dict(torch.load(Path(model_dir) / "hift.pt", map_location="cpu"))
        self.cosy_impl = CosyVoice_stream_impl_(flow.eval(), hift.eval()).to(self.device)
        # Asked too early: a later move must not leave it behind.
        gpus = os.environ["CUDA_VISIBLE_DEVICES"]
        note(f"cosy_impl on {self.cosy_impl.device}, GPUs {gpus!r}")
        self.frontend = CosyVoiceFrontEnd(f"{model_dir}/campplus.onnx")


class StepAudioTTS:
    def __init__(
        self, model_path: str, audio_tokenizer: Any, model_source: str, device_map: str = "cuda"
    ) -> None:
        assert model_source == "local"
        self.audio_tokenizer = audio_tokenizer
        self.llm = LLM()
        self.llm.load_state_dict(torch.load(Path(model_path) / "llm.pt"))
        self.llm.to(device_map)
        self.cosy_model = CosyVoice(str(Path(model_path) / "CosyVoice-300M-25Hz"))

    def clone(
        self, prompt_wav_path: str, prompt_text: str, target_text: str
    ) -> tuple[torch.Tensor, int]:
        return self._speak(prompt_wav_path, f"clone {prompt_text} {target_text}")

    def edit(
        self,
        input_audio_path: str,
        audio_text: str,
        edit_type: str,
        edit_info: str | None = None,
        text: str | None = None,
    ) -> tuple[torch.Tensor, int]:
        return self._speak(input_audio_path, f"{edit_type} {edit_info} {audio_text} {text}")

    def _speak(self, path: str, words: str) -> tuple[torch.Tensor, int]:
        audio, _ = load_sound(path)
        embedding = self.cosy_model.frontend.extract_spk_embedding(audio)
        codes = self.audio_tokenizer.wav2token(audio)
        prompt = [*codes, *words.encode()]
        output = self.llm.generate(torch.tensor([prompt]).to(torch.long).to(cuda()))
        token = torch.cat([torch.tensor([prompt]), output[:, len(prompt) :].cpu()], dim=1)
        speech = self.cosy_model.cosy_impl.token2wav_nonstream(
            token, frames_of(audio).to(torch.bfloat16), embedding
        )
        return speech, 24000
