"""The gateway's routes as a FastAPI app, with every error in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from serve.api.body import ApiError
from serve.api.gateway import Gateway


def build(find: Callable[[], Gateway]) -> FastAPI:
    """Return the FastAPI app whose routes call the gateway that `find` returns."""
    app = FastAPI(title="Tandem", docs_url=None, redoc_url=None, openapi_url=None)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await find().chat_completions(request)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await find().completions(request)

    @app.post("/v2/models/{name}/infer")
    async def infer(name: str, request: Request) -> Response:
        return await find().infer(name, request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return find().models()

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        return find().model(name)

    @app.get("/v2/models/{name}")
    async def metadata(name: str) -> dict[str, Any]:
        return await find().metadata(name)

    @app.get("/v2/models/{name}/ready")
    async def model_ready(name: str) -> JSONResponse:
        ready = await find().ready(name)
        return JSONResponse({"name": name, "ready": ready}, 200 if ready else 503)

    @app.get("/v2")
    async def server() -> dict[str, Any]:
        return {"name": "tandem", "version": "1", "extensions": []}

    @app.get("/v2/health/live")
    async def live() -> dict[str, Any]:
        return {"live": True}

    @app.get("/v2/health/ready")
    async def ready() -> JSONResponse:
        waiting = await find().unready()
        return JSONResponse({"ready": not waiting}, 503 if waiting else 200)

    @app.get("/health")
    async def health() -> JSONResponse:
        waiting = await find().unready()
        if waiting:
            return JSONResponse({"status": "starting", "not_ready": waiting}, 503)
        return JSONResponse({"status": "ok", "models": list(find().catalog)})

    @app.get("/status")
    async def status() -> dict[str, Any]:
        return await find().status()

    _add_error_handlers(app)
    return app


def _add_error_handlers(app: FastAPI) -> None:
    def answer(error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), error.status, headers=error.headers)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return answer(error)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        # No route, or another method than the route's.
        where = f"{request.method} {request.scope['path']}"
        code = "method_not_allowed" if error.status_code == 405 else "not_found"
        headers = dict(error.headers or {})
        return answer(ApiError(error.status_code, f"{where}: {error.detail}", code=code, headers=headers))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        # Starlette logs the traceback; the client learns nothing of our insides.
        return answer(ApiError(500, "the server failed to answer; its log has the reason", code="internal_error"))
