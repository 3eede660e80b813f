"""The gateway's routes as a FastAPI app: errors in OpenAI's shape, and in the Open Inference Protocol's under /v2."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from serve.api import callers, middleware, origins
from serve.api.body import ApiError, shaped
from serve.api.gateway import Gateway
from serve.api.inference_api import EXTENSIONS
from serve.api.openapi.document import document
from serve.front import exchange
from serve.metrics import watch
from serve.page import serving

Find = Callable[[], Gateway]
STORED = re.compile(r"/v1/(responses/(?!input_tokens|compact)|conversations)")
"""How the paths begin of what OpenAI stores."""
MODEL = "/v2/models/{name}"
VERSION = f"{MODEL}/versions/{{version}}"
UNUSED = ("docs_url", "redoc_url", "openapi_url")
TELEMETRY = dict.fromkeys(("tracing", "metrics", "logs", "auto_configure"), False)
"""FastAPI's own, where somebody has set providers for the whole process: the front's span would come twice, and its
logs have exceptions' words, in which a prompt may be. Versions that have none take no note of it."""


def build(find: Find) -> FastAPI:
    """Return the FastAPI app whose routes call the gateway that `find` returns."""
    app = FastAPI(title="Tandem", **dict.fromkeys(UNUSED), redirect_slashes=False, telemetry=TELEMETRY)
    app.router.route_class = _Noted
    _add_predictions(app, find)  # first: routes are tried one by one, and control asks fifty times a second
    _add_openai(app, find)
    _add_inference_health(app, find)
    _add_inference(app, find)
    _add_status(app, find)
    _add_document(app)
    _add_healthz(app)
    _add_page(app)
    _add_error_handlers(app)
    app.add_middleware(callers.KeysRequired, doorkeeper=lambda: find().doorkeeper, answer=_shaped)
    app.add_middleware(origins.KnownPages, guarded=find, answer=_shaped)
    app.add_middleware(middleware.Failures, answer=_unexpected)
    app.add_middleware(middleware.SlashAtTheEnd)
    app.add_middleware(middleware.CrossOrigin, origins=lambda: find().cors_origins)
    app.add_middleware(middleware.WholeForOldClients)
    app.add_middleware(watch.Watched, record=lambda: find().metrics.record, routes=app.routes)
    return app


class _Noted(APIRoute):
    """A route that tells the access log its path, without the names in it."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange.current().template = self.path
        await super().handle(scope, receive, send)


class _Straight(_Noted):
    """A route to a function of the request and the path's names: FastAPI's way of finding arguments is left out."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] not in self.methods:
            await super().handle(scope, receive, send)
            return
        exchange.current().template = self.path
        answer = await self.endpoint(Request(scope, receive, send), **scope["path_params"])
        await answer(scope, receive, send)


def _straight(app: FastAPI, path: str, endpoint: Callable[..., Any]) -> None:
    app.router.add_api_route(path, endpoint, methods=["POST"], route_class_override=_Straight)


def not_found(path: str, known: Sequence[str]) -> str:
    """Return the sentence for a path that has no route: with the one that was probably meant, or what to do instead."""
    if STORED.match(path):
        return f"there is no {path[:200]} here: responses and conversations are not stored; send all items in `input`"
    candidates = [f"/v1{path}", f"/v2{path}", path.removeprefix("/v1"), path.removeprefix("/v2")]
    meant = [route for route in candidates if route in known] or difflib.get_close_matches(path, known, 1, 0.85)
    beside = [route for route in known if route.split("/")[1:2] == path.split("/")[1:2]]
    hint = f"; did you mean {meant[0]}?" if meant else f"; known: {', '.join(beside or known)}"
    return f"there is no {path[:200]} here{hint}"


def _reading(app: FastAPI) -> Callable[[str], Any]:
    """Return the decorator of routes that are read: HEAD, which uptime monitors send, beside GET."""
    return partial(app.api_route, methods=["GET", "HEAD"])


def _add_openai(app: FastAPI, find: Find) -> None:
    get = _reading(app)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await find().chat_completions(request)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await find().completions(request)

    @app.post("/v1/responses")
    async def responses(request: Request) -> Response:
        return await find().responses(request)

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        return await find().embeddings(request)

    @app.post("/v1/audio/transcriptions")
    async def transcriptions(request: Request) -> Response:
        return await find().transcriptions(request)

    @get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        return find().models(callers.of(request))

    @get("/v1/models/{name:path}")  # a name with a slash is a name that is not served
    async def model(request: Request, name: str) -> dict[str, Any]:
        return find().model(name, callers.of(request))


def _add_inference_health(app: FastAPI, find: Find) -> None:
    get = _reading(app)

    @get("/v2")
    async def server() -> dict[str, Any]:
        return {"name": "tandem", "version": "1", "extensions": EXTENSIONS}

    @get("/v2/health/live")
    async def live() -> dict[str, Any]:
        return {"live": True}

    @get("/v2/health/ready")
    async def ready() -> JSONResponse:
        waiting = await find().unready()
        return JSONResponse({"ready": not waiting}, 503 if waiting else 200)

    @app.post("/v2/repository/index")
    async def index(request: Request) -> list[dict[str, Any]]:
        return await find().index(request)


def _add_predictions(app: FastAPI, find: Find) -> None:
    async def infer(request: Request, name: str, version: str | None = None) -> Response:
        return await find().infer(name, version, request)

    for path in (f"{MODEL}/infer", f"{VERSION}/infer"):
        _straight(app, path, infer)


def _add_inference(app: FastAPI, find: Find) -> None:
    get = _reading(app)
    name, versioned = MODEL, VERSION

    @get(f"{name}/ready")
    @get(f"{versioned}/ready")
    async def model_ready(request: Request, name: str, version: str | None = None) -> JSONResponse:
        ready = await find().ready(name, version, callers.of(request))
        return JSONResponse({"name": name, "ready": ready}, 200 if ready else 503)

    @get(name)
    @get(versioned)
    async def metadata(request: Request, name: str, version: str | None = None) -> dict[str, Any]:
        return await find().metadata(name, version, callers.of(request))


def _add_status(app: FastAPI, find: Find) -> None:
    get = _reading(app)

    @get("/health")
    async def health() -> JSONResponse:
        told, is_ready = await find().health()
        return JSONResponse(told, 200 if is_ready else 503)

    @get("/status")
    async def status(request: Request) -> dict[str, Any]:
        return await find().status(callers.of(request))

    @get("/metrics")
    async def metrics(request: Request) -> Response:
        return await find().exposition(request)


def _add_document(app: FastAPI) -> None:
    @cache
    def made() -> dict[str, Any]:
        routes = [route for route in app.routes if isinstance(route, APIRoute)]
        return document((m.lower(), route.path) for route in routes for m in sorted(route.methods - {"HEAD"}))

    @_reading(app)("/openapi.json")
    async def openapi() -> dict[str, Any]:
        return made()


def _add_healthz(app: FastAPI) -> None:
    async def healthz(request: Request) -> Response:
        exchange.current().template = callers.HEALTHZ
        return PlainTextResponse("success")

    app.add_route(callers.HEALTHZ, healthz, methods=["GET", "HEAD"])  # for KubeRay: no part of the API


def _add_page(app: FastAPI) -> None:
    for path in ("/", "/page/{name}"):  # plain routes: static files are no part of the API that /openapi.json tells
        app.add_route(path, partial(_page, path), methods=["GET", "HEAD"])


async def _page(template: str, request: Request) -> Response:
    exchange.current().template = template
    file = serving.files().get(request.scope["path"])
    if file is None:
        raise HTTPException(404)
    return serving.answer(file, request.headers.get("if-none-match"))


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return _answer(request, error)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        # No route, or another method than the route's.
        path, headers = request.scope["path"], dict(error.headers or {})
        if error.status_code == 404:
            known = [route.path.replace(":path", "") for route in app.routes if hasattr(route, "path")]
            return _answer(request, ApiError(404, not_found(path, known), code="not_found", headers=headers))
        message = f"{request.method} {path[:200]}: {error.detail}"
        return _answer(request, ApiError(error.status_code, message, code="method_not_allowed", headers=headers))


def _unexpected(path: str, failure: str) -> JSONResponse:
    """Return the answer where something failed that should not: the client learns nothing of our insides."""
    said = f"the server failed to answer; its log has the reason, under {failure}"
    return _shaped(path, ApiError(500, said, code="internal_error"))


def _answer(request: Request, error: ApiError) -> JSONResponse:
    return _shaped(request.scope["path"], error)


def _shaped(path: str, error: ApiError) -> JSONResponse:
    """Return an error in the shape of the protocol that the path belongs to."""
    watch.current().error(error.code)
    return JSONResponse(shaped(path, error), error.status, headers=error.headers)
