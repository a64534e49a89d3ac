"""The OpenAI Python SDK against a real `hybridgen serve`: what users run, on a tiny random model."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import torch
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionUserMessageParam
from transformers import LlamaConfig, LlamaForCausalLM

from tests.server.fakes import EOS, save_byte_tokenizer

KEY = "sk-test"
MODEL = "org/tiny"
CONTEXT = 2048
USER: ChatCompletionUserMessageParam = {"role": "user", "content": "Hi"}
NUM_TOKENS = 8


def save_tiny_model(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=EOS + 1,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=CONTEXT,
        bos_token_id=None,
        eos_token_id=EOS,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[EOS] = 0.0  # never the likeliest: greedy answers are as long as asked for
    model.save_pretrained(folder)
    save_byte_tokenizer(folder)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL of a server process; it must end with status 0 when asked to."""
    folder = tmp_path_factory.mktemp("served")
    save_tiny_model(folder / "model")
    port = free_port()
    command = [sys.executable, "-P", "-m", "hybridgen", "serve", str(folder / "model")]
    command += [
        "--port",
        str(port),
        "--served-model-name",
        MODEL,
        "alias",
        "--api-key",
        KEY,
        "--threads",
        "1",
    ]
    command += ["--kv-cache-memory-bytes", "16MiB", "--max-num-seqs", "8"]
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=dict(os.environ))
    try:
        _wait_ready(process, f"http://127.0.0.1:{port}/ready", log)
        yield f"http://127.0.0.1:{port}/v1"
        process.terminate()
        assert process.wait(timeout=30) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


def _wait_ready(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    deadline_s = time.monotonic() + 240
    while time.monotonic() < deadline_s:
        assert process.poll() is None, f"the server ended with {process.returncode}:\n{log.read_text()}"
        try:
            if httpx.get(url).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"the server is not ready after 240 s:\n{log.read_text()}")


@pytest.fixture
def client(server: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=server, api_key=KEY, max_retries=0) as client:
        yield client


def test_models_are_listed_and_retrieved(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL, "alias"]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError) as info:
        client.models.retrieve("nope")
    assert info.value.code == "model_not_found"


def test_a_stream_gives_the_text_of_the_whole(client: OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt="abc", max_tokens=NUM_TOKENS, temperature=0)
    stream = client.completions.create(
        model=MODEL,
        prompt="abc",
        max_tokens=NUM_TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole.choices[0].text
    assert chunks[-1].choices == []
    assert whole.usage is not None
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == NUM_TOKENS
    assert whole.choices[0].finish_reason == "length"


def test_a_chat_stream_gives_the_text_of_the_whole(client: OpenAI) -> None:
    whole = client.chat.completions.create(
        model=MODEL, messages=[USER], max_completion_tokens=NUM_TOKENS, temperature=0
    )
    stream = client.chat.completions.create(
        model=MODEL, messages=[USER], max_completion_tokens=NUM_TOKENS, temperature=0, stream=True
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


async def test_the_async_client_gets_the_same(server: str, client: OpenAI) -> None:
    def sync() -> str | None:
        reply = client.chat.completions.create(model=MODEL, messages=[USER], max_tokens=4, temperature=0)
        return reply.choices[0].message.content

    async with AsyncOpenAI(base_url=server, api_key=KEY, max_retries=0) as asynchronous:
        whole = await asynchronous.chat.completions.create(
            model=MODEL, messages=[USER], max_tokens=4, temperature=0
        )
        stream = await asynchronous.chat.completions.create(
            model=MODEL, messages=[USER], max_tokens=4, temperature=0, stream=True
        )
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(pieces) == whole.choices[0].message.content == sync()


def test_the_streaming_helper_accumulates_a_chat(client: OpenAI) -> None:
    with client.chat.completions.stream(model=MODEL, messages=[USER], max_tokens=4, temperature=0) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        choice = stream.current_completion_snapshot.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content == "".join(deltas)
    assert choice.finish_reason == "length"


def test_a_seed_decides_the_tokens(client: OpenAI) -> None:
    def sample(seed: int) -> list[str]:
        reply = client.completions.create(model=MODEL, prompt="x", max_tokens=NUM_TOKENS, seed=seed, n=2)
        return [choice.text for choice in reply.choices]

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert sample(1)[0] != sample(1)[1]


def test_logprobs_of_chats_and_completions(client: OpenAI) -> None:
    chat = client.chat.completions.create(
        model=MODEL, messages=[USER], max_tokens=3, temperature=0, logprobs=True, top_logprobs=2
    )
    assert chat.choices[0].logprobs is not None
    content = chat.choices[0].logprobs.content
    assert content is not None
    assert len(content) == 3
    for token in content:
        assert token.logprob == token.top_logprobs[0].logprob  # greedy
        assert len(token.top_logprobs) == 2
    completion = client.completions.create(
        model=MODEL, prompt="abc", max_tokens=1, temperature=0, logprobs=1, echo=True
    )
    assert completion.choices[0].text.startswith("abc")
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.tokens[:3] == ["a", "b", "c"]
    assert logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in logprobs.token_logprobs[1:])


def test_list_prompts_and_n_are_numbered(client: OpenAI) -> None:
    reply = client.completions.create(model=MODEL, prompt=["a", "b"], n=2, max_tokens=2)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert reply.usage is not None
    assert reply.usage.completion_tokens <= 8


def test_a_repeated_prompt_is_found_in_the_cache(client: OpenAI) -> None:
    prompt = "the same long beginning of more than one page " * 2
    for _ in range(2):
        reply = client.completions.create(model=MODEL, prompt=prompt, max_tokens=1)
    assert reply.usage is not None
    assert reply.usage.prompt_tokens_details is not None
    assert (reply.usage.prompt_tokens_details.cached_tokens or 0) >= 32


def test_errors_are_the_sdks_own(client: OpenAI, server: str) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model=MODEL, prompt="x" * 100, max_tokens=CONTEXT)
    assert bad.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nope", messages=[USER])
    with (
        OpenAI(base_url=server, api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()


def test_leaving_a_stream_frees_its_pages(client: OpenAI, server: str) -> None:
    def metric(sample: str) -> float:
        lines = httpx.get(server.removesuffix("/v1") + "/metrics").text.splitlines()
        return float(next(line for line in lines if line.startswith(sample)).split()[-1])

    aborted = f'vllm:request_success_total{{engine="0",finished_reason="abort",model_name="{MODEL}"}}'
    before = metric(aborted)
    stream = client.completions.create(
        model=MODEL, prompt="x", max_tokens=CONTEXT - 1, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    deadline_s = time.monotonic() + 10
    while metric("vllm:num_requests_running{") or metric("vllm:kv_cache_usage_perc{"):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    assert metric(aborted) == before + 1
