"""The server's side of the engine process: start it, send requests, hand out outputs, notice its death."""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from hybridgen.configs.settings import EngineSettings
from hybridgen.engine.process import INBOX, OUTBOX
from hybridgen.engine.request import (
    Abort,
    AbortChoice,
    EngineStats,
    Explain,
    Explanation,
    Failed,
    FromEngine,
    Output,
    Outputs,
    Ready,
    Request,
    Shutdown,
    ToEngine,
)

_log = logging.getLogger(__name__)

# -P keeps the working directory off sys.path: in a checkout its `kernels` folder would shadow a package that
# transformers probes for.
ENGINE_COMMAND = (sys.executable, "-P", "-m", "hybridgen.engine.process")

# After the process has ended, its last message (what went wrong) may still be on its way.
_LAST_WORDS_S = 0.2

# The longest path of a Unix socket, less the terminating zero.
_MAX_SOCKET_PATH = 107


class EngineStartFailed(Exception):
    """The engine process ended before it was ready; the text says why."""


class EngineDead(Exception):
    """The engine process has ended; nothing more can be generated. The server must end as well."""


class _Stream:
    """One request's outputs on their way to its consumer."""

    __slots__ = ("open_choices", "queue")

    def __init__(self, n: int) -> None:
        self.open_choices = set(range(n))  # choices from which more may come
        # None wakes the consumer to look at open_choices.
        self.queue: asyncio.Queue[Output | EngineDead | None] = asyncio.Queue()


class EngineClient:
    """One engine process and the requests that it is working on. For use on one event loop's thread.

    Attributes:
        ready: what the engine said of the model when it had loaded.
        stats: as of the engine's last step.
        failure: why the engine is gone; None while it lives.
    """

    ready: Ready

    def __init__(self, process: "subprocess.Popen[bytes]", folder: Path) -> None:
        """Use `EngineClient.start`. Takes over the process and the folder of its sockets."""
        self.stats = EngineStats()
        self.failure: str | None = None
        self._process = process
        self._folder = folder
        self._streams: dict[str, _Stream] = {}
        self._questions: dict[str, asyncio.Future[tuple[str, ...]]] = {}  # of `explain`, by id
        self._num_questions = 0
        self._closing = False
        self._failed = asyncio.Event()
        self._exited = asyncio.Event()
        threading.Thread(
            target=self._watch, args=(asyncio.get_running_loop(),), name="engine-exit", daemon=True
        ).start()
        self._ready_or_failed: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self._encoder = msgspec.msgpack.Encoder()
        self._context = zmq.Context()
        # Sending on a plain socket without a high-water mark never waits, so that requests and aborts need no
        # await; receiving is on an asyncio socket. A socket is one or the other: both wait on the same edge.
        self._to_engine = self._context.socket(zmq.PUSH)
        self._to_engine.set_hwm(0)
        self._to_engine.setsockopt(zmq.LINGER, 0)
        self._from_engine: zmq.asyncio.Socket = zmq.asyncio.Context(self._context).socket(zmq.PULL)
        self._from_engine.set_hwm(0)
        self._receiver: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls, settings: EngineSettings, *, command: Sequence[str] = ENGINE_COMMAND
    ) -> "EngineClient":
        """Start the engine process and wait until its model is loaded, however long that takes.

        Cancelling the wait ends the process.

        Args:
            command: what to run; tests run a stub.

        Raises:
            EngineStartFailed: it ended first.
        """
        folder = _socket_folder()
        process = subprocess.Popen(  # noqa: ASYNC220 (once, and only for milliseconds)
            [*command, "--sockets", str(folder)], stdin=subprocess.PIPE, env=_environment(settings)
        )
        client = cls(process, folder)
        try:
            client._to_engine.bind(f"ipc://{folder / INBOX}")
            client._from_engine.bind(f"ipc://{folder / OUTBOX}")
            client._receiver = asyncio.create_task(client._receive())
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # It has ended already, and _watch says how.
                process.stdin.write(msgspec.json.encode(settings) + b"\n")
                process.stdin.flush()
            client.ready = await client._ready_or_failed
        except BaseException:
            await client.close(0)
            raise
        return client

    @property
    def process_id(self) -> int:
        return self._process.pid

    @property
    def num_requests(self) -> int:
        """Requests whose `generate` is running: waiting or running in the engine."""
        return len(self._streams)

    async def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        """Outputs as the engine makes them, until each of the `n` choices has finished or been aborted.

        A choice's last output has a finish_reason. One with finish_reason "error" ends the request.
        Closing the generator early aborts the request in the engine and frees its pages.

        Raises:
            EngineDead: the engine is gone, or goes before the end.
            ValueError: a request of the same id is running.
        """
        if self.failure is not None:
            raise EngineDead(self.failure)
        if request.id in self._streams:
            raise ValueError(f"request id {request.id!r} is in use")
        stream = _Stream(request.params.n)
        self._streams[request.id] = stream
        try:
            self._send(request)
            while stream.open_choices:
                output = await stream.queue.get()
                if output is None:
                    continue
                if isinstance(output, EngineDead):
                    raise output
                if output.index not in stream.open_choices:
                    continue  # It was aborted after this had been made.
                if output.finish_reason == "error":
                    # Refused as a whole, most likely, and then there is one output for all choices.
                    stream.open_choices.clear()
                    if request.params.n > 1:
                        self._send(Abort(ids=[request.id]))
                elif output.finish_reason is not None:
                    stream.open_choices.remove(output.index)
                yield output
        finally:
            del self._streams[request.id]
            if stream.open_choices and self.failure is None:
                self._send(Abort(ids=[request.id]))

    async def explain(self, page: int | None = None) -> tuple[str, ...]:
        """Lines that say where a host page lies and why; of all of them together, without a page.

        Answered between two steps.

        Raises:
            EngineDead: the engine is gone, or goes before it answers.
        """
        if self.failure is not None:
            raise EngineDead(self.failure)
        answer: asyncio.Future[tuple[str, ...]] = asyncio.get_running_loop().create_future()
        self._num_questions += 1
        id = str(self._num_questions)
        self._questions[id] = answer
        try:
            self._send(Explain(id=id, page=page))
            return await answer
        finally:
            del self._questions[id]

    def abort_choice(self, id: str, index: int) -> None:
        """End one choice: nothing more comes from it. Does nothing when it has ended already."""
        stream = self._streams.get(id)
        if stream is None or index not in stream.open_choices:
            return
        stream.open_choices.remove(index)
        stream.queue.put_nowait(None)
        if self.failure is None:
            self._send(AbortChoice(id=id, index=index))

    def abort_all(self) -> None:
        """End every request: each open choice gets a last output with finish_reason "abort"."""
        for id, stream in self._streams.items():
            for index in sorted(stream.open_choices):
                stream.queue.put_nowait(Output(id=id, index=index, finish_reason="abort"))
        if self._streams and self.failure is None:
            self._send(Abort(ids=list(self._streams)))

    async def wait_failed(self) -> str:
        """Return what ended the engine, once something has. Never returns after an orderly `close`."""
        await self._failed.wait()
        assert self.failure is not None
        return self.failure

    async def close(self, timeout_s: float = 5.0) -> None:
        """End the engine process: ask, wait, kill. Requests still running get EngineDead.

        Args:
            timeout_s: 0 kills at once.
        """
        self._closing = True
        self._end_streams("the engine was shut down")
        if timeout_s > 0 and not self._exited.is_set():
            self._send(Shutdown())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._exited.wait(), timeout_s)
        if not self._exited.is_set():
            if timeout_s > 0:
                _log.warning("the engine did not end within %g s; killing it", timeout_s)
            self._process.kill()
            await self._exited.wait()
        if self._receiver is not None:
            self._receiver.cancel()
            await asyncio.gather(self._receiver, return_exceptions=True)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._to_engine.close()
        self._from_engine.close(linger=0)
        self._context.term()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _send(self, message: ToEngine) -> None:
        # Without a peer a PUSH socket refuses: the engine has just ended, and _fail will tell everybody.
        with contextlib.suppress(zmq.Again):
            self._to_engine.send(self._encoder.encode(message), zmq.NOBLOCK)

    async def _receive(self) -> None:
        decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
        streams = self._streams
        while True:
            try:
                message = decoder.decode(await self._from_engine.recv())
            except msgspec.DecodeError as error:
                _log.exception("the engine sent what it should not")
                self._fail(f"the engine sent what it should not: {error}")
                return
            match message:
                case Outputs():
                    self.stats = message.stats
                    for output in message.outputs:
                        # Its consumer may have left while the output was on its way.
                        if (stream := streams.get(output.id)) is not None:
                            stream.queue.put_nowait(output)
                case Explanation(id=id, lines=lines):
                    # Whoever asked may have left.
                    if (answer := self._questions.get(id)) is not None and not answer.done():
                        answer.set_result(lines)
                case Failed():
                    self._fail(message.message)
                case Ready():
                    # Until the first step every page is free.
                    self.stats = EngineStats(
                        num_pages=message.num_pages,
                        num_free_pages=message.num_pages,
                        num_device_pages=message.num_device_pages,
                        num_free_device_pages=message.num_device_pages,
                    )
                    if not self._ready_or_failed.done():
                        self._ready_or_failed.set_result(message)

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """On a thread of its own: wait for the process, then tell the event loop."""
        status = self._process.wait()
        # The loop may have closed, and everybody who might ask with it.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(self._note_exit, status)

    def _note_exit(self, status: int) -> None:
        self._exited.set()
        if not self._closing:
            asyncio.get_running_loop().call_later(_LAST_WORDS_S, self._fail, _ending(status))

    def _fail(self, message: str) -> None:
        """Tell everybody who waits that the engine is gone. The first reason given is the one that counts."""
        if self.failure is not None or self._closing:
            return
        if not self._ready_or_failed.done():
            self._ready_or_failed.set_exception(EngineStartFailed(message))
        self._end_streams(message)
        self._failed.set()

    def _end_streams(self, message: str) -> None:
        """Refuse requests from now on, and end those that run, because of `message`."""
        if self.failure is None:
            self.failure = message
        for stream in self._streams.values():
            stream.queue.put_nowait(EngineDead(self.failure))
        for answer in self._questions.values():
            if not answer.done():
                answer.set_exception(EngineDead(self.failure))


def _environment(settings: EngineSettings) -> dict[str, str]:
    """The engine's environment. Thread counts and waiting are read once, when torch is imported: set here."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(settings.threads),
        # After a parallel region libgomp's threads spin, by default for milliseconds, on the cores that the
        # attention pool wants next; with a busy neighbour every region then waits out a time slice.
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "20000"),
        # A step's activations are freed and asked for again at once. By default malloc gives large ones back to
        # the kernel, and every step then pays for faulting and clearing the same pages.
        "MALLOC_MMAP_THRESHOLD_": os.environ.get("MALLOC_MMAP_THRESHOLD_", str(1 << 30)),
        "MALLOC_TRIM_THRESHOLD_": os.environ.get("MALLOC_TRIM_THRESHOLD_", str(4 << 30)),
    }


def _socket_folder() -> Path:
    """A new folder that only this user can enter, with a path short enough for Unix sockets."""
    folder = Path(tempfile.mkdtemp(prefix="hybridgen-"))
    if len(str(folder / OUTBOX)) <= _MAX_SOCKET_PATH:
        return folder
    folder.rmdir()
    return Path(tempfile.mkdtemp(prefix="hybridgen-", dir="/tmp"))


def _ending(status: int) -> str:
    if status >= 0:
        return f"the engine process ended with status {status}"
    hint = " (out of memory?)" if -status == signal.SIGKILL else ""
    return f"the engine process was killed by {signal.Signals(-status).name}{hint}"
