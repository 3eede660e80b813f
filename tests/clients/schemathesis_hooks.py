"""Hooks of Schemathesis: requests that it makes up name models that are served, and ask for few tokens."""

from __future__ import annotations

from typing import Any

import schemathesis
import tried

MOST_TOKENS = 4
LIMITS = {"/v1/responses": "max_output_tokens"}
WITHOUT_LIMIT = ("/v1/embeddings", "/v1/audio/transcriptions")


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """Name the text model wherever a body has a model: of unknown ones it is only said that they are not there."""
    if not isinstance(body, dict) or "model" not in body:
        return body
    limit = LIMITS.get(context.operation.path, "max_tokens")
    given = body.get(limit)
    few = {} if context.operation.path in WITHOUT_LIMIT or (given and not isinstance(given, int)) else {limit: 4}
    return {**body, "model": tried.TEXT, **few}


@schemathesis.hook
def map_path_parameters(context: Any, path_parameters: Any) -> Any:
    """Name a model that is served in the path of every route but one."""
    if not path_parameters or context.operation.path == "/v1/models/{name}":
        return path_parameters
    names = {"name": tried.IMAGES if context.operation.path.endswith("/infer") else tried.TEXT}
    return {**path_parameters, **names}
