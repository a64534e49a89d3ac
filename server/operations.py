"""What operators and their machines ask: is it alive, is it ready, what version, what do the counters say."""

from typing import Annotated

from fastapi import APIRouter, Query
from starlette.responses import Response

import hybridgen
from hybridgen.server.formatting import json_response
from hybridgen.server.metrics import CONTENT_TYPE
from hybridgen.server.middleware import unavailable
from hybridgen.server.openapi import answers, errors
from hybridgen.server.protocol import PlacementText, Status, Version
from hybridgen.server.service import Service


def routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["operations"])

    @router.head("/health", include_in_schema=False)
    @router.get("/health", responses=answers(Status, 503))
    async def health() -> Response:
        """200 while the engine lives and its model is loaded, also while draining; restart it on 503."""
        refusal = unavailable(service.lifecycle, service.engine)
        if refusal is not None and refusal.info.code != "draining":
            raise refusal
        return json_response(Status(status="ok"))

    @router.head("/ready", include_in_schema=False)
    @router.get("/ready", responses=answers(Status, 503))
    async def ready() -> Response:
        """200 while requests are taken; send them elsewhere on 503."""
        refusal = unavailable(service.lifecycle, service.engine)
        if refusal is not None:
            raise refusal
        return json_response(Status(status="ready"))

    @router.head("/ping", include_in_schema=False)
    @router.get("/ping", responses=answers(Status, 503))
    @router.post("/ping", responses=answers(Status, 503))
    async def ping() -> Response:
        """Another name of /health."""
        return await health()

    @router.get("/version", responses=answers(Version, 401))
    async def version() -> Response:
        return json_response(Version(version=hybridgen.__version__))

    @router.get("/placement", responses=answers(PlacementText, 400, 401, 503))
    async def placement(page: Annotated[int | None, Query(ge=0)] = None) -> Response:
        """On which memory node a host page's keys, values and index lie, and why; without `page`, the whole."""
        return json_response(PlacementText(lines=await service.engine.explain(page)))

    @router.get(
        "/metrics",
        responses={
            200: {"description": "Prometheus text format", "content": {"text/plain": {}}},
            **errors(),
        },
    )
    async def metrics() -> Response:
        return Response(service.metrics.exposition(), headers={"content-type": CONTENT_TYPE})

    return router
