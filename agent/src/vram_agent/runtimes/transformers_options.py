"""What the runtime Transformers takes: pipelines, options, parameters, and what each gives.

Why it exists: tables apart from what they steer. Used by runtimes/transformers.py alone.
"""

from __future__ import annotations

from collections.abc import Mapping

from vram_agent.backend import TensorSpec
from vram_agent.runtimes.base import (
    COUNT,
    FLAG,
    NUMBER,
    OBJECT,
    TENSORS,
    TEXT,
    Option,
    is_number,
    one_of,
)

SPEECH_RECOGNITION = "automatic-speech-recognition"
TEXT_TO_AUDIO = "text-to-audio"
ALIASES = {
    "text-to-speech": TEXT_TO_AUDIO,
    "sentiment-analysis": "text-classification",
    "ner": "token-classification",
}
OUTPUTS: Mapping[str, tuple[TensorSpec, ...]] = {
    "text-classification": (
        TensorSpec(name="label", datatype="BYTES", shape=(-1, -1)),
        TensorSpec(name="score", datatype="FP32", shape=(-1, -1)),
    ),
    "token-classification": (TensorSpec(name="json", datatype="BYTES", shape=(-1,)),),
    "text-generation": (TensorSpec(name="generated_text", datatype="BYTES", shape=(-1,)),),
    "feature-extraction": (TensorSpec(name="features", datatype="FP32", shape=(-1, -1)),),
}
PIPELINES = (SPEECH_RECOGNITION, TEXT_TO_AUDIO, *OUTPUTS)
# The first that a class's name ends with.
ARCHITECTURES = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "WhisperForConditionalGeneration": SPEECH_RECOGNITION,
    "ForSpeechSeq2Seq": SPEECH_RECOGNITION,
    "ForCTC": SPEECH_RECOGNITION,
    "ForTextToSpeech": TEXT_TO_AUDIO,
    "VitsModel": TEXT_TO_AUDIO,
}
OPTIONS = {
    "tensors": TENSORS,
    "task": one_of(*PIPELINES, *ALIASES).means(
        "the pipeline", "by the class in the model's `config.json`, where that tells"
    ),
    "dtype": one_of("float16", "bfloat16", "float32").means(
        "what the weights are loaded in", "the files'"
    ),
    "trustRemoteCode": FLAG.means(
        "run the code that comes with the model: **it is not looked at**", "false"
    ),
    "revision": TEXT.means("branch, tag or commit of a hub name", "main"),
    "arguments": Option(
        lambda value: isinstance(value, dict) and not value.keys() & {"device", "device_map"},
        "an object without device and device_map",
    ).means("further keyword arguments of `transformers.pipeline`, such as `chunk_length_s`"),
    "generate": OBJECT.means(
        "keyword arguments of each `generate()`, such as `max_new_tokens`; a request's parameters "
        "win",
        "the model's",
    ),
}
_SEED = Option(
    lambda value: is_number(value) and value == int(value) and value >= 0, "a count, or 0"
)
_LANGUAGE = Option(lambda value: value is None or isinstance(value, str), "a text")
_SPEECH_PARAMETERS = {
    "language": _LANGUAGE.means("for Whisper: the language of the audio", "detected"),
    "prompt": _LANGUAGE.means("for Whisper: words that come before the audio"),
    "word_timestamps": FLAG.means("times of each word too, where the model can", "false"),
}
_GENERATE_PARAMETERS = {
    "temperature": NUMBER.means("of the sampling; 0: none, the likeliest token each time", "0"),
    "max_tokens": COUNT.means("most new tokens", "the model's, or 256"),
    "top_p": NUMBER.means("samples from the likeliest tokens that have this probability together"),
    "seed": _SEED.means("of the random numbers: the same answer again"),
}
PARAMETERS: Mapping[str, Mapping[str, Option]] = {
    SPEECH_RECOGNITION: {**_SPEECH_PARAMETERS, **_GENERATE_PARAMETERS},
    TEXT_TO_AUDIO: {
        "input": TEXT.means("the text to speak"),
        "voice": TEXT.means("number of a speaker, for a model that has several; else ignored"),
        "speed": NUMBER.means("for VITS: how fast; for other models 1 alone", "1"),
        "seed": _GENERATE_PARAMETERS["seed"],
    },
    "text-classification": {
        "top_k": COUNT.means("for text-classification: labels of each text, best first", "1")
    },
    "token-classification": {},
    "text-generation": _GENERATE_PARAMETERS,
    "feature-extraction": {},
}
# Of the Open Inference Protocol itself; the serving layer has dealt with them.
PROTOCOL_PARAMETERS = frozenset({"binary_data_output"})
