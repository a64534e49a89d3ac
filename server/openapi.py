"""The responses in the OpenAPI page, taken from the structs that are sent. FastAPI describes the requests."""

from typing import Any

import msgspec
from fastapi import FastAPI

from hybridgen.server import protocol
from hybridgen.server.errors import ErrorBody

_REFERENCE = "#/components/schemas/{name}"
_ERRORS = {
    400: "malformed JSON, a bad value, or more tokens than the context holds",
    401: "no API key, or a wrong one",
    404: "no such model",
    413: "the body is too large",
    415: "the body is not JSON",
    429: "the queue is full; Retry-After says when to try again",
    500: "an error of the server",
    503: "starting, shutting down, or the engine has died",
}


def json_of(struct: type[msgspec.Struct]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REFERENCE.format(name=struct.__name__)}}}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    content = json_of(ErrorBody)
    # FastAPI adds its own 422 unless there is a default; here a bad body is a 400.
    described: dict[int | str, dict[str, Any]] = {
        "default": {"description": "any other error", "content": content}
    }
    for status in statuses:
        described[status] = {"description": _ERRORS[status], "content": content}
    return described


def answers(struct: type[msgspec.Struct], *statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that sends `struct`, and errors with these statuses."""
    return {200: {"description": "OK", "content": json_of(struct)}, **errors(*statuses)}


def generation_responses(
    whole: type[msgspec.Struct], chunk: type[msgspec.Struct]
) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that can stream."""
    stream = {
        "schema": {"type": "string"},
        "description": f"With stream: `data: {{...}}`, each a {chunk.__name__}, and at last `data: [DONE]`.",
        "x-event-schema": {"$ref": _REFERENCE.format(name=chunk.__name__)},
    }
    content = {**json_of(whole), "text/event-stream": stream}
    return {200: {"description": "OK", "content": content}, **errors(*_ERRORS)}


def describe_responses(app: FastAPI, *, needs_key: bool) -> None:
    """Make `app.openapi()` know the response structs, and the API key when one is asked for."""
    structs = [
        value
        for value in (*vars(protocol).values(), ErrorBody)
        if isinstance(value, type) and issubclass(value, msgspec.Struct)
    ]
    _, schemas = msgspec.json.schema_components(structs, ref_template=_REFERENCE)
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            page = generate()
            components = page.setdefault("components", {})
            components.setdefault("schemas", {}).update(schemas)
            if needs_key:
                components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                page["security"] = [{"key": []}]
            app.openapi_schema = page
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
