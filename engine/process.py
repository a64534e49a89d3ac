"""The engine's process: messages in, one step after another, outputs out. No HTTP, no text, no scheduling.

`python -P -m hybridgen.engine.process --sockets FOLDER` reads its EngineSettings as one line of JSON on
standard input and keeps the pipe: the pipe closes when the server dies, however it dies, and then this
process ends at once, so that no engine is ever left behind.
"""

import argparse
import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, Protocol

import msgspec
import zmq

from hybridgen.configs.settings import EngineSettings
from hybridgen.engine.request import (
    Abort,
    AbortChoice,
    EngineStats,
    Explain,
    Explanation,
    Failed,
    Output,
    Outputs,
    Ready,
    Request,
    Shutdown,
    ToEngine,
)

_log = logging.getLogger(__name__)

INBOX = "to-engine"  # names of the Unix sockets in the folder; the server binds, the engine connects
OUTBOX = "from-engine"

# By name: their modules import torch, which stubs do without.
_EXPLAINED = frozenset(
    {
        "hybridgen.engine.weights.WeightError",
        "hybridgen.engine.model_spec.UnsupportedModel",
        "hybridgen.engine.kv_store.NotEnoughMemory",
    }
)

# How long the last message may take to leave when the process ends.
_LINGER_MS = 1000


class Core(Protocol):
    """What the loop drives: `engine.core.EngineCore`, or a stub in tests."""

    ready: Ready

    def add(self, request: Request, /) -> None:
        """Queue a request. One that cannot run is refused by an Output, never by an exception."""
        ...

    def abort(self, ids: Sequence[str], /) -> None: ...

    def abort_choice(self, id: str, index: int, /) -> None: ...

    def has_work(self) -> bool: ...

    def check_integrity(self) -> None:
        """Called whenever there is no work, once the outputs are sent. Raises if the core's books are wrong."""
        ...

    def step(self) -> list[Output]:
        """One forward pass, or only the refusals that are pending."""
        ...

    def stats(self) -> EngineStats: ...

    def explain(self, page: int | None, /) -> tuple[str, ...]:
        """Lines that say where a host page lies and why; of all of them together, without a page."""
        ...


def build_core(settings: EngineSettings) -> Core:
    """Load the model. The import is here because it takes seconds and stubs do without it."""
    from hybridgen.engine.build import build_engine

    return build_engine(settings)


def main(build: Callable[[EngineSettings], Core] = build_core) -> int:
    """Serve the sockets named on the command line until told to stop; return the process's exit status."""
    # The server decides when the engine ends: Ctrl-C and a service manager signal the whole group, and the
    # requests that are running then are still to be drained.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    parser = argparse.ArgumentParser(description="The engine process of `hybridgen serve`.")
    parser.add_argument("--sockets", required=True, type=Path, help="folder of the server's sockets")
    folder: Path = parser.parse_args().sockets
    settings = msgspec.json.decode(sys.stdin.buffer.readline(), type=EngineSettings)
    threading.Thread(target=_exit_with_parent, args=(folder,), name="exit-with-parent", daemon=True).start()
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)s engine %(name)s: %(message)s"
    )

    with zmq.Context() as context, context.socket(zmq.PULL) as inbox, context.socket(zmq.PUSH) as outbox:
        inbox.set_hwm(0)
        outbox.set_hwm(0)  # never wait for a slow server while requests are running
        outbox.setsockopt(zmq.LINGER, _LINGER_MS)
        inbox.connect(f"ipc://{folder / INBOX}")
        outbox.connect(f"ipc://{folder / OUTBOX}")
        try:
            core = build(settings)
            pin_to_device(settings)
        except Exception as error:
            message = _text(error)
            if _explains_itself(error):
                message = " ".join(str(error).split())
                _log.debug("the engine could not start", exc_info=error)
            else:
                _log.exception("the engine could not start")
            outbox.send(msgspec.msgpack.encode(Failed(message=message)))
            return 1
        outbox.send(msgspec.msgpack.encode(core.ready))
        try:
            run(core, inbox, outbox)
        except Exception as error:
            _log.exception("the engine failed in a step; before it: %s", _describe(core))
            outbox.send(msgspec.msgpack.encode(Failed(message=_text(error))))
            return 1
    return 0


def pin_to_device(settings: EngineSettings) -> None:
    """Keep this thread on the cores that stand for a device, if some do: the host's are not to do its work."""
    if settings.device_threads:
        from hybridgen.kernels.pool import AttentionPool

        os.sched_setaffinity(0, AttentionPool.default_cpus()[: settings.device_threads])


def run(core: Core, inbox: "zmq.Socket[bytes]", outbox: "zmq.Socket[bytes]") -> None:
    """Step while there is work, sleep while there is none, return on Shutdown. Raises what `core` raises."""
    decoder = msgspec.msgpack.Decoder(ToEngine)
    encoder = msgspec.msgpack.Encoder()
    sent_stats = EngineStats()
    while True:
        if not core.has_work():
            core.check_integrity()
            inbox.poll()
        while (frame := _receive(inbox)) is not None:
            match decoder.decode(frame):
                case Request() as request:
                    core.add(request)
                case Abort(ids=ids):
                    core.abort(ids)
                case AbortChoice(id=id, index=index):
                    core.abort_choice(id, index)
                case Explain(id=id, page=page):
                    outbox.send(encoder.encode(Explanation(id=id, lines=core.explain(page))))
                case Shutdown():
                    return
        outputs = core.step() if core.has_work() else []
        stats = core.stats()
        # Without work there is still something to tell after an abort: the pages that it freed.
        if outputs or stats != sent_stats:
            outbox.send(encoder.encode(Outputs(outputs=outputs, stats=stats)))
            sent_stats = stats


def _receive(inbox: "zmq.Socket[bytes]") -> bytes | None:
    """The next message, or None when none has come."""
    try:
        return inbox.recv(zmq.NOBLOCK)
    except zmq.Again:
        return None


def _exit_with_parent(folder: Path) -> NoReturn:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    shutil.rmtree(folder, ignore_errors=True)  # The server would have removed it.
    # Not sys.exit: the main thread may be deep in a forward pass, and nobody is left to read its result.
    os._exit(1)


def _explains_itself(error: Exception) -> bool:
    """Whether the model or the settings are at fault and the text says how, so that a traceback adds nothing."""
    return isinstance(error, ValueError) or any(
        f"{kind.__module__}.{kind.__name__}" in _EXPLAINED for kind in type(error).__mro__
    )


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _describe(core: Core) -> str:
    """The load that the failed step met, for the log."""
    try:
        return repr(core.stats())
    except Exception as error:
        return f"unknown ({_text(error)})"


if __name__ == "__main__":
    raise SystemExit(main())
