"""POST /v1/completions. Parse, hand over, format: no scheduling and no tokens in this file."""

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

import msgspec
from fastapi import APIRouter
from msgspec import UNSET, UnsetType
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from hybridgen.engine.detokenizer import Detokenizer
from hybridgen.engine.request import InvalidRequest, TokenLogprob
from hybridgen.engine.tokenizer import Tokenizer
from hybridgen.server.formatting import (
    alternatives,
    event,
    finite,
    json_response,
    prompt_logprobs,
    token_name,
    usage_so_far,
)
from hybridgen.server.generation import Generation, Piece
from hybridgen.server.inputs import check_prompt, encode_all, fit_max_tokens, sampling_params
from hybridgen.server.openapi import generation_responses
from hybridgen.server.protocol import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    PromptLogprobs,
    StreamOptions,
    Usage,
)
from hybridgen.server.service import Service
from hybridgen.server.streaming import EventStream, until_disconnect


def routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["OpenAI"])

    @router.post("/v1/completions", responses=generation_responses(Completion, Completion))
    async def create_completion(body: CompletionRequest, request: HttpRequest) -> Response:
        """Continue one text or several, each `n` times. Choice `i` belongs to prompt `i // n`."""
        answer = await _parse(service, body, request.state.request_id)
        if body.stream:
            return EventStream(answer.chunks(), keep_alive_s=service.settings.sse_keep_alive_interval)
        return json_response(await until_disconnect(request.receive, answer.whole()))

    return router


async def _parse(service: Service, body: CompletionRequest, request_id: str) -> "_Answer":
    service.check_model(body.model)
    body.check_supported()
    prompts = await _encode_prompts(service, body)
    for prompt in prompts:
        check_prompt(service, prompt, "prompt")

    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if asked == 0 and not body.echo:
        raise InvalidRequest("must be at least 1, or 0 with echo", "max_tokens")
    # The engine always generates a token. With 0, when only the prompt is to be scored, it is thrown away.
    max_tokens = None if asked is None else max(asked, 1)
    for prompt in prompts:
        fit_max_tokens(service, len(prompt), max_tokens, "prompt")
    # The prompt's logprobs are given in two shapes, each with as many alternatives as were asked for in it.
    wanted = [num for num in (body.logprobs if body.echo else None, body.prompt_logprobs) if num is not None]
    params = sampling_params(
        service,
        body,
        max_tokens=max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=-1 if -1 in wanted else max(wanted, default=None),
    )
    name = f"cmpl-{request_id}"
    generation = Generation(service, prompts, params, name, body.priority, discard_tokens=asked == 0)
    return _Answer(service, body, generation, name)


async def _encode_prompts(service: Service, body: CompletionRequest) -> list[list[int]]:
    texts = [prompt for prompt in body.prompt if isinstance(prompt, str)]
    if not texts:
        return [prompt for prompt in body.prompt if not isinstance(prompt, str)]
    return await encode_all(service, texts, add_special_tokens=body.add_special_tokens, param="prompt")


@dataclass(frozen=True, slots=True)
class _Echo:
    """The prompt as the beginning of a choice's text; logprobs and offsets only when they were asked for."""

    text: str = ""
    tokens: Sequence[int] = ()
    logprobs: Sequence[TokenLogprob | None] = ()
    offsets: Sequence[int] = ()


_NO_ECHO = _Echo()


@dataclass(frozen=True, slots=True)
class _Answer:
    """Formats one request's pieces: all as one JSON, or each as a chunk."""

    service: Service
    body: CompletionRequest
    generation: Generation
    id: str
    created: int = field(default_factory=lambda: int(time.time()))

    async def whole(self) -> Completion:
        pieces: list[list[Piece]] = [[] for _ in range(self.generation.num_choices)]
        async with aclosing(self.generation.pieces()) as stream:
            async for piece in stream:
                pieces[piece.choice].append(piece)
        choices = [self._choice(parts, self._echo(index)) for index, parts in enumerate(pieces)]
        if self.body.prompt_logprobs is not None:
            choices = [
                msgspec.structs.replace(choice, prompt_logprobs=self._prompt_logprobs(choice.index))
                for choice in choices
            ]
        return self._completion(choices, usage_so_far(self.generation))

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        options = self.body.stream_options or StreamOptions()
        usage: Usage | UnsetType | None = None if options.include_usage else UNSET
        begun: dict[int, int] = {}  # choice -> characters of its echo, already sent
        async with aclosing(self.generation.pieces()) as stream:
            async for piece in stream:
                echo = self._echo(piece.choice) if piece.choice not in begun else _NO_ECHO
                offset = begun.setdefault(piece.choice, len(echo.text))
                if options.include_usage and options.continuous_usage_stats:
                    usage = usage_so_far(self.generation)
                yield event(self._completion([self._choice([piece], echo, offset)], usage))
        if options.include_usage:
            yield event(self._completion([], usage_so_far(self.generation)))

    def _completion(self, choices: list[CompletionChoice], usage: Usage | UnsetType | None) -> Completion:
        return Completion(
            id=self.id,
            created=self.created,
            model=self.service.model_name,
            system_fingerprint=self.service.system_fingerprint,
            choices=choices,
            usage=usage,
        )

    def _choice(self, pieces: Sequence[Piece], echo: _Echo, offset: int | None = None) -> CompletionChoice:
        """A choice's part that consists of `echo` and then `pieces`, at least one.

        Args:
            offset: characters of the choice's text before that of its first piece; None: those of `echo`.
        """
        begin = len(echo.text) if offset is None else offset
        last = pieces[-1]
        logprobs = None
        if self.body.logprobs is not None:
            positions = [position for piece in pieces for position in piece.logprobs]
            logprobs = _logprobs(
                self.service.tokenizer,
                [*echo.tokens, *(position.token for position in positions)],
                [*echo.logprobs, *positions],
                [*echo.offsets, *(begin + at for piece in pieces for at in piece.text_offsets)],
                self.body.logprobs,
            )
        return CompletionChoice(
            index=last.choice,
            text=echo.text + "".join(piece.text for piece in pieces),
            logprobs=logprobs,
            finish_reason=last.finish_reason,
            stop_reason=last.stop_reason,
        )

    def _echo(self, choice: int) -> _Echo:
        """What the choice's text begins with. The prompt's logprobs come with the first output."""
        if not self.body.echo:
            return _NO_ECHO
        index = choice // self.body.n
        given, tokens = self.body.prompt[index], self.generation.prompts[index]
        # The prompt may hold a stop string; that is no reason to cut it.
        params = msgspec.structs.replace(self.generation.params, stop=())
        detokenized = Detokenizer(self.service.tokenizer, params).push(tokens, finished=True)
        text = given if isinstance(given, str) else detokenized.text
        if self.body.logprobs is None:
            return _Echo(text)
        return _Echo(text, tokens, self.generation.prompt_logprobs[index], detokenized.offsets)

    def _prompt_logprobs(self, choice: int) -> PromptLogprobs:
        positions = self.generation.prompt_logprobs[choice // self.body.n]
        return prompt_logprobs(self.service.tokenizer, positions, self.body.prompt_logprobs or 0)


def _logprobs(
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    positions: Sequence[TokenLogprob | None],
    offsets: Sequence[int],
    num_top: int,
) -> CompletionLogprobs:
    """The four parallel lists. The token itself is always among its alternatives."""
    top_logprobs: list[dict[str, float] | None] = []
    for position in positions:
        if position is None:
            top_logprobs.append(None)
            continue
        top: dict[str, float] = {}
        for token, logprob in ((position.token, position.logprob), *alternatives(position, num_top)):
            top.setdefault(token_name(tokenizer, token), finite(logprob))
        top_logprobs.append(top)
    return CompletionLogprobs(
        tokens=[token_name(tokenizer, token) for token in tokens],
        token_logprobs=[None if position is None else finite(position.logprob) for position in positions],
        top_logprobs=top_logprobs,
        text_offset=list(offsets),
    )
