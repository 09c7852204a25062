"""`python -m service`: serve until SIGTERM."""

from __future__ import annotations

import uvicorn

from service.app import create_app
from service.settings import Settings

settings = Settings()  # type: ignore[call-arg]  # the environment gives them
uvicorn.run(
    create_app(settings),
    host=settings.host,
    port=settings.port,
    timeout_graceful_shutdown=settings.drain_seconds,
    access_log=False,  # callers' texts are nobody's business; what is counted is at /metrics
)
