"""The only place where errors become HTTP: OpenAI's error body, with a status that its clients understand."""

from __future__ import annotations

import base64
import logging
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from serve_app.errors import (
    BodyTooLargeError,
    ContextLengthError,
    DeadlineError,
    KeyReusedError,
    MismatchError,
    OverloadedError,
    PipelineError,
    RequestError,
    TakenOverError,
    UnknownModelError,
)
from shard_tools.errors import IntegrityError

log = logging.getLogger(__name__)

INVALID = "invalid_request_error"
SERVER = "server_error"
REQUEST_ID = "llmd.request_id"  # key of the ASGI scope under which app.py leaves the id


@dataclass(frozen=True, slots=True)
class Problem:
    """An error as a client sees it."""

    status: int
    type: str
    code: str | None
    message: str
    param: str | None = None
    retry_after_s: int | None = None
    evidence: bytes = b""  # a signed error, for those who want to show it to others

    def body(self) -> dict[str, Any]:
        """OpenAI's error object; with evidence, our own `llmd` beside it."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error} | ({"llmd": {"evidence": unpadded(self.evidence)}} if self.evidence else {})

    def response(self) -> JSONResponse:
        """The whole HTTP answer."""
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        if self.status in (409, 504):
            # OpenAI's clients send a request again on these, but not against this: nobody waits for it any more.
            headers["x-should-retry"] = "false"
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def problem_of(error: BaseException) -> Problem:
    """What a client is told of `error`. Of errors that are not ours it learns nothing but that there was one."""
    said = str(error)
    match error:
        case ContextLengthError():
            return Problem(400, INVALID, "context_length_exceeded", said, error.param)
        case UnknownModelError():
            return Problem(404, INVALID, "model_not_found", said, error.param)
        case BodyTooLargeError():
            return Problem(413, INVALID, "request_too_large", said, error.param)
        case KeyReusedError():
            return Problem(422, INVALID, "idempotency_key_reused", said, error.param)
        case TakenOverError():
            return Problem(409, INVALID, "request_taken_over", said, "Idempotency-Key")
        case RequestError():
            return Problem(400, INVALID, None, said, error.param)
        case OverloadedError():
            return Problem(429, "rate_limit_error", "rate_limit_exceeded", said, None, error.retry_after_s)
        case DeadlineError():
            return Problem(504, SERVER, "deadline_exceeded", said)
        case PipelineError():
            return Problem(503, SERVER, "pipeline_error", said, None, 1)
        case MismatchError():
            return Problem(500, SERVER, "integrity_error", said, evidence=error.evidence)
        case IntegrityError():
            return Problem(500, SERVER, "integrity_error", said)
        case HTTPException(status_code=404):
            return Problem(
                404, INVALID, "unknown_url", "There is nothing at this URL. /v1/models lists what is served."
            )
        case HTTPException(status_code=405):
            return Problem(405, INVALID, "method_not_allowed", "This URL does not take this method.")
        case HTTPException():
            kind = INVALID if error.status_code < 500 else SERVER
            return Problem(error.status_code, kind, None, str(error.detail))
        case RequestValidationError():
            return Problem(400, INVALID, None, said)
    log.error("a request failed on an error nobody foresaw", exc_info=error)
    return Problem(500, SERVER, "internal_error", "The server failed on this request; its log says why.")


UNAUTHORIZED = Problem(
    401, INVALID, "invalid_api_key", "Incorrect API key provided. Send one as `Authorization: Bearer <key>`."
)
NOT_READY = Problem(503, SERVER, "not_ready", "The pipeline has not generated a token yet; try again shortly.", None, 1)


def unpadded(data: bytes) -> str:
    """Bytes as every answer of ours writes them: base64url without padding."""
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def install(app: FastAPI) -> None:
    """Every error that a route of `app` raises is answered by its Problem."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        response = problem_of(error).response()
        if isinstance(error, HTTPException) and error.headers:
            response.headers.update(error.headers)  # Allow, of a 405
        if id := request.scope.get(REQUEST_ID):  # the last resort of Starlette sits outside every middleware
            response.headers["X-Request-Id"] = id
        return response

    ours = RequestError, TakenOverError, OverloadedError, DeadlineError, PipelineError, IntegrityError
    for kind in (*ours, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(Exception, answer)
