"""What Prometheus reads at /metrics."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["Measured", "Metrics"]


class Metrics:
    """The service's measures, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "service_requests", "Requests for an answer, by status.", ["code"], registry=registry
        )
        self.seconds = Histogram(
            "service_request_seconds", "From a request to its answer.", registry=registry
        )
        self.queue = Gauge(
            "service_queue_length", "Texts waiting or being answered.", registry=registry
        )
        self.batches = Histogram(
            "service_batch_size", "Texts answered at once.", registry=registry,
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
        )  # fmt: skip
        self.reloads = Counter(
            "service_reloads", "Bundles offered, by outcome.", ["outcome"], registry=registry
        )
        self.rejected = Gauge(
            "service_bundle_rejected", "1 while the bundle that lies there is not in use.",
            registry=registry,
        )  # fmt: skip
        self.bundle = Info("service_bundle", "The bundle in use.", registry=registry)


class Measured:
    """Middleware: counts and times requests for one path, refused ones included."""

    def __init__(self, app: ASGIApp, metrics: Metrics, path: str) -> None:
        self._app = app
        self._metrics = metrics
        self._path = path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["path"] != self._path:
            await self._app(scope, receive, send)
            return
        code, start = 500, time.perf_counter()

        async def observed(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, observed)
        finally:
            self._metrics.requests.labels(str(code)).inc()
            self._metrics.seconds.observe(time.perf_counter() - start)
