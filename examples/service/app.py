"""The service: one endpoint that answers, three that say how it is."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from service.answering import Answer, Answering, Query
from service.bundle import Live
from service.metrics import Measured, Metrics
from service.settings import Settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

__all__ = ["create_app"]


def create_app(settings: Settings) -> FastAPI:
    """Return the application; the bundle is loaded when it starts, before it listens."""
    metrics = Metrics()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        live = await asyncio.to_thread(Live, settings, metrics)
        app.state.live = live
        app.state.answering = Answering(live, settings, metrics)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, live.look)
        watching = asyncio.create_task(live.watch())
        # On SIGTERM the server listens no more and comes back here when the last answer is out.
        yield
        watching.cancel()

    app = FastAPI(title="eptc service", lifespan=lifespan, max_body_size=settings.max_body_bytes)
    app.add_middleware(Measured, metrics=metrics, path="/answer")

    @app.exception_handler(RequestValidationError)
    async def refuse(_: Request, error: RequestValidationError) -> Response:
        # FastAPI's own handler sends the request back, and fails where that is no valid Unicode.
        found = [{"at": e["loc"], "problem": e["msg"]} for e in error.errors()]
        return Response(json.dumps({"detail": found}), 422, media_type="application/json")

    @app.post("/answer", response_model_exclude_none=True)
    async def answer(query: Query, request: Request) -> Answer:
        answering: Answering = request.app.state.answering
        return await answering.answer(query)

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the process lives: restart it where this does not answer."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready(request: Request) -> dict[str, str | list[str] | None]:
        """Which bundle answers, and why another that was offered does not."""
        live: Live = request.app.state.live
        return {
            "bundle": live.current.sha256,
            "tasks": [task.name for task in live.current.engine.tasks],
            "rejected": live.rejected,
        }

    @app.get("/metrics")
    async def measured() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app
