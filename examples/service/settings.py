"""What can be set, each by an environment variable: `SERVICE_` and the name in capitals."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from pydantic_settings import BaseSettings, SettingsConfigDict

__all__ = ["Settings"]


class Settings(BaseSettings):
    """The service's settings.

    Attributes:
        bundle: the bundle's folder, or a link to it; a new one placed there is swapped in.
        host: address to listen on.
        port: port to listen on; 0 takes a free one and logs it.
        providers: execution providers in order, as JSON (`["cuda", "cpu"]`); none: the best
            that start.
        threads: CPU threads of one operator; none: the CPUs the process may use.
        truncate: cut texts that are too long, as training did, instead of refusing them.
        max_body_bytes: larger requests are refused (413).
        max_batch: texts that the engine answers at once.
        max_wait_ms: how long a text waits for others to share its batch, at most; where enough
            for a full batch are there, not at all.
        max_queue: texts that are waiting or being answered; beyond it requests are refused (429).
        timeout_seconds: after which a request is given up (504).
        drain_seconds: how long requests under way may take after SIGTERM.
        watch_seconds: between two looks for a new bundle; 0 looks on SIGHUP alone.
    """

    model_config = SettingsConfigDict(env_prefix="SERVICE_", frozen=True)

    bundle: Path
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    providers: list[str] | None = None
    threads: PositiveInt | None = None
    truncate: bool = False
    max_body_bytes: PositiveInt = 64 * 1024
    max_batch: PositiveInt = 32
    max_wait_ms: PositiveFloat = 5.0
    max_queue: PositiveInt = 256
    timeout_seconds: PositiveFloat = 10.0
    drain_seconds: PositiveInt = 30
    watch_seconds: NonNegativeFloat = 5.0
