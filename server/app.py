"""The HTTP application: puts routes, middlewares and error handling around one engine."""

import logging
import time

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

import hybridgen
from hybridgen.configs.settings import Settings, api_keys
from hybridgen.engine.client import EngineClient
from hybridgen.engine.tokenizer import Tokenizer
from hybridgen.server import chat_completions, completions, models, operations
from hybridgen.server.defaults import SamplingDefaults, load_sampling_defaults
from hybridgen.server.errors import add_exception_handlers
from hybridgen.server.lifecycle import Lifecycle
from hybridgen.server.metrics import Metrics
from hybridgen.server.middleware import ApiKeyGuard, Availability, BodyLimit, RequestId
from hybridgen.server.openapi import describe_responses
from hybridgen.server.service import Admission, Service, fingerprint

logger = logging.getLogger(__name__)

# Routes that cannot be answered without a living engine.
_ENGINE_PATHS = frozenset({"/v1/completions", "/v1/chat/completions"})


def create_app(
    settings: Settings, engine: EngineClient, tokenizer: Tokenizer, lifecycle: Lifecycle
) -> FastAPI:
    """The application, for any ASGI server. May be called any number of times in a process.

    Raises:
        SettingsError: the file of API keys cannot be used.
        DefaultsError: the model's generation_config.json cannot be used.
    """
    defaults = load_sampling_defaults(settings)
    if defaults != SamplingDefaults():
        logger.info("the model's own sampling: %s", defaults)
    service = Service(
        settings=settings,
        engine=engine,
        tokenizer=tokenizer,
        lifecycle=lifecycle,
        metrics=Metrics(settings.served_model_name[0], lambda: engine.stats),
        admission=Admission(settings.max_num_seqs + settings.max_num_queued_reqs),
        defaults=defaults,
        system_fingerprint=fingerprint(settings, engine.ready),
        created=int(time.time()),
    )
    app = FastAPI(title="HybridGen", version=hybridgen.__version__, redoc_url=None)
    for router in (completions, chat_completions, models, operations):
        app.include_router(router.routes(service))
    add_exception_handlers(app)

    keys = api_keys(settings)
    describe_responses(app, needs_key=bool(keys))
    # The last one added is the first to see a request.
    app.add_middleware(BodyLimit, max_bytes=settings.max_request_bytes)
    app.add_middleware(Availability, paths=_ENGINE_PATHS, lifecycle=lifecycle, engine=engine)
    if keys:
        app.add_middleware(ApiKeyGuard, keys=keys)
    if settings.allowed_origins:
        # Outside of the key: a browser's preflight carries none.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    app.add_middleware(RequestId, send_back=settings.enable_request_id_headers)
    return app
