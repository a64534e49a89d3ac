"""Models, tokenizer, health, version, OpenAPI: everything that is not a completion."""

from pathlib import Path

import pytest

import hybridgen
from hybridgen.server.defaults import DefaultsError
from hybridgen.server.lifecycle import Lifecycle, LifecycleState
from tests.server.conftest import MakeApp, MakeClient
from tests.server.fakes import FakeEngine, say, with_logprobs


async def test_every_served_name_is_listed(make_client: MakeClient, model_folder: Path) -> None:
    reply = await make_client().get("/v1/models")
    body = reply.json()
    assert body["object"] == "list"
    assert [card["id"] for card in body["data"]] == ["tiny", "org/alias"]
    card = body["data"][0]
    assert card.pop("created") > 1_700_000_000
    assert card == {
        "id": "tiny",
        "object": "model",
        "owned_by": "hybridgen",
        "root": str(model_folder),
        "parent": None,
        "max_model_len": 256,
        "permission": [],
    }


async def test_a_model_is_found_by_a_name_with_a_slash(make_client: MakeClient) -> None:
    client = make_client()
    assert (await client.get("/v1/models/org/alias")).json()["id"] == "org/alias"
    assert (await client.get("/v1/models/nope")).json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("state", "failure", "health", "ready"),
    [
        ("starting", None, 503, 503),
        ("ready", None, 200, 200),
        ("draining", None, 200, 503),
        ("failed", None, 503, 503),
        ("ready", "killed", 503, 503),
        ("draining", "killed", 503, 503),
    ],
)
async def test_health_says_restart_me_and_ready_says_send_requests(
    make_client: MakeClient,
    lifecycle: Lifecycle,
    state: LifecycleState,
    failure: str | None,
    health: int,
    ready: int,
) -> None:
    engine = FakeEngine()
    client = make_client(engine)
    lifecycle.state, engine.failure = state, failure
    assert (await client.get("/health")).status_code == health
    assert (await client.get("/ping")).status_code == health
    assert (await client.post("/ping")).status_code == health
    assert (await client.head("/health")).status_code == health
    assert (await client.head("/ping")).status_code == health
    assert (await client.head("/ready")).status_code == ready
    assert (await client.get("/ready")).status_code == ready
    assert (await client.get("/metrics")).status_code == 200


async def test_the_version_is_the_packages(make_client: MakeClient) -> None:
    assert (await make_client().get("/version")).json() == {"version": hybridgen.__version__}


async def test_tokenize_and_detokenize_undo_each_other(make_client: MakeClient) -> None:
    client = make_client()
    reply = await client.post("/tokenize", json={"prompt": "aé", "return_token_strs": True})
    body = reply.json()
    assert (body["count"], body["max_model_len"], body["tokens"]) == (3, 256, [97, 0xC3, 0xA9])
    assert len(body["token_strs"]) == 3
    assert body["token_strs"][0] == "a"
    reply = await client.post("/detokenize", json={"tokens": body["tokens"]})
    assert reply.json() == {"prompt": "aé"}
    assert (await client.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}


async def test_a_chat_is_tokenized_by_the_template(make_client: MakeClient) -> None:
    reply = await make_client().post("/tokenize", json={"messages": [{"role": "user", "content": "Hi"}]})
    assert bytes(reply.json()["tokens"]) == b"<user>Hi\n<assistant>"
    assert reply.json()["token_strs"] is None


@pytest.mark.parametrize(
    ("url", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "Hi"}]}, "prompt"),
        ("/detokenize", {"tokens": [257]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {}, "tokens"),
        ("/tokenize", {"prompt": "x", "model": "nope"}, "model"),
    ],
)
async def test_bad_tokenizer_requests_name_their_field(
    make_client: MakeClient, url: str, body: dict[str, object], param: str
) -> None:
    reply = await make_client().post(url, json=body)
    assert reply.status_code in (400, 404)
    assert reply.json()["error"]["param"] == param


async def test_the_docs_page_and_the_schema_are_there(make_client: MakeClient) -> None:
    client = make_client()
    assert (await client.get("/docs")).headers["content-type"].startswith("text/html")
    page = (await client.get("/openapi.json")).json()
    assert "422" not in page["paths"]["/v1/completions"]["post"]["responses"]
    assert {"400", "401", "404", "413", "415", "429", "503"} <= set(
        page["paths"]["/v1/chat/completions"]["post"]["responses"]
    )


async def test_answers_have_the_fields_that_the_schema_promises(
    make_app: MakeApp, make_client: MakeClient
) -> None:
    page = make_app(FakeEngine()).openapi()
    client = make_client(FakeEngine(lambda _: with_logprobs(say("hé"), 1)))
    messages = [{"role": "user", "content": "Hi"}]
    for url, body in (
        ("/v1/completions", {"prompt": "x", "logprobs": 1}),
        ("/v1/chat/completions", {"messages": messages, "logprobs": True, "top_logprobs": 1}),
        ("/tokenize", {"prompt": "x"}),
        ("/detokenize", {"tokens": [97]}),
    ):
        for sent, status in ((body, "200"), ({"prompt": {}, "messages": {}, "tokens": {}}, "400")):
            reply = await client.post(url, json=sent)
            assert str(reply.status_code) == status
            described = page["paths"][url]["post"]["responses"][status]["content"]["application/json"][
                "schema"
            ]
            schema = page["components"]["schemas"][described["$ref"].rpartition("/")[2]]
            assert set(schema["required"]) <= set(reply.json()) <= set(schema["properties"])


async def test_every_reference_in_the_schema_leads_somewhere(make_app: MakeApp) -> None:
    page = make_app(FakeEngine()).openapi()
    schemas = page["components"]["schemas"]
    found: set[str] = set()

    def walk(node: object) -> None:
        if isinstance(node, dict):
            if "$ref" in node:
                found.add(node["$ref"].removeprefix("#/components/schemas/"))
            for child in node.values():
                walk(child)
        elif isinstance(node, list):
            for child in node:
                walk(child)

    walk(page)
    assert {"Completion", "ChatCompletionChunk", "ErrorBody", "CompletionRequest"} <= found
    assert found <= set(schemas)


async def test_a_models_own_sampling_fills_in_what_a_request_leaves_open(
    make_client: MakeClient, tmp_path: Path
) -> None:
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 20, "eos_token_id": 256}')
    engine = FakeEngine()
    client = make_client(engine, model=str(tmp_path))
    await client.post("/v1/completions", json={"prompt": "x"})
    await client.post("/v1/completions", json={"prompt": "x", "temperature": 0, "top_k": -1})
    first, second = (request.params for request in engine.requests)
    assert (first.temperature, first.top_k, first.top_p) == (0.6, 20, 1.0)
    assert (second.temperature, second.top_k) == (0.0, -1)


async def test_the_models_own_sampling_may_be_ignored_or_replaced(
    make_client: MakeClient, tmp_path: Path
) -> None:
    model, other = tmp_path / "model", tmp_path / "other"
    for folder, temperature in ((model, 0.6), (other, 0.3)):
        folder.mkdir()
        (folder / "generation_config.json").write_text(f'{{"temperature": {temperature}}}')
    for choice, temperature in (("auto", 0.6), ("vllm", 1.0), (str(other), 0.3)):
        engine = FakeEngine()
        client = make_client(engine, model=str(model), generation_config=choice)
        await client.post("/v1/completions", json={"prompt": "x"})
        assert engine.requests[0].params.temperature == temperature
    with pytest.raises(DefaultsError, match=r"missing: holds no generation_config\.json"):
        make_client(model=str(model), generation_config=str(tmp_path / "missing"))


async def test_placement_is_explained_for_a_page_and_for_all(make_client: MakeClient) -> None:
    client = make_client()
    assert (await client.get("/placement")).json() == {"lines": ["all pages"]}
    assert (await client.get("/placement?page=3")).json() == {"lines": ["page 3", "  k: dram0"]}
    refused = await client.get("/placement?page=-1")
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "page"
