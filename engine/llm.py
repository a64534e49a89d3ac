"""Offline use: `LLM(model).generate(prompts, SamplingParams(...))`, in this process, without a server."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hybridgen.configs.presets import tokenizer_source
from hybridgen.configs.settings import chat_template, engine_settings, load_settings
from hybridgen.engine.build import build_engine
from hybridgen.engine.detokenizer import Detokenizer
from hybridgen.engine.request import (
    FinishReason,
    InvalidRequest,
    Output,
    Request,
    SamplingParams,
    TokenLogprob,
)
from hybridgen.engine.tokenizer import Tokenizer
from hybridgen.engine.weights import resolve_model


class GenerationFailed(Exception):
    """The engine took the request and could not go on with it; the message says why."""


@dataclass(slots=True)
class CompletionOutput:
    """One continuation."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None  # one per token when asked for
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token or string that matched


@dataclass(slots=True)
class RequestOutput:
    """A prompt and its `n` continuations."""

    request_id: str
    prompt: str | None  # None if it came as token ids
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprob | None] | None = None
    num_cached_tokens: int = 0


class LLM:
    """A model, its engine and its tokenizer in this process.

    Args:
        model: folder, hub id or preset; None is the embedded model.
        settings: any other setting of `hybridgen serve` by its field name (docs/settings.md), such as `dtype`,
            `max_model_len`, `max_num_seqs`, `seed`.

    Raises:
        SettingsError: a setting is unknown or out of range.
        WeightError, UnsupportedModel, TokenizerError, NotEnoughMemory: the model cannot be loaded.
    """

    def __init__(self, model: str | None = None, **settings: Any) -> None:
        arguments = settings if model is None else {"model": str(model), **settings}
        resolved = load_settings(arguments)
        self._core = build_engine(engine_settings(resolved))
        source = resolved.tokenizer or tokenizer_source(resolved.model)
        if resolved.tokenizer is None and source == resolved.model:
            folder = resolve_model(source, revision=resolved.revision, download_dir=resolved.download_dir)
            source = str(folder)
        self._tokenizer = Tokenizer(source, revision=resolved.revision, chat_template=chat_template(resolved))
        self._num_requests = 0

    @property
    def max_model_len(self) -> int:
        """Most tokens of a prompt and its continuation together."""
        return self._core.ready.max_model_len

    def get_tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Continue all prompts in one batch; the answers come in the order of the prompts.

        Args:
            prompts: texts, or token ids.
            sampling_params: one for all, or one for each.

        Raises:
            InvalidRequest: one of them cannot be served; none is then left running.
            GenerationFailed: the model gave no token to choose (NaN logits); likewise.
        """
        listed: Sequence[str | Sequence[int]] = [prompts] if isinstance(prompts, str) else prompts
        if sampling_params is None:
            sampling_params = SamplingParams()
        params = (
            [sampling_params] * len(listed)
            if isinstance(sampling_params, SamplingParams)
            else sampling_params
        )
        if len(params) != len(listed):
            raise InvalidRequest(
                f"{len(listed)} prompts, but {len(params)} sampling_params", "sampling_params"
            )
        requests = [self._request(prompt, one) for prompt, one in zip(listed, params, strict=True)]
        answers = {
            request.id: _Answer(request, self._tokenizer, prompt if isinstance(prompt, str) else None)
            for request, prompt in zip(requests, listed, strict=True)
        }
        try:
            for request in requests:
                self._core.add(request)
            while self._core.has_work():
                for output in self._core.step():
                    if output.refused is not None:
                        raise InvalidRequest(output.error or "refused", output.refused)
                    if output.error is not None:
                        raise GenerationFailed(output.error)
                    answer = answers[output.id]
                    if answer.take(output):
                        self._core.abort_choice(output.id, output.index)
        finally:
            self._core.abort(list(answers))
            while self._core.has_work():
                self._core.step()
            self._core.check_integrity()
        return [answer.result for answer in answers.values()]

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """`generate` for one conversation or several, through the model's chat template."""
        several = bool(messages) and not isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = messages if several else [messages]
        texts = [self._tokenizer.apply_chat_template(conversation) for conversation in conversations]
        prompts = [self._tokenizer.encode(text, add_special_tokens=False) for text in texts]
        return self.generate(prompts, sampling_params)

    def _request(self, prompt: str | Sequence[int], params: SamplingParams) -> Request:
        ids = self._tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        self._num_requests += 1
        return Request(id=str(self._num_requests), prompt=ids, params=params)


class _Answer:
    """Collects the outputs of one request as text."""

    def __init__(self, request: Request, tokenizer: Tokenizer, prompt: str | None) -> None:
        params = request.params
        wants_logprobs = params.logprobs is not None
        self.result = RequestOutput(
            request_id=request.id,
            prompt=prompt,
            prompt_token_ids=request.prompt,
            outputs=[
                CompletionOutput(index, logprobs=[] if wants_logprobs else None) for index in range(params.n)
            ],
        )
        self._detokenizers = [Detokenizer(tokenizer, params, request.prompt) for _ in range(params.n)]

    def take(self, output: Output) -> bool:
        """Add what a step brought. True: a stop string has ended this choice, and the engine does not know yet."""
        choice = self.result.outputs[output.index]
        if choice.finish_reason is not None:  # the engine's word on a choice that a stop string had ended
            return False
        if output.prompt_logprobs:
            self.result.prompt_logprobs = list(output.prompt_logprobs)
        self.result.num_cached_tokens = max(self.result.num_cached_tokens, output.num_cached_tokens)
        piece = self._detokenizers[output.index].push(
            output.tokens,
            finished=output.finish_reason is not None,
            stop_token=output.finish_reason == "stop",
        )
        choice.text += piece.text
        choice.token_ids += output.tokens[: piece.num_tokens]
        if choice.logprobs is not None:
            choice.logprobs += output.logprobs[: piece.num_tokens]
        if piece.stop is not None:
            choice.finish_reason, choice.stop_reason = "stop", piece.stop
            return output.finish_reason is None
        choice.finish_reason, choice.stop_reason = output.finish_reason, output.stop_reason
        return False
