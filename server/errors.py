"""The one place that maps what can go wrong to an HTTP status and OpenAI's error shape.

Handlers and the generation path raise; nothing else in the server builds an error body. Before the first byte
of a response an error becomes a status, after it the last event of the stream: both from `as_api_error`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from hybridgen.engine.client import EngineDead
from hybridgen.engine.request import InvalidRequest

RETRY_AFTER_S = 1  # a slot frees up within a second or so; a longer promise would leave a short queue idle
RETRY_AFTER_RESTART_S = 5  # a supervisor has to start another process first


class ErrorInfo(msgspec.Struct, frozen=True, kw_only=True):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    """What every answer that is not a success carries: `{"error": {...}}`."""

    error: ErrorInfo


class ApiError(HTTPException):
    """An answer that is not a success. An HTTPException: FastAPI lets those through while it reads a body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.info = ErrorInfo(message=message, type=type, param=param, code=code)


class ModelNotFound(ApiError):
    def __init__(self, model: str, served: Sequence[str]) -> None:
        super().__init__(
            404,
            f"The model `{model}` does not exist. Served here: {', '.join(served)}.",
            param="model",
            code="model_not_found",
        )


class ContextLengthExceeded(ApiError):
    """`max_tokens` is None when the prompt alone leaves no room for a token.

    Args:
        at_least: the prompt was not tokenized: its length alone tells.
    """

    def __init__(
        self,
        num_prompt_tokens: int,
        max_tokens: int | None,
        max_model_len: int,
        param: str,
        *,
        at_least: bool = False,
    ) -> None:
        asked = (
            f"your prompt contains {'at least ' if at_least else ''}{num_prompt_tokens} tokens, which leaves no "
            "room for more. Shorten it."
            if max_tokens is None
            else f"you requested {num_prompt_tokens + max_tokens} tokens ({num_prompt_tokens} in the prompt, "
            f"{max_tokens} in the completion). Shorten either."
        )
        super().__init__(
            400,
            f"This model's maximum context length is {max_model_len} tokens. However, {asked}",
            param=param,
            code="context_length_exceeded",
        )


class Unsupported(ApiError):
    """A field that this server knows and does not act on: ignoring it would answer another question."""

    def __init__(self, param: str, reason: str) -> None:
        super().__init__(
            400, f"`{param}` is not supported: {reason}", param=param, code="unsupported_parameter"
        )


class QueueFull(ApiError):
    def __init__(self, num_in_flight: int, num_new: int, limit: int) -> None:
        super().__init__(
            429,
            f"The queue is full: {num_in_flight} sequences run or wait, {num_new} more would pass the "
            f"limit of {limit}. Retry after {RETRY_AFTER_S} s.",
            type="rate_limit_error",
            code="queue_full",
            headers={"Retry-After": str(RETRY_AFTER_S)},
        )


class Unavailable(ApiError):
    """This server cannot take the request, another may: it is starting, draining, or its engine is dead."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(
            503,
            message,
            type="server_error",
            code=code,
            # The connection would outlive the process otherwise, and the retry would land here again.
            headers={"Retry-After": str(RETRY_AFTER_RESTART_S), "Connection": "close"},
        )


class BodyTooLarge(ApiError):
    def __init__(self, max_bytes: int) -> None:
        super().__init__(
            413,
            f"The request body is larger than the limit of {max_bytes} bytes.",
            code="request_too_large",
            headers={"Connection": "close"},  # the rest of the body need not be read
        )


class InvalidApiKey(ApiError):
    def __init__(self) -> None:
        super().__init__(
            401,
            "Missing or incorrect API key. Send it as `Authorization: Bearer KEY`.",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def as_api_error(exc: Exception) -> ApiError:
    """What to tell the client about `exc`; of an exception that nobody foresaw, no details."""
    match exc:
        case ApiError():
            return exc
        case InvalidRequest():
            return ApiError(400, str(exc), param=exc.param, code="invalid_value")
        case EngineDead():
            return Unavailable(str(exc) or "The engine has died.", "engine_dead")
        case RequestValidationError():
            return _invalid_body(exc)
        case HTTPException():
            return ApiError(exc.status_code, str(exc.detail), headers=exc.headers)
        case _:
            return ApiError(500, "Internal server error.", type="server_error", code="internal_error")


def error_body(error: ApiError) -> bytes:
    return msgspec.json.encode(ErrorBody(error.info))


def error_response(error: ApiError) -> Response:
    return Response(error_body(error), error.status_code, error.headers, media_type="application/json")


def add_exception_handlers(app: FastAPI) -> None:
    async def answer(request: Request, exc: Exception) -> Response:
        if isinstance(exc, HTTPException) and not isinstance(exc, ApiError) and exc.status_code in (404, 405):
            exc = _no_route(request, exc)
        elif isinstance(exc, HTTPException) and not isinstance(exc, ApiError) and exc.status_code == 400:
            # FastAPI's word for JSON that its parser fails at: too deep, a number too long, not UTF-8.
            exc = ApiError(400, f"Malformed JSON: {exc.__cause__ or exc.detail}.", code="invalid_json")
        elif isinstance(exc, RequestValidationError) and isinstance(exc.body, bytes):
            # FastAPI leaves a body that does not call itself JSON as bytes.
            exc = ApiError(
                415,
                f"Unsupported content type {request.headers.get('content-type')!r}: send application/json.",
                code="unsupported_media_type",
            )
        return error_response(as_api_error(exc))

    async def hung_up(request: Request, exc: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it; 499 is what proxies log for this

    for kind in (HTTPException, RequestValidationError, InvalidRequest, EngineDead, Exception):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(ClientDisconnect, hung_up)


def _no_route(request: Request, exc: HTTPException) -> ApiError:
    if exc.status_code == 405:
        message = f"{request.method} is not allowed on {request.url.path}."
        return ApiError(405, message, code="method_not_allowed", headers=exc.headers)
    return ApiError(404, f"There is nothing at {request.method} {request.url.path}.", code="not_found")


# What pydantic puts into a location for the branch of a union that it tried: no part of the client's JSON.
_UNION_BRANCH = re.compile(r"^(str|int|float|bool|list|dict|none|[\w-]+\[.*\])$")


def _param(location: Sequence[str | int]) -> str | None:
    """("body", "messages", 0, "content", "str") -> "messages[0].content"."""
    param = ""
    for part in location[1:]:
        if isinstance(part, int):
            param += f"[{part}]"
        elif not _UNION_BRANCH.match(part):
            param += f".{part}" if param else part
    return param or None


def _invalid_body(exc: RequestValidationError) -> ApiError:
    errors: Sequence[Mapping[str, Any]] = exc.errors()
    first = errors[0]
    if first["type"] == "json_invalid":
        position = first["loc"][-1]
        return ApiError(
            400, f"Malformed JSON at character {position}: {first['ctx']['error']}.", code="invalid_json"
        )
    # The branches of a union each say why they failed: the one that got furthest is the one that was meant.
    field_errors = [error for error in errors if error["loc"][:2] == first["loc"][:2]]
    param = _param(max((error["loc"] for error in field_errors), key=len))
    reasons = [error["msg"] for error in field_errors if _param(error["loc"]) == param]
    reason = " or ".join(dict.fromkeys(reasons)).replace("Value error, ", "")
    message = f"`{param}`: {reason}." if param else f"{reason}."
    return ApiError(400, message, param=param, code="invalid_value")
