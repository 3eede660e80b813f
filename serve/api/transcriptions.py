"""OpenAI's /v1/audio/transcriptions: a form is parsed strictly, a prediction becomes the answer. Pure functions.

A model whose card says `transcribes` is asked as for any prediction, with the file as its input `audio`; its answer
has `text`, and may have `seconds`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from serve.api.forms import Fields, FormFile
from serve.api.openai_parameters import invalid, missing, validate
from serve.api.openai_requests import TranscriptionRequest

INPUT, OUTPUT = "audio", "text"


@dataclass(frozen=True)
class Transcription:
    """A parsed request."""

    file: bytes
    form: Literal["json", "text"]


def parse(fields: Fields) -> Transcription:
    """Parse the form of /v1/audio/transcriptions. Raises ApiError (400) naming the parameter at fault."""
    request = validate(TranscriptionRequest, fields)
    file = request.file
    if isinstance(file, str):
        raise invalid("file", "is a text; a file has a name (filename=…) in its part of the form")
    if not isinstance(file, FormFile):
        raise invalid("file", "one recording is taken") if file else missing("file")
    if not file.content:
        raise invalid("file", "is empty")
    return Transcription(file.content, request.response_format or "json")


def answer(wanted: Transcription, prediction: Mapping[str, Any]) -> tuple[bytes, str]:
    """Return the answer's body and its content type."""
    text = str(prediction[OUTPUT])
    if wanted.form == "text":
        return f"{text}\n".encode(), "text/plain; charset=utf-8"
    told: dict[str, Any] = {"text": text}
    if "seconds" in prediction:
        told["usage"] = {"type": "duration", "seconds": math.ceil(prediction["seconds"])}
    return json.dumps(told, ensure_ascii=False).encode(), "application/json"
