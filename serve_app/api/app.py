"""The HTTP application: which URL leads where. Everything behind it comes in as an argument."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.api import problems
from serve_app.api.admission import find_model
from serve_app.api.auth import ApiKeys, KeyDoor
from serve_app.api.chat import chat
from serve_app.api.completions import complete
from serve_app.api.connection import ClientGoneError
from serve_app.api.generator import Generator, ServedModel
from serve_app.api.receipts import Receipts, receipt_response
from shard_tools.canonical import Value
from shard_tools.cid import Cid

DEFAULT_MAX_BODY_BYTES = 8 << 20
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")  # what may be echoed into a header and a log


def create_app(
    models: Mapping[str, ServedModel],
    generator: Generator,
    keys: ApiKeys,
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES,
    receipts: Receipts | None = None,
) -> FastAPI:
    """The application that serves `models` by `generator` to whoever shows one of `keys`.

    receipts: None where nobody audits.
    """
    app = FastAPI(title="llm-d", docs_url=None, redoc_url=None, openapi_url=None)  # bodies are parsed in wire.py
    problems.install(app)
    app.add_exception_handler(ClientGoneError, _to_nobody)
    app.add_middleware(KeyDoor, keys=keys)
    app.add_middleware(RequestIds)  # added last, so it is outermost: refusals carry an id too

    @app.post("/v1/chat/completions")
    async def chat_route(request: Request) -> Response:
        return await chat(request, models, generator, max_body_bytes)

    @app.post("/v1/completions")
    async def completions_route(request: Request) -> Response:
        return await complete(request, models, generator, max_body_bytes)

    @app.get("/v1/models")
    async def models_route() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [_card(model) for model in models.values()]})

    @app.get("/v1/models/{name:path}")
    async def model_route(name: str) -> JSONResponse:
        return JSONResponse(_card(find_model(models, name)))

    @app.get("/v1/cluster/state")
    async def state_route() -> JSONResponse:
        return JSONResponse(_json(generator.status()))

    @app.get("/v1/receipts/{id}")
    async def receipt_route(id: str) -> JSONResponse:
        return await receipt_response(receipts, id)

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health_route() -> JSONResponse:
        return JSONResponse({"status": "ok"}) if await generator.ready() else problems.NOT_READY.response()

    @app.api_route("/", methods=["GET", "HEAD"])
    async def root_route() -> PlainTextResponse:
        return PlainTextResponse(f"llm-d serves {', '.join(models)} at /v1 (OpenAI's API); /health says whether now.\n")

    return app


class RequestIds:
    """Every response carries X-Request-Id: the client's own where it is short and plain, else a new one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = Headers(scope=scope).get("x-request-id", "")
        id = sent if _REQUEST_ID.fullmatch(sent) else f"req_{secrets.token_hex(16)}"

        scope[problems.REQUEST_ID] = id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = id
            await send(message)

        await self._app(scope, receive, send_with_id)


async def _to_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nginx's number for a client that hung up, for the access log


def _card(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created_s,
        "owned_by": "llmd",
        "max_model_len": model.context_length,  # the name under which other servers say it
        "llmd": {"manifest": str(model.manifest)},
    }


def _json(value: Value) -> Any:
    """A status in JSON's terms: links and bytes as text."""
    if isinstance(value, dict):
        return {key: _json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    if isinstance(value, bytes):
        return value.hex()
    return str(value) if isinstance(value, Cid) else value
