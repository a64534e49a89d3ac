"""What happens before a route is chosen: request ids, API keys, availability, the size of the body.

Plain ASGI on purpose: Starlette's BaseHTTPMiddleware puts a queue between a stream and its client, which
costs time for every token and hides the hang-up.
"""

import hmac
import re
import secrets
from collections.abc import Sequence
from contextlib import ExitStack

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hybridgen.engine.client import EngineClient
from hybridgen.server.errors import ApiError, BodyTooLarge, InvalidApiKey, Unavailable, error_response
from hybridgen.server.lifecycle import Lifecycle

# Probes and scrapers send no key.
OPEN_PATHS = frozenset({"/health", "/ready", "/ping", "/metrics"})
# A client's own id goes into ours and into a response header, so it must be harmless in both.
_CLIENT_ID = re.compile(r"[\x21-\x7e]{1,128}")


class RequestId:
    """Puts an id into `scope["state"]["request_id"]`: the client's X-Request-Id, else a random one."""

    def __init__(self, app: ASGIApp, *, send_back: bool) -> None:
        self._app = app
        self._send_back = send_back

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _CLIENT_ID.fullmatch(given) else secrets.token_hex(16)
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        return await self._app(scope, receive, send_with_id if self._send_back else send)


class ApiKeyGuard:
    """Lets requests in that carry one of `keys`. With no keys, do not install it."""

    def __init__(self, app: ASGIApp, *, keys: Sequence[str]) -> None:
        assert keys
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS and not self._has_key(scope):
            return await error_response(InvalidApiKey())(scope, receive, send)
        return await self._app(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return False
        sent = key.strip().encode("latin-1")
        # Every key is compared, and each in constant time, so that the time taken tells nothing.
        matches = [hmac.compare_digest(sent, known) for known in self._keys]
        return True in matches


class Availability:
    """Refuses what needs the engine while it is starting, draining or dead; counts what is answered.

    A request counts once its body is there: a client that never sends the rest does not hold up a drain.
    """

    def __init__(
        self, app: ASGIApp, *, paths: frozenset[str], lifecycle: Lifecycle, engine: EngineClient
    ) -> None:
        self._app = app
        self._paths = paths
        self._lifecycle = lifecycle
        self._engine = engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in self._paths:
            return await self._app(scope, receive, send)
        refusal = unavailable(self._lifecycle, self._engine)
        if refusal is not None:
            return await error_response(refusal)(scope, receive, send)
        with ExitStack() as stack:
            is_whole = False

            async def counted() -> Message:
                nonlocal is_whole
                message = await receive()
                if message["type"] == "http.request" and not message.get("more_body") and not is_whole:
                    is_whole = True
                    # It may have taken long to come.
                    refusal = unavailable(self._lifecycle, self._engine)
                    if refusal is not None:
                        raise refusal
                    stack.enter_context(self._lifecycle.answering())
                return message

            return await self._app(scope, counted, send)


def unavailable(lifecycle: Lifecycle, engine: EngineClient) -> ApiError | None:
    """Why no request can be served now; None when one can."""
    failure = lifecycle.failure or engine.failure
    if failure is not None or lifecycle.state == "failed":
        return Unavailable(f"The engine has died: {failure}", "engine_dead")
    if lifecycle.state == "draining":
        return Unavailable("The server is shutting down.", "draining")
    if lifecycle.state == "starting":
        return Unavailable("The model is still being loaded.", "starting")
    return None


class BodyLimit:
    """Refuses bodies above `max_bytes`: by their announced length, or, sent in chunks, once they pass it."""

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isdecimal() and int(announced) > self._max_bytes:
            return await error_response(BodyTooLarge(self._max_bytes))(scope, receive, send)
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                raise BodyTooLarge(self._max_bytes)
            return message

        return await self._app(scope, counted, send)
