"""Training on several tasks at once, one task a batch, and scoring on held-out rows."""

from __future__ import annotations

import dataclasses
import random
import statistics
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from eptc.nn import EptModel
    from eptc.tasks import Task
    from multitask.rows import Dataset, Row

__all__ = ["Score", "Settings", "baseline", "evaluate", "schedule", "train"]

# Batches that are sorted by length together: neighbours are alike, so little is padded.
_POOL = 8
DEFAULT_BATCH = 16


@dataclasses.dataclass(frozen=True)
class Settings:
    """How long and how fast to train.

    Args:
        steps: batches in all, over all tasks.
        seed: of every random choice.
        batch_sizes: rows of a batch, by task name; `DEFAULT_BATCH` for others.
        shares: how often a task comes up, by task name; 1 for others.
        adapter_rate: largest learning rate of the adapters.
        head_rate: largest learning rate of the heads.
    """

    steps: int
    seed: int = 0
    batch_sizes: tuple[tuple[str, int], ...] = (("intent", 32),)
    shares: tuple[tuple[str, int], ...] = (
        ("sentiment", 3),
        ("tweets", 3),
        ("spam", 2),
        ("intent", 6),
    )
    adapter_rate: float = 2e-3
    head_rate: float = 1e-3


@dataclasses.dataclass(frozen=True)
class Score:
    """A held-out score beside what a constant answer gets.

    Args:
        task: the task's name.
        kind: `classification` or `regression`.
        train_rows, rows: how many rows were trained on and scored.
        metric: accuracy, or Pearson's correlation.
        score: of the model.
        baseline: of the majority class, or of the mean rating (correlation 0).
    """

    task: str
    kind: str
    train_rows: int
    rows: int
    metric: str
    score: float
    baseline: float


def schedule(names: Sequence[str], settings: Settings) -> list[int]:
    """Return the task of each step: every task at its share all the way, in a seeded order."""
    shares = dict(settings.shares)
    one = [i for i, name in enumerate(names) for _ in range(shares.get(name, 1))]
    rng = random.Random(settings.seed)
    steps: list[int] = []
    while len(steps) < settings.steps:
        steps += rng.sample(one, len(one))
    return steps[: settings.steps]


def train(
    model: EptModel,
    tokenizer: Any,
    datasets: Sequence[Dataset],
    settings: Settings,
    report: Callable[[int, str, float], None] | None = None,
) -> None:
    """Train a model's adapters and heads.

    Args:
        model: with the datasets' tasks.
        tokenizer: of the base.
        datasets: training rows by task.
        settings: how long and how fast.
        report: called after each step with the step from 1, the task's name and its loss.
    """
    torch.manual_seed(settings.seed)
    optimizer, rates = _optimizer(model, settings)
    batches = [_batches(d, tokenizer, settings) for d in datasets]
    model.train()
    for step, i in enumerate(schedule([d.task.name for d in datasets], settings)):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * _warm_then_down(step, settings.steps)
        inputs, labels = next(batches[i])
        output = model(task=datasets[i].task.name, labels=labels, **inputs)
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if report is not None:
            report(step + 1, datasets[i].task.name, float(output.task_loss.detach()))
    model.eval()


def _optimizer(model: EptModel, settings: Settings) -> tuple[torch.optim.Optimizer, list[float]]:
    heads = [p for module in model.heads.values() for p in module.parameters()]
    known = {id(p) for p in heads}
    adapters = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    groups = [{"params": adapters}, {"params": heads}]
    rates = [settings.adapter_rate, settings.head_rate]
    return torch.optim.AdamW(groups, lr=settings.adapter_rate, weight_decay=0.01), rates


def _warm_then_down(step: int, steps: int) -> float:
    """Return the share of the learning rate: up for the first 6 %, then straight down to 0."""
    return min((step + 1) / max(1.0, 0.06 * steps), 1 - step / steps)


def _batches(
    data: Dataset, tokenizer: Any, settings: Settings
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    size = dict(settings.batch_sizes).get(data.task.name, DEFAULT_BATCH)
    tokens = _tokens(tokenizer, data.task, data.train)
    rng = random.Random(f"{settings.seed} {data.task.name}")
    while True:
        order = rng.sample(range(len(tokens)), len(tokens))
        for start in range(0, len(order), _POOL * size):
            pool = sorted(order[start : start + _POOL * size], key=lambda i: len(tokens[i]))
            chunks = [pool[i : i + size] for i in range(0, len(pool), size)]
            for chunk in rng.sample(chunks, len(chunks)):
                yield (
                    _padded(tokenizer, [tokens[i] for i in chunk]),
                    _labels(data.task, [data.train[i] for i in chunk]),
                )


def _tokens(tokenizer: Any, task: Task, rows: Sequence[Row]) -> list[list[int]]:
    texts = [row.text for row in rows]
    ids: list[list[int]] = tokenizer(texts, truncation=True, max_length=task.max_length)[
        "input_ids"
    ]
    return ids


def _padded(tokenizer: Any, tokens: list[list[int]]) -> dict[str, Tensor]:
    return dict(tokenizer.pad({"input_ids": tokens}, return_tensors="pt"))


def _labels(task: Task, rows: Sequence[Row]) -> Tensor:
    labels = torch.tensor([row.label for row in rows])
    return labels.float() if task.kind == "regression" else labels.long()


def evaluate(model: EptModel, tokenizer: Any, data: Dataset) -> Score:
    """Score a model on a task's held-out rows."""
    tokens = _tokens(tokenizer, data.task, data.held_out)
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    logits: list[Tensor] = []
    model.eval()
    with torch.no_grad():
        for start in range(0, len(order), 64):
            inputs = _padded(tokenizer, [tokens[i] for i in order[start : start + 64]])
            logits.append(model(task=data.task.name, **inputs).logits)
    labels = _labels(data.task, [data.held_out[i] for i in order])
    return Score(
        data.task.name,
        data.task.kind,
        len(data.train),
        len(data.held_out),
        data.task.metric,
        _metric(data.task, torch.cat(logits), labels),
        baseline(data),
    )


def _metric(task: Task, logits: Tensor, labels: Tensor) -> float:
    if task.kind == "regression":
        return statistics.correlation(logits[:, 0].double().tolist(), labels.double().tolist())
    return float((logits.argmax(-1) == labels).double().mean())


def baseline(data: Dataset) -> float:
    """Return the score of the training rows' majority class; 0 for a regression's mean."""
    if data.task.kind == "regression":
        return 0.0
    answer = statistics.mode(row.label for row in data.train)
    return sum(row.label == answer for row in data.held_out) / len(data.held_out)
