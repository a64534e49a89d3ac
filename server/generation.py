"""From token ids to text: runs the engine requests of one HTTP request, turns outputs into pieces of choices.

Knows neither JSON nor HTTP, and of the engine only `generate` and `abort_choice`.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from hybridgen.engine.detokenizer import Detokenizer
from hybridgen.engine.request import FinishReason, Output, Request, SamplingParams, TokenLogprob
from hybridgen.server.errors import ApiError
from hybridgen.server.metrics import Metrics
from hybridgen.server.service import Service


@dataclass(frozen=True, slots=True)
class Piece:
    """What one engine output added to one choice."""

    choice: int  # of the HTTP request: prompt * n + the choice of that prompt
    text: str  # may be empty while a character or a stop string is incomplete
    logprobs: tuple[TokenLogprob, ...]  # one per token, when asked for
    text_offsets: tuple[int, ...]  # where each of those tokens begins, in characters of the choice's text
    finish_reason: FinishReason | None
    stop_reason: int | str | None


@dataclass(slots=True)
class _Choice:
    detokenizer: Detokenizer
    num_tokens: int = 0
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    has_finished: bool = False


@dataclass(slots=True)
class Generation:
    """The prompts of one HTTP request on their way through the engine, all at the same time.

    Args:
        prompts: token ids, each at least one.
        name: begins the engine's request ids, so that its log can be matched with the client's.
        discard_tokens: give the finish and no text, tokens or logprobs: the prompts were all that was wanted.
    """

    service: Service
    prompts: Sequence[list[int]]
    params: SamplingParams
    name: str
    priority: int = 0
    discard_tokens: bool = False
    num_completion_tokens: int = 0  # so far, all choices
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache, so far
    # Per prompt, filled with its first output when asked for: one per token, None for the first.
    prompt_logprobs: dict[int, tuple[TokenLogprob | None, ...]] = field(default_factory=dict)
    _choices: list[_Choice] = field(default_factory=list)
    _arrived_s: float = field(default_factory=time.perf_counter)

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.params.n

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Pieces as they come; each choice's last, and no other, has a finish_reason. Closing this aborts.

        Raises:
            QueueFull: too many sequences are in flight; raised before the engine hears of the request.
            ApiError: the engine refused the request, or could not go on with it.
            EngineDead: the engine is gone.
        """
        tokenizer, params = self.service.tokenizer, self.params
        with self.service.admission.admit(self.num_choices):
            # The names may repeat, since clients choose them; the engine's ids must not.
            name = f"{self.name}-{secrets.token_hex(6)}"
            requests = [
                Request(id=f"{name}-{index}", prompt=prompt, params=params, priority=self.priority)
                for index, prompt in enumerate(self.prompts)
            ]
            self._choices = [
                _Choice(Detokenizer(tokenizer, params, prompt))
                for prompt in self.prompts
                for _ in range(params.n)
            ]
            left_as: FinishReason = "abort"
            try:
                async with aclosing(self._outputs(requests)) as outputs:
                    async for index, output in outputs:
                        piece = self._advance(requests[index].id, index, output)
                        if piece is not None:
                            yield piece
            except Exception:
                left_as = "error"
                raise
            finally:
                for choice in self._choices:
                    if not choice.has_finished:
                        self.service.metrics.count_finished(left_as)

    def _outputs(self, requests: Sequence[Request]) -> AsyncGenerator[tuple[int, Output], None]:
        streams = [self.service.engine.generate(request) for request in requests]
        return _numbered(streams[0]) if len(streams) == 1 else _merged(streams)

    def _advance(self, request_id: str, prompt_index: int, output: Output) -> Piece | None:
        """Count, detokenize, look for stop strings. None when there is nothing to say."""
        index = prompt_index * self.params.n + output.index
        choice = self._choices[index]
        if output.error is not None:
            if output.refused is not None:
                raise ApiError(400, output.error, param=output.refused, code="refused")
            raise ApiError(500, output.error, type="server_error", code="engine_error")
        if choice.has_finished:
            return None  # a stop string matched while this was on its way
        if output.index == 0 and choice.num_tokens == 0:
            # The other choices find the prompt of the first in the cache, which is no saving of the client's.
            self.num_cached_tokens += output.num_cached_tokens
        if output.prompt_logprobs:
            self.prompt_logprobs[prompt_index] = output.prompt_logprobs
        self._time(choice, len(output.tokens))

        finish_reason: FinishReason | None = output.finish_reason
        stop_reason: int | str | None = output.stop_reason
        if self.discard_tokens:
            if finish_reason is None:
                return None
            self._finish(choice, "length")
            return Piece(index, "", (), (), "length", None)
        # The engine says "stop" for a token only: it is that token which ended the choice.
        text = choice.detokenizer.push(
            output.tokens, finished=finish_reason is not None, stop_token=finish_reason == "stop"
        )
        self.num_completion_tokens += text.num_tokens
        logprobs = output.logprobs[: text.num_tokens]
        if text.stop is not None:
            if finish_reason is None:
                self.service.engine.abort_choice(request_id, output.index)
            finish_reason, stop_reason = "stop", text.stop
        if finish_reason is not None:
            self._finish(choice, finish_reason)
        elif not text.text and not logprobs:
            return None
        return Piece(index, text.text, logprobs, text.offsets, finish_reason, stop_reason)

    def _time(self, choice: _Choice, num_tokens: int) -> None:
        if num_tokens == 0:
            return
        metrics, now_s = self.service.metrics, time.perf_counter()
        if choice.num_tokens == 0:
            choice.first_token_s = now_s
            metrics.time_to_first_token.observe(now_s - self._arrived_s)
        else:
            metrics.inter_token_latency.observe(now_s - choice.last_token_s)
        choice.last_token_s = now_s
        choice.num_tokens += num_tokens

    def _finish(self, choice: _Choice, reason: FinishReason) -> None:
        choice.has_finished = True
        metrics: Metrics = self.service.metrics
        metrics.count_finished(reason)
        metrics.e2e_latency.observe(time.perf_counter() - self._arrived_s)
        if choice.num_tokens > 1:
            decode_s = choice.last_token_s - choice.first_token_s
            metrics.time_per_output_token.observe(decode_s / (choice.num_tokens - 1))


async def _numbered(stream: AsyncGenerator[Output, None]) -> AsyncGenerator[tuple[int, Output], None]:
    async with aclosing(stream):
        async for output in stream:
            yield 0, output


async def _merged(
    streams: Sequence[AsyncGenerator[Output, None]],
) -> AsyncGenerator[tuple[int, Output], None]:
    """The outputs of all streams in the order of their arrival. The first error ends them all."""
    queue: asyncio.Queue[tuple[int, Output] | Exception | None] = asyncio.Queue()

    async def pump(index: int, stream: AsyncGenerator[Output, None]) -> None:
        try:
            async with aclosing(stream):
                async for output in stream:
                    queue.put_nowait((index, output))
        except Exception as exc:
            queue.put_nowait(exc)
        else:
            queue.put_nowait(None)

    tasks = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        num_open = len(streams)
        while num_open:
            item = await queue.get()
            if item is None:
                num_open -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
