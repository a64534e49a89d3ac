"""POST /v1/chat/completions. Parse, hand over, format: no scheduling and no tokens in this file."""

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from fastapi import APIRouter
from msgspec import UNSET, UnsetType
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from hybridgen.engine.request import InvalidRequest, TokenLogprob
from hybridgen.engine.tokenizer import Tokenizer
from hybridgen.server.formatting import (
    alternatives,
    event,
    finite,
    json_response,
    prompt_logprobs,
    usage_so_far,
)
from hybridgen.server.generation import Generation, Piece
from hybridgen.server.inputs import check_prompt, encode_chat, fit_max_tokens, sampling_params
from hybridgen.server.openapi import generation_responses
from hybridgen.server.protocol import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatTokenLogprob,
    PromptLogprobs,
    StreamOptions,
    TopLogprob,
    Usage,
)
from hybridgen.server.service import Service
from hybridgen.server.streaming import EventStream, until_disconnect


def routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["OpenAI"])

    @router.post("/v1/chat/completions", responses=generation_responses(ChatCompletion, ChatCompletionChunk))
    async def create_chat_completion(body: ChatCompletionRequest, request: HttpRequest) -> Response:
        """Answer a conversation, `n` times."""
        answer = await _parse(service, body, request.state.request_id)
        if body.stream:
            return EventStream(answer.chunks(), keep_alive_s=service.settings.sse_keep_alive_interval)
        return json_response(await until_disconnect(request.receive, answer.whole()))

    return router


async def _parse(service: Service, body: ChatCompletionRequest, request_id: str) -> "_Answer":
    service.check_model(body.model)
    body.check_supported()
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs: true", "top_logprobs")
    prompt = await encode_chat(
        service,
        body.messages,
        add_special_tokens=body.add_special_tokens,
        # Whoever continues the last message cannot also begin another: the default gives way.
        add_generation_prompt=body.add_generation_prompt and not _continues_by_default(body),
        continue_final_message=body.continue_final_message,
        chat_template_kwargs=body.chat_template_kwargs,
        param="messages",
    )
    check_prompt(service, prompt, "messages")
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    params = sampling_params(
        service,
        body,
        max_tokens=fit_max_tokens(service, len(prompt), asked, "messages"),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
    )
    name = f"chatcmpl-{request_id}"
    return _Answer(service, body, Generation(service, [prompt], params, name, body.priority), name)


def _continues_by_default(body: ChatCompletionRequest) -> bool:
    return body.continue_final_message and "add_generation_prompt" not in body.model_fields_set


@dataclass(frozen=True, slots=True)
class _Answer:
    """Formats one request's pieces: all as one JSON, or each as a chunk."""

    service: Service
    body: ChatCompletionRequest
    generation: Generation
    id: str
    created: int = field(default_factory=lambda: int(time.time()))

    async def whole(self) -> ChatCompletion:
        pieces: list[list[Piece]] = [[] for _ in range(self.generation.num_choices)]
        async with aclosing(self.generation.pieces()) as stream:
            async for piece in stream:
                pieces[piece.choice].append(piece)
        return ChatCompletion(
            id=self.id,
            created=self.created,
            model=self.service.model_name,
            system_fingerprint=self.service.system_fingerprint,
            choices=[self._choice(parts) for parts in pieces],
            usage=usage_so_far(self.generation),
            prompt_logprobs=self._prompt_logprobs(),
        )

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        options = self.body.stream_options or StreamOptions()
        usage: Usage | UnsetType | None = None if options.include_usage else UNSET
        has_begun = False
        async with aclosing(self.generation.pieces()) as stream:
            async for piece in stream:
                if options.include_usage and options.continuous_usage_stats:
                    usage = usage_so_far(self.generation)
                if not has_begun:
                    has_begun = True
                    delta = ChatDelta(role="assistant", content="")
                    for index in range(self.generation.num_choices):
                        yield event(self._chunk([ChatChunkChoice(index=index, delta=delta)], usage))
                yield event(self._chunk([self._chunk_choice(piece)], usage))
        if options.include_usage:
            yield event(self._chunk([], usage_so_far(self.generation)))

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | UnsetType | None) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=self.id,
            created=self.created,
            model=self.service.model_name,
            system_fingerprint=self.service.system_fingerprint,
            choices=choices,
            usage=usage,
        )

    def _chunk_choice(self, piece: Piece) -> ChatChunkChoice:
        has_finished = piece.finish_reason is not None
        return ChatChunkChoice(
            index=piece.choice,
            delta=ChatDelta() if has_finished and not piece.text else ChatDelta(content=piece.text),
            logprobs=self._logprobs([piece]),
            finish_reason=piece.finish_reason,
            stop_reason=piece.stop_reason if has_finished else UNSET,
        )

    def _choice(self, pieces: Sequence[Piece]) -> ChatChoice:
        last = pieces[-1]
        return ChatChoice(
            index=last.choice,
            message=ChatMessage(content="".join(piece.text for piece in pieces)),
            logprobs=self._logprobs(pieces),
            finish_reason=last.finish_reason,
            stop_reason=last.stop_reason,
        )

    def _logprobs(self, pieces: Sequence[Piece]) -> ChatLogprobs | None:
        if not self.body.logprobs:
            return None
        tokenizer, num_top = self.service.tokenizer, self.body.top_logprobs or 0
        positions = [position for piece in pieces for position in piece.logprobs]
        return ChatLogprobs(content=[_token_logprob(tokenizer, position, num_top) for position in positions])

    def _prompt_logprobs(self) -> PromptLogprobs | UnsetType:
        wanted = self.body.prompt_logprobs
        if wanted is None:
            return UNSET
        return prompt_logprobs(self.service.tokenizer, self.generation.prompt_logprobs[0], wanted)


def _token_logprob(tokenizer: Tokenizer, position: TokenLogprob, num_top: int) -> ChatTokenLogprob:
    text, raw = tokenizer.token_text(position.token)
    top: list[TopLogprob] = []
    for token, logprob in alternatives(position, num_top):
        top_text, top_raw = tokenizer.token_text(token)
        top.append(TopLogprob(token=top_text, logprob=finite(logprob), bytes=list(top_raw)))
    return ChatTokenLogprob(token=text, logprob=finite(position.logprob), bytes=list(raw), top_logprobs=top)
