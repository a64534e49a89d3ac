"""GET /v1/models and the tokenizer's routes: what a client asks of the model before it sends a prompt."""

from fastapi import APIRouter
from starlette.responses import Response

from hybridgen.engine.request import InvalidRequest
from hybridgen.server.formatting import json_response
from hybridgen.server.inputs import encode_all, encode_chat, on_thread
from hybridgen.server.openapi import answers
from hybridgen.server.protocol import (
    DetokenizeRequest,
    DetokenizeResponse,
    ModelCard,
    ModelList,
    TokenizeRequest,
    TokenizeResponse,
)
from hybridgen.server.service import Service


def routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["model"])

    @router.get("/v1/models", responses=answers(ModelList, 401, 503))
    async def list_models() -> Response:
        """Every name that the model is served under."""
        names = service.settings.served_model_name
        return json_response(ModelList(data=[_card(service, name) for name in names]))

    # Names of models contain slashes.
    @router.get("/v1/models/{model:path}", responses=answers(ModelCard, 401, 404, 503))
    async def retrieve_model(model: str) -> Response:
        service.check_model(model)
        return json_response(_card(service, model))

    @router.post("/tokenize", responses=answers(TokenizeResponse, 400, 401, 404, 413, 415, 503))
    async def tokenize(body: TokenizeRequest) -> Response:
        """The token ids of a text, or of a chat as the template writes it."""
        service.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequest("send either prompt or messages", "prompt")
        body.log_unknown_fields()
        if body.messages is not None:
            tokens = await encode_chat(
                service,
                body.messages,
                add_special_tokens=body.add_special_tokens or False,
                add_generation_prompt=body.add_generation_prompt,
                continue_final_message=body.continue_final_message,
                chat_template_kwargs=body.chat_template_kwargs,
                param=None,
            )
        else:
            assert body.prompt is not None
            with_special = body.add_special_tokens is None or body.add_special_tokens
            [tokens] = await encode_all(service, [body.prompt], add_special_tokens=with_special, param=None)
        texts: list[str] | None = None
        if body.return_token_strs:
            texts = await on_thread(
                len(tokens), lambda: [service.tokenizer.token_text(token)[0] for token in tokens]
            )
        return json_response(
            TokenizeResponse(
                count=len(tokens),
                max_model_len=service.engine.ready.max_model_len,
                tokens=tokens,
                token_strs=texts,
            )
        )

    @router.post("/detokenize", responses=answers(DetokenizeResponse, 400, 401, 404, 413, 415, 503))
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of token ids, special tokens included."""
        service.check_model(body.model)
        vocab_size = service.engine.ready.vocab_size
        if body.tokens and max(body.tokens) >= vocab_size:
            raise InvalidRequest(
                f"token id {max(body.tokens)} is not in the vocabulary of {vocab_size}", "tokens"
            )
        body.log_unknown_fields()
        text = await on_thread(len(body.tokens), lambda: service.tokenizer.decode(body.tokens))
        return json_response(DetokenizeResponse(prompt=text))

    return router


def _card(service: Service, name: str) -> ModelCard:
    return ModelCard(
        id=name,
        created=service.created,
        root=service.settings.model,
        max_model_len=service.engine.ready.max_model_len,
    )
