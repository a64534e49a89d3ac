"""An engine that says what a test tells it to, and a tokenizer whose tokens are single bytes."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hybridgen.engine.request import EngineStats, Output, Ready, Request, TokenLogprob

EOS = 256
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

# An output, a pause in seconds, or an exception to raise.
Step = Output | float | Exception
Script = Callable[[Request], Iterable[Step]]


def save_byte_tokenizer(folder: Path) -> None:
    """Token id = byte value, 256 is end-of-text: every character beyond ASCII is split over tokens."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    by_byte = {bytes_of(letter): letter for letter in alphabet}
    vocab = {by_byte[byte]: byte for byte in range(256)}
    raw = RawTokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def bytes_of(letter: str) -> int:
    """The byte that a letter of the byte-level alphabet stands for."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    code = ord(letter)
    return code if code < 256 else others[code - 256]


def say(text: str, *, index: int = 0, finish: str | None = "stop", step: int = 1) -> list[Output]:
    """The outputs of one choice, `step` bytes each; at the end `finish`: with "stop" an end-of-text token."""
    tokens = list(text.encode()) + ([EOS] if finish == "stop" else [])
    parts = [tuple(tokens[at : at + step]) for at in range(0, len(tokens), step)] or [()]
    outputs = [Output(id="", index=index, tokens=part) for part in parts]
    outputs[-1] = msgspec.structs.replace(outputs[-1], finish_reason=finish)
    return outputs


def logprob(
    token: int, value: float = -0.5, *, rank: int = 1, top: tuple[tuple[int, float], ...] = ()
) -> TokenLogprob:
    return TokenLogprob(token=token, logprob=value, rank=rank, top=top)


def with_logprobs(outputs: Iterable[Output], num_top: int) -> list[Output]:
    """Give each token the logprob -0.5 and as alternatives itself, then `z`, then `y`."""
    given = []
    for output in outputs:
        scores = tuple(
            logprob(token, top=((token, -0.5), (ord("z"), -1.5), (ord("y"), -2.5))[:num_top])
            for token in output.tokens
        )
        given.append(msgspec.structs.replace(output, logprobs=scores))
    return given


def forever(_: Request) -> Iterable[Step]:
    while True:
        yield Output(id="", tokens=(ord("a"),))
        yield 0.001


class FakeEngine:
    """The interface of EngineClient. `script` gives each request's outputs; ids are filled in."""

    def __init__(self, script: Script = lambda request: say("Hello"), *, max_model_len: int = 256) -> None:
        self.ready = Ready(
            max_model_len=max_model_len,
            vocab_size=257,
            page_size=16,
            num_pages=100,
            dtype="float32",
            num_parameters=1,
            load_seconds=0.1,
        )
        self.stats = EngineStats()
        self.failure: str | None = None
        self.script = script
        self.requests: list[Request] = []
        self.aborted_choices: list[tuple[str, int]] = []
        self.num_open = 0
        self.num_aborted = 0  # generators closed before their end

    async def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        self.requests.append(request)
        self.num_open += 1
        alive = set(range(request.params.n))
        try:
            for step in self.script(request):
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, float):
                    await asyncio.sleep(step)
                    continue
                await asyncio.sleep(0)
                alive -= {index for id, index in self.aborted_choices if id == request.id}
                if step.index not in alive:
                    continue
                if step.finish_reason is not None:
                    alive.discard(step.index)
                yield msgspec.structs.replace(step, id=request.id)
                if not alive:
                    break
        finally:
            self.num_open -= 1
            self.num_aborted += bool(alive)

    def abort_choice(self, id: str, index: int) -> None:
        self.aborted_choices.append((id, index))

    async def explain(self, page: int | None = None) -> tuple[str, ...]:
        return ("all pages",) if page is None else (f"page {page}", "  k: dram0")


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Wait for what another task or process does; there is nothing to await in the thing itself."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def events(body: bytes) -> list[Any]:
    """The decoded events of a stream that ended as it should, comments left out."""
    assert body.endswith(b"data: [DONE]\n\n"), body[-200:]
    blocks = body.removesuffix(b"data: [DONE]\n\n").split(b"\n\n")
    assert blocks.pop() == b""
    data = [block for block in blocks if not block.startswith(b":")]
    assert all(block.startswith(b"data: ") and b"\n" not in block for block in data)
    return [msgspec.json.decode(block.removeprefix(b"data: ")) for block in data]
