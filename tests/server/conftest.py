"""An application around a fake engine, and a client that talks to it without a socket."""

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import httpx
import pytest
from fastapi import FastAPI

from hybridgen.configs.settings import Settings
from hybridgen.server.lifecycle import Lifecycle

if TYPE_CHECKING:
    from hybridgen.engine.client import EngineClient
    from hybridgen.engine.tokenizer import Tokenizer
    from tests.server.fakes import FakeEngine

MakeApp = Callable[..., FastAPI]
MakeClient = Callable[..., httpx.AsyncClient]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Imported here, since transformers takes seconds and not every test beside this file needs it.
    from tests.server.fakes import save_byte_tokenizer

    folder = tmp_path_factory.mktemp("model")
    save_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(model_folder: Path) -> "Tokenizer":
    from hybridgen.engine.tokenizer import Tokenizer

    return Tokenizer(str(model_folder))


@pytest.fixture
def lifecycle() -> Lifecycle:
    return Lifecycle("ready")


@pytest.fixture
def make_app(model_folder: Path, tokenizer: "Tokenizer", lifecycle: Lifecycle) -> MakeApp:
    from hybridgen.server.app import create_app

    def make(engine: "FakeEngine", **settings: Any) -> FastAPI:
        settings = {"model": str(model_folder), "served_model_name": ("tiny", "org/alias"), **settings}
        return create_app(Settings(**settings), cast("EngineClient", engine), tokenizer, lifecycle)

    return make


@pytest.fixture
async def make_client(make_app: MakeApp) -> AsyncIterator[MakeClient]:
    """A client of a new application; errors of the application become its 500, as in a real server."""
    from tests.server.fakes import FakeEngine

    async with AsyncExitStack() as stack:

        def make(engine: FakeEngine | None = None, **settings: Any) -> httpx.AsyncClient:
            app = make_app(engine or FakeEngine(), **settings)
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            client = httpx.AsyncClient(transport=transport, base_url="http://test")
            stack.push_async_callback(client.aclose)
            return client

        yield make
