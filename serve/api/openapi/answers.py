"""Schemas of answers and errors: the fields that clients may rely on."""

from __future__ import annotations

from typing import Any

from serve.api.openapi.bodies import reference

Schema = dict[str, Any]
STRING: Schema = {"type": "string"}
NUMBER: Schema = {"type": "number"}
INTEGER: Schema = {"type": "integer"}
BOOLEAN: Schema = {"type": "boolean"}
OBJECT: Schema = {"type": "object"}


def schemas() -> dict[str, Schema]:
    """Return them by name."""
    return {**_errors(), **_openai(), **_responses(), **_inference(), **_health()}


def shape(**fields: Schema) -> Schema:
    """Return the schema of an object that has these fields, and perhaps others."""
    return {"type": "object", "properties": fields, "required": list(fields)}


def listed(each: Schema) -> Schema:
    return {"type": "array", "items": each}


def perhaps(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def only(*values: str) -> Schema:
    return {"enum": list(values)}


def _errors() -> dict[str, Schema]:
    error = shape(message=STRING, type=STRING, param=perhaps(STRING), code=perhaps(STRING))
    return {"Error": shape(error=error), "InferenceError": shape(error=STRING)}


def _openai() -> dict[str, Schema]:
    function = shape(name=STRING, arguments=STRING)
    message = shape(role=only("assistant"), content=perhaps(STRING))
    message["properties"]["tool_calls"] = listed(shape(id=STRING, type=only("function"), function=function))
    reason = perhaps(only("stop", "length", "tool_calls"))
    usage = shape(prompt_tokens=INTEGER, completion_tokens=INTEGER, total_tokens=INTEGER)
    common = {"id": STRING, "created": INTEGER, "model": STRING, "usage": usage}
    choice = {"index": INTEGER, "finish_reason": reason, "logprobs": perhaps(OBJECT)}
    vector = shape(index=INTEGER, object=only("embedding"), embedding={"anyOf": [listed(NUMBER), STRING]})
    card = shape(id=STRING, object=only("model"), created=INTEGER, owned_by=STRING, task=STRING, version=STRING)
    return {
        "ChatCompletion": shape(
            object=only("chat.completion"), choices=listed(shape(message=message, **choice)), **common
        ),
        "Completion": shape(object=only("text_completion"), choices=listed(shape(text=STRING, **choice)), **common),
        "Embeddings": shape(
            object=only("list"),
            data=listed(vector),
            model=STRING,
            usage=shape(prompt_tokens=INTEGER, total_tokens=INTEGER),
        ),
        "Transcription": shape(text=STRING),
        "Model": card,
        "Models": shape(object=only("list"), data=listed(reference("Model"))),
    }


def _responses() -> dict[str, Schema]:
    status = only("completed", "incomplete", "failed", "in_progress")
    part = shape(type=only("output_text"), text=STRING, annotations=listed(OBJECT), logprobs=listed(OBJECT))
    message = shape(id=STRING, type=only("message"), role=only("assistant"), status=status, content=listed(part))
    call = shape(id=STRING, type=only("function_call"), status=status, call_id=STRING, name=STRING, arguments=STRING)
    usage = shape(
        input_tokens=INTEGER,
        input_tokens_details=shape(cached_tokens=INTEGER),
        output_tokens=INTEGER,
        output_tokens_details=shape(reasoning_tokens=INTEGER),
        total_tokens=INTEGER,
    )
    response = shape(
        id=STRING,
        object=only("response"),
        created_at=INTEGER,
        status=status,
        error=perhaps(shape(code=STRING, message=STRING)),
        incomplete_details=perhaps(shape(reason=STRING)),
        output=listed({"anyOf": [message, call]}),
        usage=perhaps(usage),
        model=STRING,
        store={"enum": [False]},
        tools=listed(OBJECT),
        parallel_tool_calls=BOOLEAN,
    )
    return {"Response": response}


def _inference() -> dict[str, Schema]:
    tensor = shape(name=STRING, datatype=STRING, shape=listed(INTEGER))
    about = shape(name=STRING, versions=listed(STRING), platform=STRING, inputs=listed(OBJECT), outputs=listed(OBJECT))
    indexed = shape(name=STRING, version=STRING, state=only("READY", "UNAVAILABLE"), reason=STRING)
    ready: Schema = {"type": "object", "properties": {"ready": BOOLEAN}, "additionalProperties": False}
    return {
        "Predictions": shape(model_name=STRING, model_version=STRING, outputs=listed(tensor)),
        "ModelMetadata": about,
        "ModelReady": shape(name=STRING, ready=BOOLEAN),
        "Server": shape(name=STRING, version=STRING, extensions=listed(STRING)),
        "Live": shape(live=BOOLEAN),
        "Ready": shape(ready=BOOLEAN),
        "Index": listed(indexed),
        "IndexRequest": {**ready, "properties": {"ready": perhaps(BOOLEAN)}},
    }


def _health() -> dict[str, Schema]:
    model = shape(version=STRING, running=INTEGER, queued=INTEGER, tokens_per_second=NUMBER, replicas=listed(OBJECT))
    return {
        "Health": _health_of("ok", "models"),
        "Starting": _health_of("starting", "not_ready"),
        "Status": {"type": "object", "additionalProperties": model},
    }


def _health_of(status: str, names: str) -> Schema:
    """Return the schema of how ready the endpoint is; the names are told where no keys are asked for."""
    told = shape(status=only(status), served=INTEGER, ready=INTEGER)
    return {**told, "properties": {**told["properties"], names: listed(STRING)}}
