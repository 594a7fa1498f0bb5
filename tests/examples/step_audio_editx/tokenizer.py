"""Stands for upstream's tokenizer.py and funasr_detach: an encoder of FunASR's, an ONNX session."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import nn
from utils import MovesItself, cuda, frames_of, note  # type: ignore[import-not-found]


class Attention(nn.Module):
    """Keeps its last map, as FunASR's does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.attn: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query = self.linear(x)
        self.attn = torch.softmax(query @ query.transpose(1, 2), dim=-1)
        found: torch.Tensor = self.attn @ query
        return found


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = x + self.self_attn(x)
        return found


class ParaformerStreaming(MovesItself):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()

    def infer_encoder(
        self, data_in: torch.Tensor, frontend: Any, cache: dict[str, Any], **kwargs: Any
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        feats = frontend(data_in).to(cuda() if kwargs["device"] == 0 else kwargs["device"])
        cache["encoder"] = {"feats": feats.clone()}
        return [{"enc_out": self.encoder(feats)}], cache


class WavFrontendOnline(nn.Module):
    """A module without weights in a plain dict; ``cmvn`` belongs on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.cmvn = torch.ones(8)

    def forward(self, audio: torch.Tensor) -> torch.Tensor:
        note("Tensor.cuda")
        waveform = audio.to(cuda())
        scale = torch.from_numpy(self.cmvn.numpy()).to(waveform.device)
        found: torch.Tensor = frames_of(waveform) * scale
        return found


class AutoModel:
    """No module, as upstream's: it loads itself onto the GPU at each call."""

    def __init__(self, repo_path: str, model: str) -> None:
        self.kwargs: dict[str, Any] = {"device": str(cuda()), "frontend": WavFrontendOnline()}
        self.model = ParaformerStreaming()
        self.model.load_state_dict(torch.load(Path(model) / "model.pt"))
        self.model.to(cuda())
        self.repo_path = repo_path

    def infer_encoder(self, audio: torch.Tensor, **cfg: Any) -> Any:
        kwargs = self.kwargs
        kwargs.update(cfg)
        model = self.model.cuda()
        model.eval()
        with torch.no_grad():
            results, cache = model.infer_encoder(audio, **kwargs)
        torch.cuda.empty_cache()
        return results, cache


class StepAudioTokenizer:
    def __init__(self, encoder_path: str, model_source: str, funasr_model_id: str) -> None:
        assert model_source == "local"
        self.funasr_model = AutoModel(encoder_path, str(Path(encoder_path) / funasr_model_id))
        folder = Path(self.funasr_model.repo_path)
        self.kms = torch.tensor(np.load(folder / "linguistic_tokenizer.npy"))
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads = 1
        self.ort_session = onnxruntime.InferenceSession(
            str(folder / "speech_tokenizer_v1.onnx"),
            sess_options=options,
            providers=["CUDAExecutionProvider"],
        )
        self.vq02_sessions: dict[str, Any] = {}
        self.vq02_lock = threading.Lock()
        self.vq06_lock = threading.Lock()

    def wav2token(self, audio: torch.Tensor) -> list[int]:
        return [*self.get_vq02_code(audio), *self.get_vq06_code(audio)]

    def get_vq02_code(self, audio: torch.Tensor, session_id: str | None = None) -> list[int]:
        with self.vq02_lock:
            results, cache = self.funasr_model.infer_encoder(audio, device=0, cache={})
            if session_id:
                self.vq02_sessions[session_id] = {"cache": cache, "update_time": time.time()}
            # On the host, as upstream: dump_label copies into a FloatTensor.
            found = torch.FloatTensor(results[0]["enc_out"].shape)
            found[:] = results[0]["enc_out"]
            return torch.cdist(found[0], self.kms).argmin(dim=1).tolist()

    def get_vq06_code(self, audio: torch.Tensor) -> list[int]:
        with self.vq06_lock:
            feats = frames_of(audio).numpy()
            first, second = self.ort_session.get_inputs()
            given = {first.name: feats, second.name: np.array([feats.shape[1]], np.int32)}
            return [int(code) for code in self.ort_session.run(None, given)[0].flatten()]
