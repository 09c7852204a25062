"""What a run found, as JSON and back."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any, Literal

__all__ = [
    "SCHEMA_VERSION", "Build", "CaseResult", "Conditions", "Machine", "Measure", "Ratio",
    "Results", "Timing", "read", "write",
]  # fmt: skip

SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Ratio:
    """A ratio with its paired 95 % interval; no interval where there were too few rounds."""

    estimate: float
    low: float | None
    high: float | None
    rounds: int


@dataclasses.dataclass(frozen=True)
class Timing:
    """One contestant in one case.

    Args:
        contestant: its name.
        label: what reports call it.
        family: `engine`, `base`, `pytorch` or `exporter`.
        status: `measured`, or `failed`.
        reason: why it failed.
        seconds: each counted round's value, in order.
        engine: the engine's values in the same rounds.
        ratio: engine / contestant: below 1 where the engine is faster.
        difference: largest deviation of its answer from the unfolded PyTorch model's: of logits
            and hidden states absolute, of tokens the share that differs. None: not compared.
        peak_rss: bytes its process held at most.
    """

    contestant: str
    label: str
    family: str
    status: Literal["measured", "failed"]
    reason: str | None = None
    seconds: tuple[float, ...] = ()
    engine: tuple[float, ...] = ()
    ratio: Ratio | None = None
    difference: float | None = None
    peak_rss: int | None = None


@dataclasses.dataclass(frozen=True)
class CaseResult:
    """One case.

    Args:
        name: its name.
        model: its model.
        mode: what was run.
        batch: rows.
        length: tokens a row.
        new_tokens: tokens written a row.
        rounds: rounds counted.
        warmup: rounds before them that were not.
        timings: every contestant, the failed ones as well.
        idle_cpu: share of one CPU that the processes of those who waited used, on average.
        foreign_cpu: share of the machine's CPU time used by anything else.
    """

    name: str
    model: str
    mode: str
    batch: int
    length: int
    new_tokens: int
    rounds: int
    warmup: int
    timings: tuple[Timing, ...]
    idle_cpu: float | None
    foreign_cpu: float | None


@dataclasses.dataclass(frozen=True)
class Measure:
    """One step of a build benchmark, once a round.

    Args:
        name: what was run.
        status: `measured`, or `failed`.
        reason: why it failed.
        seconds: wall time, each round.
        peak_rss: bytes, each round: of the process itself, and of any process it waited for.
        tree_rss: likewise, the largest of the two.
        size: bytes of what it wrote.
    """

    name: str
    status: Literal["measured", "failed"]
    reason: str | None = None
    seconds: tuple[float, ...] = ()
    peak_rss: tuple[int, ...] = ()
    tree_rss: tuple[int, ...] = ()
    size: int | None = None


@dataclasses.dataclass(frozen=True)
class Build:
    """The builds of one model.

    Args:
        name: the benchmark's.
        model: its model.
        measures: every step.
        ratios: by what they compare.
        weights: bytes of the model's weights, in the type the engine keeps them in.
        foreign_cpu: as for a case.
    """

    name: str
    model: str
    measures: tuple[Measure, ...]
    ratios: dict[str, Ratio]
    weights: int
    foreign_cpu: float | None


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where it ran."""

    cpu: str
    cpus: int
    memory: int
    system: str
    python: str


@dataclasses.dataclass(frozen=True)
class Conditions:
    """Under what something was measured.

    Args:
        revision: the checkout's commit.
        machine: where.
        threads: threads of every contestant.
        seed: of everything that is random.
        quick: whether it was a trial, with few rounds.
        versions: each environment's packages.
    """

    revision: str
    machine: Machine
    threads: int
    seed: int
    quick: bool
    versions: dict[str, dict[str, str]]


@dataclasses.dataclass(frozen=True)
class Results:
    """One case or one build: `results/<name>.json`."""

    name: str
    conditions: Conditions
    case: CaseResult | None = None
    build: Build | None = None
    schema_version: int = SCHEMA_VERSION


def write(results: Results, path: Path) -> None:
    """Write results whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(dataclasses.asdict(results), indent=1) + "\n")
    draft.replace(path)


def read(path: Path) -> Results:
    """Read results.

    Raises:
        ValueError: another schema version, or a field too many, too few or of another type.
    """
    data = json.loads(path.read_text())
    if data.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"{path} has schema version {data.get('schema_version')}")
    results: Results = _parse(Results, data, path.name)
    return results


def _parse(kind: Any, data: Any, where: str) -> Any:
    """Return JSON values as what a type annotation says."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _parse_object(kind, data, where)
    if origin is types.UnionType:
        if data is None and types.NoneType in arguments:
            return None
        kind = next(a for a in arguments if a is not types.NoneType)
        return _parse(kind, data, where)
    if origin is tuple and isinstance(data, list):
        return tuple(_parse(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if origin is dict and isinstance(data, dict):
        return {key: _parse(arguments[1], item, f"{where}.{key}") for key, item in data.items()}
    if origin is Literal and data in arguments:
        return data
    if kind is float and type(data) is int:
        return float(data)
    if origin is None and type(data) is kind:
        return data
    raise ValueError(f"{where} is {data!r}, not {kind}")


def _parse_object(kind: Any, data: Any, where: str) -> Any:
    hints = typing.get_type_hints(kind)
    if not isinstance(data, dict) or set(data) != set(hints):
        found = sorted(data) if isinstance(data, dict) else data
        raise ValueError(f"{where} is {found}, not an object with {sorted(hints)}")
    return kind(**{name: _parse(hints[name], data[name], f"{where}.{name}") for name in hints})
