"""Serve an engine on a Ray cluster: replicas, each of which answers what comes in together.

    python examples/on_ray/serve.py BUNDLE --replicas 2 --port 8000
    python examples/on_ray/client.py http://127.0.0.1:8000/ "a fine film"

Ray starts a replica that dies again. What it was answering is lost to the client, which asks
again: `client.py` does.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
from pathlib import Path
from typing import Any

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

from eptc.errors import InputError
from eptc.runtime import Engine


class Classifier:
    """A replica: one engine, whose requests of a moment are answered as a batch."""

    def __init__(self, bundle: str) -> None:
        self._engine = Engine.load(bundle, warm_up=True)

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0.005)  # type: ignore[untyped-decorator]
    async def _answer(self, texts: list[str]) -> list[dict[str, Any]]:
        answers = await asyncio.to_thread(self._engine.classify, texts, truncate=True)
        return [
            {"label": a.label, "probability": max(a.probabilities)}
            if a.probabilities is not None
            else {"value": a.value}
            for a in answers
        ]

    async def __call__(self, request: Request) -> JSONResponse:
        """Answer `{"text": ...}`; 422 for anything else."""
        try:
            text = (await request.json())["text"]
            if not isinstance(text, str):
                raise TypeError(text)
        except (ValueError, LookupError, TypeError):
            return JSONResponse({"error": 'expected {"text": "..."}'}, 422)
        try:
            return JSONResponse(await self._answer(text))
        except InputError as error:
            return JSONResponse({"error": str(error)}, 422)


def main() -> None:
    """Read the command line; serve until Ctrl-C or a polite kill."""
    parser = argparse.ArgumentParser(description="Serve an engine on a Ray cluster.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    ray.init(log_to_driver=False)  # RAY_ADDRESS names a cluster; without it: this machine
    serve.start(http_options={"host": "127.0.0.1", "port": given.port})
    replicas = serve.deployment(
        num_replicas=given.replicas, max_ongoing_requests=64, health_check_period_s=2,
        ray_actor_options={"num_cpus": 1},
    )(Classifier)  # fmt: skip
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is served ends with this
    try:
        serve.run(replicas.bind(str(given.bundle.absolute())), blocking=True)
    finally:
        serve.shutdown()


if __name__ == "__main__":
    main()
