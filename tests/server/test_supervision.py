"""`hybridgen serve` as a process: start, drain, death of the engine, and what clients see meanwhile.

The engine is a stub without a model, so that tokens come at a known pace; everything else is real.
"""

import json
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.server.processes import Server, until


class Stream(threading.Thread):
    """A client that reads a completion of `max_tokens` tokens as it comes."""

    def __init__(self, server: Server, max_tokens: int) -> None:
        super().__init__(daemon=True)
        self.events: list[dict[str, Any]] = []
        self.done = False
        self._server = server
        self._max_tokens = max_tokens
        self._begun = threading.Event()
        self.start()
        assert self._begun.wait(10)

    def run(self) -> None:
        body = {"model": "stub", "prompt": [40], "max_tokens": self._max_tokens, "stream": True}
        with httpx.stream("POST", f"{self._server.url}/v1/completions", json=body, timeout=30) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    self.events.append(json.loads(line.removeprefix("data: ")))
                self.done |= line == "data: [DONE]"
                self._begun.set()

    def finish_reason(self) -> str | None:
        """Why the stream ended, once it has."""
        self.join(15)
        assert not self.is_alive()
        reasons = [choice["finish_reason"] for event in self.events for choice in event.get("choices", [])]
        return next((reason for reason in reasons if reason), None)


StartServer = Callable[..., Server]


@pytest.fixture
def start(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StartServer]:
    servers: list[Server] = []
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    def start_server(*arguments: str, model: str = str(model_folder), load_s: float = 0.0) -> Server:
        server = Server(model, "--served-model-name", "stub", "--port", "0", *arguments, load_s=load_s)
        servers.append(server)
        return server

    yield start_server
    for server in servers:
        server.process.kill()
        server.process.communicate()
    until(lambda: not list(tmp_path.glob("hybridgen-*")))  # sockets, removed by whoever ended last


def test_one_line_says_what_is_served_and_where_and_sigterm_ends_an_idle_server(start: StartServer) -> None:
    server = start()
    assert server.await_ready() == f"HybridGen serves stub at {server.url}\n"
    assert server.status("/health") == server.status("/ready") == 200
    assert server.complete(4).json()["usage"]["completion_tokens"] == 4
    engine = server.engine()
    server.process.terminate()
    assert server.end()[0] == 0
    assert not engine.is_running()


def test_a_signal_lets_running_requests_end_and_refuses_new_ones(start: StartServer) -> None:
    server = start()
    server.await_ready()
    stream = Stream(server, max_tokens=500)  # 2.5 s
    server.engine().terminate()  # as a service manager does: it signals every process of the service
    server.process.terminate()
    until(lambda: server.status("/ready") == 503)
    assert server.status("/health") == 200
    refusal = server.complete()
    assert refusal.status_code == 503
    assert int(refusal.headers["retry-after"]) > 0
    assert refusal.headers["connection"] == "close"
    assert not any(event.get("choices", [{}])[0].get("finish_reason") for event in stream.events)
    assert stream.finish_reason() == "length"
    assert stream.done
    assert server.end()[0] == 0


def test_requests_that_outlast_the_drain_are_aborted(start: StartServer) -> None:
    server = start("--drain-timeout", "0.3")
    server.await_ready()
    stream = Stream(server, max_tokens=4000)
    begin = time.monotonic()
    server.process.terminate()
    assert stream.finish_reason() == "abort"
    assert stream.done
    assert server.end()[0] == 0
    assert time.monotonic() - begin > 0.3


def test_a_second_signal_aborts_at_once(start: StartServer) -> None:
    server = start("--drain-timeout", "3600")
    server.await_ready()
    stream = Stream(server, max_tokens=4000)
    for process in (server.process, server.engine()):  # Ctrl-C goes to both
        process.send_signal(signal.SIGINT)
    until(lambda: server.status("/ready") == 503)
    assert stream.is_alive()
    server.process.send_signal(signal.SIGINT)
    assert stream.finish_reason() == "abort"
    assert server.end()[0] == 0


def test_a_body_that_never_comes_whole_does_not_hold_up_the_drain(start: StartServer) -> None:
    server = start("--drain-timeout", "3600")
    server.await_ready()
    with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b'Content-Length: 1000\r\n\r\n{"prompt"'
        )
        time.sleep(0.3)  # nothing tells when the server has read it
        server.process.terminate()
        assert server.end()[0] == 0


def test_a_dead_engine_ends_streams_with_an_error_then_the_server(start: StartServer) -> None:
    server = start()
    server.await_ready()
    stream = Stream(server, max_tokens=4000)
    server.engine().kill()
    until(lambda: server.status("/health") == 503)
    stream.join(5)
    assert "SIGKILL" in stream.events[-1]["error"]["message"]
    status, log = server.end()
    assert status == 1
    assert "the engine has died: the engine process was killed by SIGKILL" in log


def test_an_engine_that_dies_while_draining_is_a_failure(start: StartServer) -> None:
    server = start()
    server.await_ready()
    stream = Stream(server, max_tokens=4000)
    server.process.terminate()
    until(lambda: server.status("/ready") == 503)
    server.engine().kill()
    stream.join(5)
    assert "error" in stream.events[-1]
    assert server.end()[0] == 1


def test_a_port_in_use_is_one_line_before_the_model_loads(start: StartServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = start("--port", str(port), load_s=3600)
        status, log = server.end()
    assert status == 1
    assert log == f"hybridgen serve: error: cannot listen on 127.0.0.1 port {port}: Address already in use\n"


def test_a_model_that_cannot_be_loaded_is_told_and_ends_the_server(start: StartServer) -> None:
    status, log = start(model="missing").end()
    assert status == 1
    last = log.splitlines()[-1]
    assert last.startswith("hybridgen serve: error: ")
    assert "missing" in last


def test_a_reason_that_explains_itself_comes_without_a_traceback(start: StartServer) -> None:
    status, log = start(model="too-large").end()
    assert status == 1
    assert log == "hybridgen serve: error: the pages of a context need 9 GiB, there are 4\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"temperature": "hot"}', "temperature"),
        ('{"top_p": 7}', "top_p must be greater than 0 and at most 1, got 7"),
        ("{", "truncated"),
    ],
)
def test_wrong_sampling_defaults_are_one_line_before_the_model_loads(
    start: StartServer, tmp_path: Path, content: str, reason: str
) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text(content)
    status, log = start(model=str(tmp_path), load_s=3600).end()
    assert status == 1
    assert log.startswith(f"hybridgen serve: error: {path}: ")
    assert reason in log
    assert log.count("\n") == 1


@pytest.mark.parametrize(("level", "is_logged"), [("info", True), ("warning", False)])
def test_the_http_servers_log_has_a_level_of_its_own(start: StartServer, level: str, is_logged: bool) -> None:
    server = start("--uvicorn-log-level", level)
    server.await_ready()
    server.status("/health")
    server.process.terminate()
    _, log = server.end()
    assert ("GET /health" in log) == is_logged
    assert ("Application startup complete" in log) == is_logged


def test_a_certificate_makes_it_https(start: StartServer, tmp_path: Path) -> None:
    if (openssl := shutil.which("openssl")) is None:
        pytest.skip("there is no openssl to make a certificate with")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    server = start("--ssl-certfile", str(certificate), "--ssl-keyfile", str(key))
    server.await_ready()
    assert server.url.startswith("https://127.0.0.1:")
    trusted = ssl.create_default_context(cafile=str(certificate))
    assert httpx.get(f"{server.url}/health", verify=trusted).status_code == 200
    wrong = start("--ssl-certfile", str(key), load_s=3600)
    status, log = wrong.end()
    assert status == 2
    assert log.startswith(f"hybridgen serve: error: --ssl-certfile {key} with its own key: ")


def test_a_signal_while_the_model_loads_ends_the_server(start: StartServer) -> None:
    server = start(load_s=3600)
    until(lambda: bool(psutil.Process(server.process.pid).children()))
    engine = server.engine()
    server.process.terminate()
    assert server.end()[0] == 0
    assert not engine.is_running()
