"""`hybridgen chat`: a conversation in the terminal, over /v1/chat/completions like any other client."""

import contextlib
import json
import sys
from collections.abc import Generator, Iterator
from typing import Any

import httpx
from rich.console import Console

from hybridgen.configs.settings import client_api_key

# Reading has no limit: a long prompt takes as long as it takes before the first token.
_TIMEOUT = httpx.Timeout(10.0, read=None)

_HELP = "/clear forgets the conversation, /exit (or Ctrl-D) leaves, Ctrl-C stops an answer."

Message = dict[str, str]


class ChatError(Exception):
    """The server cannot be reached, or refused the request; the text says why."""


def chat(
    *,
    url: str,
    model: str | None = None,
    system: str | None = None,
    api_key: str | None = None,
    max_tokens: int | None = None,
    temperature: float | None = None,
) -> int:
    """Talk until the user leaves; without a terminal, answer standard input once. Return the exit status."""
    errors = Console(stderr=True, highlight=False)
    key = api_key or client_api_key()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    options: dict[str, object] = {
        name: value
        for name, value in (("max_tokens", max_tokens), ("temperature", temperature))
        if value is not None
    }
    with httpx.Client(base_url=api_root(url), headers=headers, timeout=_TIMEOUT) as client:
        try:
            conversation = _Conversation(client, model or first_model(client), system, options)
            if sys.stdin.isatty():
                _talk(conversation, errors)
            else:
                _answer_once(conversation, _read_input())
        except ChatError as error:
            errors.print(f"hybridgen chat: {error}", markup=False, soft_wrap=True)
            return 1
    return 0


def api_root(url: str) -> str:
    """`url` with the /v1 that it may or may not have."""
    return f"{url.rstrip('/').removesuffix('/v1')}/v1"


def first_model(client: httpx.Client) -> str:
    """The name that the server's answers carry.

    Raises:
        ChatError: it cannot be asked.
    """
    with _explained(client):
        response = client.get("/models")
    if response.status_code != 200:
        raise ChatError(refusal(response))
    return str(response.json()["data"][0]["id"])


def refusal(response: httpx.Response) -> str:
    """What an answer other than 200 says, its body having been read."""
    try:
        return f"{response.status_code}: {response.json()['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"{response.status_code}: {response.text[:500] or response.reason_phrase}"


def event_data(line: str) -> dict[str, Any] | None:
    """The JSON of one line of an event stream; None for blank lines, comments and the end marker."""
    if not line.startswith("data:") or line == "data: [DONE]":
        return None
    data: dict[str, Any] = json.loads(line.removeprefix("data:"))
    return data


class _Conversation:
    def __init__(
        self, client: httpx.Client, model: str, system: str | None, options: dict[str, object]
    ) -> None:
        self.model = model
        self._client = client
        self._options = options
        self._opening: list[Message] = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._opening)

    def clear(self) -> None:
        self._messages = list(self._opening)

    def answer(self, text: str) -> Generator[str, None, None]:
        """Pieces of the answer to `text`. Both are remembered, the answer as far as it had come when closed.

        Raises:
            ChatError: the server refuses or fails; then neither is remembered.
        """
        question = {"role": "user", "content": text}
        body = {
            "model": self.model,
            "messages": [*self._messages, question],
            "stream": True,
            **self._options,
        }
        pieces: list[str] = []
        try:
            # Leaving the block closes the connection, by which the server knows to stop generating.
            with (
                _explained(self._client),
                self._client.stream("POST", "/chat/completions", json=body) as response,
            ):
                if response.status_code != 200:
                    response.read()
                    raise ChatError(refusal(response))
                for line in response.iter_lines():
                    event = event_data(line)
                    if event is None:
                        continue
                    if "error" in event:
                        raise ChatError(str(event["error"]["message"]))
                    for choice in event["choices"]:
                        if piece := choice["delta"].get("content"):
                            pieces.append(piece)
                            yield piece
        except ChatError:
            pieces.clear()
            raise
        finally:
            if pieces:
                self._messages += [question, {"role": "assistant", "content": "".join(pieces)}]


def _talk(conversation: _Conversation, errors: Console) -> None:
    with contextlib.suppress(ImportError):  # line editing and history, where Python was built with it
        import readline  # noqa: F401
    console = Console(highlight=False)
    console.print(f"[bold]{conversation.model}[/bold]  [dim]{_HELP}[/dim]")
    while True:
        try:
            # Not console.input: only input() itself tells readline how wide the prompt is.
            text = input("> ").strip()
        except EOFError:
            console.print()
            return
        except UnicodeDecodeError as error:
            console.print(f"[red]not UTF-8: {error.reason}[/red]")
            continue
        except KeyboardInterrupt:
            console.print(f"\n[dim]{_HELP}[/dim]")
            continue
        match text:
            case "":
                pass
            case "/exit" | "/quit":
                return
            case "/clear":
                conversation.clear()
                console.print("[dim]forgotten[/dim]")
            case "/help":
                console.print(f"[dim]{_HELP}[/dim]")
            case _ if text.startswith("/"):
                console.print(f"[dim]unknown command. {_HELP}[/dim]")
            case _:
                _print_answer(conversation, text, console, errors)


def _print_answer(conversation: _Conversation, text: str, console: Console, errors: Console) -> None:
    pieces = conversation.answer(text)
    try:
        for piece in pieces:
            console.print(piece, end="", markup=False, soft_wrap=True)
        console.print()
    except KeyboardInterrupt:
        console.print(" [dim](stopped)[/dim]")
    except ChatError as error:
        errors.print(str(error), style="red", markup=False, soft_wrap=True)
    finally:
        pieces.close()


def _read_input() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise ChatError(f"standard input is not UTF-8: {error.reason} at byte {error.start}") from None


def _answer_once(conversation: _Conversation, text: str) -> None:
    if not text.strip():
        raise ChatError("nothing on standard input")
    for piece in conversation.answer(text.rstrip("\n")):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


@contextlib.contextmanager
def _explained(client: httpx.Client) -> Iterator[None]:
    try:
        yield
    except httpx.ConnectError:
        raise ChatError(f"nothing answers at {client.base_url}; start it with `hybridgen serve`") from None
    except httpx.HTTPError as error:
        raise ChatError(f"the connection failed: {error or type(error).__name__}") from error
