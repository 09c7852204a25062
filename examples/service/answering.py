"""From requests to batches: the forms of both, and the queue between them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

from batched.aio import AsyncBatchProcessor
from fastapi import HTTPException
from pydantic import BaseModel, ConfigDict, Field

from eptc.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from service.bundle import Live, Loaded
    from service.metrics import Metrics
    from service.settings import Settings

__all__ = ["Answer", "Answering", "Query"]


class Query(BaseModel):
    """A text, a pair of texts, or the task's fields by name; one or the other as the task has.

    `task` is needed where the engine has several.
    """

    model_config = ConfigDict(extra="forbid")

    input: str | tuple[str, str] | Annotated[dict[str, str], Field(max_length=16)]
    task: str | None = None


class Answer(BaseModel):
    """A label with probabilities, a regression's value, or written text; and who said so."""

    label: str | None = None
    probabilities: tuple[float, ...] | None = None
    value: float | None = None
    text: str | None = None
    bundle: str


class Answering:
    """Answers queries in batches, so many at a time and no more.

    The library takes queries off its queue when they were cancelled, and runs one batch at a
    time; how many may wait is counted here, which it does not do.
    """

    def __init__(self, live: Live, settings: Settings, metrics: Metrics) -> None:
        self._live = live
        self._settings = settings
        self._metrics = metrics
        self._pending = 0
        self._batches: AsyncBatchProcessor[Query, Answer | InputError] = AsyncBatchProcessor(
            self._batch, batch_size=settings.max_batch, timeout_ms=settings.max_wait_ms
        )

    async def answer(self, query: Query) -> Answer:
        """Return the answer to one query.

        Raises:
            HTTPException: 422 where the task takes no such text, 429 where too many wait, 504
                where it took too long.
        """
        if self._pending >= self._settings.max_queue:
            raise HTTPException(429, "too many requests are waiting", {"Retry-After": "1"})
        self._count(1)
        try:
            async with asyncio.timeout(self._settings.timeout_seconds):
                answer: Answer | InputError = await self._batches(query)
        except TimeoutError:
            raise HTTPException(504, "the answer took too long") from None
        finally:
            self._count(-1)
        if isinstance(answer, InputError):
            raise HTTPException(422, str(answer))
        return answer

    def _count(self, change: int) -> None:
        self._pending += change
        self._metrics.queue.set(self._pending)

    async def _batch(self, queries: list[Query]) -> list[Answer | InputError]:
        self._metrics.batches.observe(len(queries))
        # The engine is chosen once a batch. ONNX Runtime lets go of the lock while it computes.
        return await asyncio.to_thread(
            _answers, self._live.current, queries, truncate=self._settings.truncate
        )  # fmt: skip


def _answers(loaded: Loaded, queries: list[Query], *, truncate: bool) -> list[Answer | InputError]:
    """Answer a batch; a text that the engine refuses is found by halving, and spoils no other."""
    try:
        return list(_run(loaded, queries, truncate=truncate))
    except InputError as error:
        if len(queries) == 1:
            return [error]
        middle = len(queries) // 2
        return [
            answer
            for half in (queries[:middle], queries[middle:])
            for answer in _answers(loaded, half, truncate=truncate)
        ]


def _run(loaded: Loaded, queries: list[Query], *, truncate: bool) -> Iterator[Answer]:
    engine, bundle = loaded.engine, loaded.sha256
    manifest, tasks = engine.manifest, engine.tasks
    only = tasks[0].name if len(tasks) == 1 else None
    named: list[Any] = [query.task or only for query in queries]
    given: dict[str, Any] = {
        "tasks": named if any(named) or tasks else None,
        "truncate": truncate,
        # Where the rows of a batch change one another's answers, strangers may not share one.
        "batch_size": 1 if manifest.routing.mode == "batch" else len(queries),
    }
    texts = [query.input for query in queries]
    labelled = tasks and all(task.labels for task in tasks)
    if labelled or manifest.kind == "encoder-classifier":
        for answer in engine.classify(texts, **given):
            yield Answer(
                label=answer.label, probabilities=answer.probabilities, value=answer.value,
                bundle=bundle,
            )  # fmt: skip
    else:
        for written in engine.generate(texts, **given):
            yield Answer(text=written.text, bundle=bundle)
