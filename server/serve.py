"""`hybridgen serve`: the life of the server process, from binding the port to its exit status.

Starts the engine process and the application, then waits for whatever comes first: a signal, after which it
drains, or the death of the engine, after which it tells whoever still waits and exits non-zero. What is
answered in each state is the application's business, by way of `Lifecycle`.
"""

import asyncio
import contextlib
import functools
import logging
import signal
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn
import uvloop

from hybridgen.configs.presets import tokenizer_source
from hybridgen.configs.settings import (
    Settings,
    api_keys,
    chat_template,
    engine_settings,
    ssl_context,
    unknown_variables,
)
from hybridgen.engine.client import ENGINE_COMMAND, EngineClient, EngineStartFailed
from hybridgen.server.defaults import DefaultsError, load_sampling_defaults
from hybridgen.server.lifecycle import Lifecycle

if TYPE_CHECKING:
    from hybridgen.engine.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

# Once requests have been aborted, or the engine has died, how long their last words may take to be sent.
_LAST_ANSWERS_S = 1.0

# A dead engine's /health stays up this long, so that a balancer's next probe reads 503, not a closed port.
_FAILURE_LINGER_S = 1.0


_TOKENIZER_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]


class CannotServe(Exception):
    """The server could not be started; the text says why in one line."""


def serve(settings: Settings, *, engine_command: Sequence[str] = ENGINE_COMMAND) -> int:
    """Serve until a signal or the engine ends it; return the exit status: 0 after a drain, 1 after a death.

    Args:
        engine_command: what to run as the engine; tests run a stub.

    Raises:
        SettingsError: a file that the settings name cannot be used.
        CannotServe: the port is taken, or the model cannot be loaded.
    """
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    # uvicorn tells at level info of each of its own steps, and httpx of each file looked for on a hub.
    for name in ("uvicorn.error", "httpx"):
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))
    for warning in unknown_variables():
        _log.warning("%s", warning)
    # What these read is used later; a mistake in it should not wait until the model is loaded.
    api_keys(settings)
    chat_template(settings)
    ssl_context(settings)
    try:
        load_sampling_defaults(settings)
    except DefaultsError as error:
        raise CannotServe(str(error)) from error
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(listener) for listener in bind(settings.host, settings.port)]
        return uvloop.run(_supervise(settings, listeners, engine_command))


def bind(host: str, port: int) -> list[socket.socket]:
    """Sockets bound to every address of `host`, not yet listening: until the model is loaded, connections
    are refused instead of left waiting.

    Raises:
        CannotServe: the host is unknown, or the port in use.
    """
    listeners: list[socket.socket] = []
    with contextlib.ExitStack() as stack:
        try:
            addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            for family, kind, protocol, _, address in addresses:
                listener = stack.enter_context(socket.socket(family, kind, protocol))
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                # Port 0 is a free one: the same for the second address as for the first.
                port = port or (listeners[0].getsockname()[1] if listeners else 0)
                listener.bind((address[0], port, *address[2:]))
                listeners.append(listener)
        except OSError as error:
            raise CannotServe(f"cannot listen on {host} port {port}: {error.strerror}") from error
        stack.pop_all()
    return listeners


def load_tokenizer(settings: Settings) -> "Tokenizer":
    """Takes seconds, most of them to import transformers; hence not at the top."""
    from huggingface_hub import snapshot_download

    from hybridgen.engine.tokenizer import Tokenizer

    source = settings.tokenizer or tokenizer_source(settings.model)
    if settings.download_dir is not None and not Path(source).expanduser().exists():
        source = snapshot_download(
            source,
            revision=settings.revision,
            cache_dir=settings.download_dir,
            allow_patterns=_TOKENIZER_FILES,
        )
    return Tokenizer(source, revision=settings.revision, chat_template=chat_template(settings))


class _Server(uvicorn.Server):
    """uvicorn, which otherwise would answer a signal by closing the port at once."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _supervise(
    settings: Settings, listeners: list[socket.socket], engine_command: Sequence[str]
) -> int:
    async with contextlib.AsyncExitStack() as stack:
        first_signal, second_signal = asyncio.Event(), asyncio.Event()
        _catch_signals(first_signal, second_signal)

        loading = asyncio.create_task(_load(settings, engine_command))
        await _first(loading, first_signal.wait())
        if first_signal.is_set():
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)
            return 0
        engine, tokenizer = await loading
        stack.push_async_callback(engine.close)

        from hybridgen.server.app import create_app  # after the tokenizer's import, on which it depends

        lifecycle = Lifecycle("ready")
        try:
            app = create_app(settings, engine, tokenizer, lifecycle)
        except DefaultsError as error:
            raise CannotServe(str(error)) from error
        server = _Server(
            uvicorn.Config(
                app,
                http="httptools",
                ws="none",
                log_config=None,
                log_level=settings.uvicorn_log_level,
                access_log=not settings.disable_uvicorn_access_log,
                server_header=False,
                ssl_certfile=settings.ssl_certfile,
                ssl_keyfile=settings.ssl_keyfile,
                timeout_graceful_shutdown=1,  # what was to be waited for has been by then
            )
        )
        serving = asyncio.create_task(server.serve(sockets=listeners))
        await _first(serving, server.listening.wait())
        if serving.done():
            # The port was free when it was bound, but another process has begun to listen since.
            raise CannotServe(f"cannot listen on {settings.host} port {settings.port}: {serving.exception()}")
        names = ", ".join(settings.served_model_name)
        print(f"HybridGen serves {names} at {_url(settings, listeners[0])}", flush=True)

        await _first(first_signal.wait(), engine.wait_failed(), serving)
        if engine.failure is None:
            await _drain(lifecycle, engine, second_signal, settings.drain_timeout)
        if engine.failure is not None:
            lifecycle.fail(engine.failure)
            _log.error("the engine has died: %s", engine.failure)
            idle = asyncio.wait_for(lifecycle.wait_idle(), _LAST_ANSWERS_S)
            await asyncio.gather(idle, asyncio.sleep(_FAILURE_LINGER_S), return_exceptions=True)
        server.should_exit = True
        await serving
        return 0 if engine.failure is None else 1


async def _load(settings: Settings, engine_command: Sequence[str]) -> "tuple[EngineClient, Tokenizer]":
    """The engine and the tokenizer, side by side; both or neither.

    Raises:
        CannotServe: one of them cannot be loaded.
    """
    engine = asyncio.create_task(EngineClient.start(engine_settings(settings), command=engine_command))
    tokenizer: asyncio.Future[Tokenizer] = asyncio.get_running_loop().create_future()
    # A thread of its own, since the loop would wait for those of its executor when it ends, and a download from
    # a hub that does not answer takes minutes.
    threading.Thread(
        target=_load_tokenizer, args=(settings, tokenizer), name="tokenizer", daemon=True
    ).start()
    try:
        return await asyncio.gather(engine, tokenizer)
    except BaseException as error:
        if not engine.cancelling():  # A second time would interrupt it at ending its process.
            engine.cancel()
        for started in await asyncio.gather(engine, return_exceptions=True):
            if isinstance(started, EngineClient):
                await started.close(0)
        if isinstance(error, EngineStartFailed):
            raise CannotServe(str(error)) from None
        if isinstance(error, Exception):
            raise CannotServe(f"cannot load the tokenizer: {error}") from error
        raise


def _load_tokenizer(settings: Settings, result: "asyncio.Future[Tokenizer]") -> None:
    """On a thread of its own: give the loaded tokenizer, or the exception, to the event loop."""
    loop = result.get_loop()
    give: Callable[[], None]
    try:
        give = functools.partial(result.set_result, load_tokenizer(settings))
    except Exception as error:
        give = functools.partial(result.set_exception, error)
    # Where the engine could not be loaded, or a signal came, nobody wants it, and the loop may be gone.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(lambda: None if result.done() else give())


async def _drain(
    lifecycle: Lifecycle, engine: EngineClient, second_signal: asyncio.Event, timeout_s: float
) -> None:
    """Let the running requests end; abort those that still run after `timeout_s` or at a second signal."""
    lifecycle.state = "draining"
    if lifecycle.num_answering > 0:
        _log.info("waiting up to %g s for %d running requests", timeout_s, lifecycle.num_answering)
    await _first(lifecycle.wait_idle(), second_signal.wait(), engine.wait_failed(), timeout_s=timeout_s)
    if engine.failure is not None or lifecycle.num_answering == 0:
        return
    _log.warning("aborting %d requests that are still running", lifecycle.num_answering)
    deadline = asyncio.get_running_loop().time() + _LAST_ANSWERS_S
    while lifecycle.num_answering > 0 and asyncio.get_running_loop().time() < deadline:
        engine.abort_all()  # and again: a request may have been on its way to the engine
        await _first(lifecycle.wait_idle(), timeout_s=0.1)


async def _first(
    *waits: "Coroutine[Any, Any, object] | asyncio.Task[Any]", timeout_s: float | None = None
) -> None:
    """Return when one of `waits` has ended, or after `timeout_s`. Coroutines that go on are cancelled."""
    tasks = [wait if isinstance(wait, asyncio.Task) else asyncio.create_task(wait) for wait in waits]
    await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    for task, wait in zip(tasks, waits, strict=True):
        if task is not wait:
            task.cancel()


def _catch_signals(first: asyncio.Event, second: asyncio.Event) -> None:
    def note() -> None:
        (second if first.is_set() else first).set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, note)


def _url(settings: Settings, listener: socket.socket) -> str:
    scheme = "http" if settings.ssl_certfile is None else "https"
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"{scheme}://{host}:{listener.getsockname()[1]}"
