"""eptc's native checkpoint: complete, so that a reader never has to guess.

`ept_config.json` (JSON Schema: ept_config.schema.json beside this file) says what the experts,
gates, scales and tasks are; `ept_model.safetensors` holds the tensors:

    <module path>.ept.A [r, width]            <module path>.ept.B [height, r]
    <module path>.ept.kernels.<i>             released: [max(1, out // s), s]; paper: [s, s]
    <module path>.ept.router.weight [experts, in]
    <module path>.ept.router.bias [experts]   released only
    <module path>.ept.task_embedding [rows >= tasks, in]
    shared.ept.A, shared.ept.B                where all linears share one pair
    heads.<task>.<parameter of the task model>
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from eptc.checkpoint.base import BaseModel, read_json
from eptc.checkpoint.contents import (
    Contents,
    ReadOptions,
    Routing,
    Source,
    check_fit,
    check_routing,
    consume_all,
)  # fmt: skip
from eptc.errors import CheckpointError, OptionError
from eptc.ir import (
    Adapter,
    Branch,
    CellScaledLowRank,
    Delta,
    Gate,
    Kronecker,
    PerTask,
    Routed,
    TaskRouter,
    TokenRouter,
)
from eptc.runtime.routing import STATIC, RoutingSpec
from eptc.tasks import Task
from eptc.tensors import LazyTensor, SafetensorsFile

__all__ = ["CONFIG", "SCHEMA_VERSION", "read_config", "read_native"]

CONFIG = "ept_config.json"
MODEL = "ept_model.safetensors"
SCHEMA_VERSION = 1

_KEY = re.compile(
    r"(?P<module>.+)\.ept\.(?P<part>A|B|kernels\.\d+|router\.weight|router\.bias|task_embedding)"
)
_HEAD = re.compile(r"heads\.(?P<rest>.+)")


def read_native(path: Path, base: BaseModel, options: ReadOptions) -> Contents:
    """Read a native checkpoint.

    Args:
        path: the folder.
        base: the base model it was trained on.
        options: top_k and tasks must be None or what the checkpoint says.

    Raises:
        CheckpointError: a configuration the schema does not admit; missing, extra, misshapen or
            non-finite tensors; a base that does not fit.
        OptionError: an option contradicts the checkpoint.
    """
    config = read_config(path)
    described = tuple(Task.from_json(task) for task in config["tasks"])
    _check_options(config, described, options.top_k, options.tasks)
    routing = _routing(config, options.routing)
    if config["base"]["model_type"] != base.config.get("model_type"):
        raise CheckpointError(
            f"{path} was trained on a {config['base']['model_type']} model, {base.path} is a "
            f"{base.config.get('model_type')}",
            fix="give the base model it was trained on with --base",
        )
    if not (path / MODEL).is_file():
        raise CheckpointError(f"{path} has no {MODEL}", expected=f"{CONFIG} and {MODEL}")
    source = Source(path, SafetensorsFile(path / MODEL))
    modules = sorted({m["module"] for n in source.finite if (m := _KEY.fullmatch(n))} - {"shared"})
    _check_modules(path, config, base, source, modules)
    adapters = _adapters(config, base, source, modules)
    heads = _heads(source, described, base)
    consume_all(source)
    return Contents(
        format="native",
        variant=config["variant"],
        adapters=adapters,
        heads=heads,
        tasks=described,
        top_k=config["top_k"],
        kernel_sizes=tuple(config["kernel_sizes"]),
        tensors=source.finite,
        config=config,
        base_sha256=config["base"].get("sha256"),
        routing=routing,
    )


def read_config(path: Path) -> dict[str, Any]:
    """Return ept_config.json, checked against the JSON Schema and across its fields.

    Raises:
        CheckpointError: what is wrong and where.
    """
    import jsonschema

    config = read_json(path / CONFIG, CheckpointError)
    version = config.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise CheckpointError(
            f"{path / CONFIG} has schema version {version}",
            expected=f"{SCHEMA_VERSION} or older",
            fix="upgrade ept-compiler",
        )
    schema = json.loads(
        importlib.resources.files("eptc.checkpoint").joinpath("ept_config.schema.json").read_text()
    )
    draft = jsonschema.Draft202012Validator
    # JSON Schema calls 2.0 an integer; as a count or a size it is a mistake.
    strict = draft.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int)
    extend = jsonschema.validators.extend
    validator = extend(draft, type_checker=strict)(schema)  # type: ignore[no-untyped-call]  # has no types
    error = jsonschema.exceptions.best_match(validator.iter_errors(config))
    if error is not None:
        where = "/".join(map(str, error.absolute_path)) or "the top level"
        raise CheckpointError(f"{path / CONFIG}, {where}: {error.message}")
    _check_config(path, config)
    return config


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Rules that a schema cannot say: between fields, and no NaN, which is above and below all."""
    where, gate = path / CONFIG, config["gate"]
    scale = config["scale"]
    numbers = [gate["temperature"], scale.get("alpha", scale.get("denominator"))]
    numbers += [m["alpha"] for m in config.get("modules", {}).values() if "alpha" in m]
    if not all(map(math.isfinite, numbers)):
        raise CheckpointError(f"{where} has a number that is not finite among {numbers}")
    if config["variant"] == "released":
        if gate["router_input"] != "task":
            raise CheckpointError(
                f"{where} has variant 'released' and a router that reads {gate['router_input']!r}",
                expected="'task', or the variant 'paper'",
            )
        if (gate["temperature"], gate["normalization"]) != (1.0, "softmax"):
            raise CheckpointError(
                f"{where} has variant 'released' with the gate {gate}",
                expected="temperature 1.0 and normalization 'softmax'",
            )
        if config["sharing"] != "per-linear" or config["scale"]["rule"] == "d/T":
            raise CheckpointError(
                f"{where} has variant 'released' with sharing {config['sharing']!r} and scale "
                f"{config['scale']['rule']!r}",
                expected="sharing 'per-linear' and a scale 'alpha/r' or 'alpha/sqrt(r)'",
            )
        if min(config["kernel_sizes"]) < 2:
            raise CheckpointError(f"{where} has a kernel size of 1", expected="2 or more")
    if config["top_k"] > len(config["kernel_sizes"]):
        raise CheckpointError(
            f"{where} has top_k {config['top_k']} of {len(config['kernel_sizes'])} experts"
        )
    names = [task["name"] for task in config["tasks"]]
    if len(set(names)) != len(names):
        raise CheckpointError(f"{where} names a task twice: {', '.join(names)}")


def _check_options(
    config: Mapping[str, Any],
    described: tuple[Task, ...],
    top_k: int | None,
    tasks: tuple[str, ...] | None,
) -> None:
    if top_k is not None and top_k != config["top_k"]:
        raise OptionError(
            f"--top-k {top_k} contradicts the checkpoint, which says {config['top_k']}",
            fix="leave --top-k out: a native checkpoint is complete",
        )
    names = tuple(task.name for task in described)
    if tasks is not None and tasks != names:
        raise OptionError(
            f"--tasks {','.join(tasks)} contradicts the checkpoint, which says {','.join(names)}",
            fix="leave --tasks out: a native checkpoint is complete",
        )


def _check_modules(
    path: Path, config: Mapping[str, Any], base: BaseModel, source: Source, modules: list[str]
) -> None:
    if not modules:
        raise CheckpointError(f"{path} adapts no linear", expected="<module path>.ept.A and so on")
    targets = config["targets"]
    for module in modules:
        if not any(module == t or module.endswith(f".{t}") for t in targets):
            raise CheckpointError(
                f"{path} adapts {module}, which none of its targets names", expected=str(targets)
            )
    matched = [m for m in base.linears for t in targets if m == t or m.endswith(f".{t}")]
    if missing := sorted(set(matched) - set(modules)):
        raise CheckpointError(
            f"{path} has no tensors for {len(missing)} linears its targets name: "
            + ", ".join(missing[:3]),
            fix="save the whole checkpoint again, or narrow `targets` to what was trained",
        )
    if unknown := sorted(set(config.get("modules", {})) - set(modules)):
        raise CheckpointError(
            f"{path / CONFIG}: `modules` names {unknown[0]}, which has no tensors"
        )
    shapes = {}
    for module in modules:
        router = source.finite.get(f"{module}.ept.router.weight")
        if router is not None and len(router.shape) == 2 and module in base.linears:
            shapes[module] = (base.linears[module][0], router.shape[1])
        else:
            shapes[module] = base.linears.get(module, (0, 0))
    check_fit(path, base, shapes)


def _adapters(
    config: Mapping[str, Any], base: BaseModel, source: Source, modules: list[str]
) -> dict[str, Adapter]:
    shared: tuple[LazyTensor, LazyTensor] | None = None
    if config["sharing"] == "model":
        tallest = max(base.linears[m][0] for m in modules)
        widest = max(base.linears[m][1] for m in modules)
        shared = _subspace(config, source, "shared", config["rank"], tallest, widest)
    return {
        module: _adapter(config, source, module, *base.linears[module], shared)
        for module in modules
    }


def _subspace(
    config: Mapping[str, Any], source: Source, module: str, rank: int, out: int, columns: int
) -> tuple[LazyTensor, LazyTensor]:
    """Take A and B of a module; the paper's may be larger than the largest crop, not smaller."""
    if config["variant"] == "released":
        return (
            source.take(f"{module}.ept.A", (rank, columns // 2)),
            source.take(f"{module}.ept.B", (out // 2, rank)),
        )
    smallest = min(config["kernel_sizes"])
    a = source.take(f"{module}.ept.A", (rank, None))
    b = source.take(f"{module}.ept.B", (None, rank))
    if a.shape[1] < math.ceil(columns / smallest) or b.shape[0] < math.ceil(out / smallest):
        raise CheckpointError(
            f"{module}.ept.A and .B have the shapes {list(a.shape)} and {list(b.shape)}",
            expected=f"[{rank}, {math.ceil(columns / smallest)}] and "
            f"[{math.ceil(out / smallest)}, {rank}] or larger",
        )
    return a, b


def _adapter(
    config: Mapping[str, Any],
    source: Source,
    module: str,
    out: int,
    columns: int,
    shared: tuple[LazyTensor, LazyTensor] | None,
) -> Adapter:
    own = config.get("modules", {}).get(module, {})
    rank = own.get("rank", config["rank"])
    sizes, released = config["kernel_sizes"], config["variant"] == "released"
    a, b = shared or _subspace(config, source, module, rank, out, columns)
    take = source.take
    gate = _gate(config, source, module, columns)
    branches = []
    for e, s in enumerate(sizes):
        shape = (max(1, out // s), s) if released else (s, s)
        kernel = take(f"{module}.ept.kernels.{e}", shape)
        family = CellScaledLowRank if released else Kronecker
        delta: Delta = family(a, b, kernel, out, columns)
        branches.append(Branch(delta, gate(e), _scale(config, own, rank, out, columns, s)))
    return Adapter(module, tuple(branches))


def _gate(
    config: Mapping[str, Any], source: Source, module: str, columns: int
) -> Callable[[int], Gate]:
    """Return what makes the gate of an expert; all gates of a module share one router."""
    experts, rule = len(config["kernel_sizes"]), config["gate"]
    weight = source.take(f"{module}.ept.router.weight", (experts, columns))
    embedding = _embedding(config, source, module, columns)
    if rule["router_input"] != "task":
        reads_task = rule["router_input"] == "token+task"
        router = TokenRouter(
            weight, embedding if reads_task else None, None, config["top_k"],
            rule["temperature"], rule["normalization"],
        )  # fmt: skip
        return functools.partial(Routed, router)
    bias = None
    if config["variant"] == "released":
        bias = source.take(f"{module}.ept.router.bias", (experts,))
    return functools.partial(
        PerTask,
        TaskRouter(
            weight, bias, embedding, config["top_k"], rule["temperature"], rule["normalization"]
        ),
    )


def _routing(config: Mapping[str, Any], asked: Routing) -> RoutingSpec:
    """Return what an answer depends on.

    Raises:
        OptionError: a way of routing that a pyramid does not have.
    """
    reads = config["gate"]["router_input"]
    known: tuple[Routing, ...] = ("exact",) if reads == "task" else ("exact", "frozen")
    check_routing(asked, known, f"a checkpoint whose routers read the {reads}")
    return STATIC if reads == "task" else RoutingSpec("token" if asked == "exact" else "frozen")


def _embedding(config: Mapping[str, Any], source: Source, module: str, columns: int) -> LazyTensor:
    embedding = source.take(f"{module}.ept.task_embedding", (None, columns))
    if embedding.shape[0] < len(config["tasks"]):
        raise CheckpointError(
            f"{embedding.name} has {embedding.shape[0]} rows",
            expected=f"at least {len(config['tasks'])}, one per task",
        )
    return embedding


def _scale(
    config: Mapping[str, Any], own: Mapping[str, Any], rank: int, out: int, columns: int, s: int
) -> float:
    rule = config["scale"]
    if rule["rule"] == "d/T":
        return float(math.ceil(min(out, columns) / s) / rule["denominator"])
    alpha = own.get("alpha", rule["alpha"])
    return float(alpha / (rank if rule["rule"] == "alpha/r" else math.sqrt(rank)))


def _heads(
    source: Source, tasks: tuple[Task, ...], base: BaseModel
) -> dict[str, dict[str, LazyTensor]]:
    heads: dict[str, dict[str, LazyTensor]] = {}
    # Longest first: of the tasks `a` and `a.b`, the tensor heads.a.b.x belongs to the latter.
    names = sorted((task.name for task in tasks), key=len, reverse=True)
    for name in [n for n in source.left if _HEAD.fullmatch(n)]:
        rest = name.removeprefix("heads.")
        owner = next((task for task in names if rest.startswith(f"{task}.")), None)
        if owner is None:
            raise CheckpointError(
                f"{source.path} has the head tensor {name}, which names no task",
                expected=f"heads.<task>.<parameter>, tasks: {', '.join(names)}",
            )
        tensor = source.finite[name]
        heads.setdefault(owner, {})[rest.removeprefix(f"{owner}.")] = source.take(
            name, tensor.shape
        )
    if base.architecture.kind == "encoder-classifier":
        bare = [task.name for task in tasks if task.name not in heads]
        if bare and heads:
            raise CheckpointError(
                f"{source.path} has heads for {', '.join(sorted(heads))}, none for {bare[0]!r}",
                expected="a head for every task",
            )
    return heads
