"""The configuration: its JSON form, what it refuses, and what attaching refuses."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eptc.errors import BaseModelError, CheckpointError, OptionError, TaskError
from eptc.nn import (
    BaseInfo,
    EptConfig,
    EptModel,
    GateConfig,
    ModuleConfig,
    ScaleConfig,
    load_base,
)
from eptc.tasks import GLUE, Task

MakeBase = Callable[..., Path]

SENTIMENT = Task("sentiment", "classification", labels=("no", "yes"), aliases=("mood",))

TASKS = (SENTIMENT, Task("other", "regression"))
FIELDS: dict[str, Any] = {
    "variant": "paper",
    "targets": ("query",),
    "kernel_sizes": (2, 4),
    "top_k": 1,
    "rank": 4,
    "tasks": TASKS,
}

GOOD: dict[str, dict[str, Any]] = {
    "paper": {},
    "released": {"variant": "released"},
    "everything": {
        "scale": ScaleConfig("d/T", denominator=3),
        "gate": GateConfig("task", 0.5, "none"),
        "modules": {"a.query": ModuleConfig(rank=2)},
        "base": BaseInfo("bert", "tiny", "0" * 64),
        "tasks": tuple(GLUE.values()),
    },
    "shared": {"sharing": "model", "scale": ScaleConfig("alpha/sqrt(r)", alpha=2.5)},
}


@pytest.mark.parametrize("changes", GOOD.values(), ids=GOOD)
def test_json_round_trip(changes: dict[str, Any]) -> None:
    config = EptConfig(**{**FIELDS, **changes})
    data = json.loads(json.dumps(config.to_json()))
    assert EptConfig.from_json(data) == config
    assert EptConfig.from_json(data).to_json() == data


def test_json_form() -> None:
    config = EptConfig(**{**FIELDS, "modules": {"a.query": ModuleConfig(alpha=3)}})
    assert config.to_json() == {
        "schema_version": 1,
        "variant": "paper",
        "base": {"model_type": None, "name": None, "sha256": None},
        "kernel_sizes": [2, 4],
        "top_k": 1,
        "rank": 4,
        "gate": {"router_input": "task", "temperature": 0.05, "normalization": "sum"},
        "scale": {"rule": "alpha/r", "alpha": 16},
        "sharing": "per-linear",
        "modules": {"a.query": {"alpha": 3}},
        "targets": ["query"],
        "tasks": [task.to_json() for task in TASKS],
    }
    gate = EptConfig(**{**FIELDS, "variant": "released"}).gates
    assert (gate.temperature, gate.normalization) == (1.0, "softmax")


BAD_FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "variant": ({"variant": "new"}, "variant is 'new'"),
    "sharing": ({"sharing": "some"}, "sharing is 'some'"),
    "no targets": ({"targets": ()}, "targets is empty"),
    "targets as text": ({"targets": "query"}, "targets is 'query'"),
    "a target twice": ({"targets": ("q", "q")}, "targets names something twice"),
    "no sizes": ({"kernel_sizes": ()}, r"kernel_sizes is \(\)"),
    "a size of 0": ({"kernel_sizes": (0,)}, "a kernel size is 0"),
    "a size of 1, released": ({"variant": "released", "kernel_sizes": (1,)}, "a kernel size is 1"),
    "top_k of 0": ({"top_k": 0}, "top_k is 0"),
    "top_k above the experts": ({"top_k": 3}, "top_k is 3"),
    "top_k as a truth": ({"top_k": True}, "top_k is True"),
    "rank": ({"rank": 2.0}, r"rank is 2\.0"),
    "no tasks": ({"tasks": ()}, r"tasks is \(\)"),
    "names for tasks": ({"tasks": ("cola",)}, "tasks is"),
    "a task twice": ({"tasks": (SENTIMENT, SENTIMENT)}, "tasks names something twice"),
    "released gate": ({"variant": "released", "gate": GateConfig()}, "'released' has the gate"),
    "released sharing": ({"variant": "released", "sharing": "model"}, "shares A and B"),
    "released d/T": (
        {"variant": "released", "scale": ScaleConfig("d/T", denominator=1)}, "rule 'd/T'",
    ),
    "shared rank": (
        {"sharing": "model", "modules": {"a": ModuleConfig(rank=1)}}, "rank of its own",
    ),
    "alpha under d/T": (
        {"scale": ScaleConfig("d/T", denominator=1), "modules": {"a": ModuleConfig(alpha=1)}},
        "a has an alpha",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "text"), BAD_FIELDS.values(), ids=BAD_FIELDS)
def test_refuses_fields(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(OptionError, match=text):
        EptConfig(**{**FIELDS, **changes})


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: GateConfig("tokens"), "router_input is 'tokens'"),  # type: ignore[arg-type]
        (lambda: GateConfig(temperature=0), "temperature is 0"),
        (lambda: GateConfig(temperature=float("nan")), "temperature is nan"),
        (lambda: GateConfig(normalization="max"), "normalization is 'max'"),  # type: ignore[arg-type]
        (lambda: ScaleConfig("r"), "rule is 'r'"),  # type: ignore[arg-type]
        (lambda: ScaleConfig("alpha/r"), r"scale\.alpha is None"),
        (lambda: ScaleConfig("d/T", alpha=1, denominator=2), r"scale\.alpha is given"),
        (lambda: ScaleConfig("alpha/r", alpha=True), "alpha is True"),
        (lambda: ModuleConfig(rank=0), "rank is 0"),
        (lambda: ModuleConfig(alpha=-1), "alpha is -1"),
        (lambda: BaseInfo(sha256=3), r"base\.sha256 is 3"),  # type: ignore[arg-type]
    ],
)
def test_refuses_parts(make: Any, text: str) -> None:
    with pytest.raises(OptionError, match=text):
        make()


BAD_JSON: dict[str, tuple[Any, str]] = {
    "a list": ([], r"is \[\]"),
    "no version": ({"schema_version": None}, "schema_version is None"),
    "an unknown key": ({"top-k": 2}, "unknown key 'top-k': did you mean 'top_k'"),
    "an unknown inner key": ({"gate": {"temprature": 1}}, "'gate.temprature': did you mean 'temp"),
    "a missing key": ({"rank": "gone"}, "the key 'rank' is missing"),
    "a wrong value": ({"rank": "4"}, "rank is '4'"),
    "sizes as a number": ({"kernel_sizes": 2}, "kernel_sizes is 2"),
    "modules as a list": ({"modules": []}, r"modules is \[\]"),
    "an override as a number": ({"modules": {"q": 4}}, r"modules\['q'\] is 4"),
    "a scale of no rule": ({"scale": {"rule": "a", "alpha": 1}}, "rule is 'a'"),
}


@pytest.mark.parametrize(("changes", "text"), BAD_JSON.values(), ids=BAD_JSON)
def test_refuses_json(changes: Any, text: str) -> None:
    data = changes
    if isinstance(changes, dict):
        data = {**EptConfig(**FIELDS).to_json(), **changes}
        data = {key: value for key, value in data.items() if value != "gone"}
    with pytest.raises(CheckpointError) as caught:
        EptConfig.from_json(data)
    assert caught.value.found.startswith("ept_config.json")
    assert re.search(text, str(caught.value)), str(caught.value)


def test_refuses_json_tasks() -> None:
    data = {**EptConfig(**FIELDS).to_json(), "tasks": [{"name": "a", "sort": "regression"}]}
    with pytest.raises(TaskError, match="unknown key 'sort'"):
        EptConfig.from_json(data)


BAD_SITES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no such linear": ({"targets": ("query", "qurey")}, {}, "named 'qurey'"),
    "a part of a name": ({"targets": ("uery",)}, {}, "named 'uery'"),
    "an embedding": ({"targets": ("word_embeddings",)}, {}, "is a Embedding"),
    "an override of nothing": ({"modules": {"query": ModuleConfig(rank=1)}}, {}, "modules names"),
    "a head the base has not": ({}, {"head_modules": ["pre"]}, "no module 'pre'"),
    "a target in a head": (
        {"targets": ("dense",)},
        {"head_modules": ["bert.pooler.dense"]},
        "bert.pooler.dense is part of bert.pooler.dense",
    ),
    "a task without labels": ({"tasks": (GLUE["rte"],)}, {}, "'rte' is 'text-to-text'"),
}


@pytest.mark.parametrize(("changes", "options", "text"), BAD_SITES.values(), ids=BAD_SITES)
def test_refuses_to_attach(
    make_base: MakeBase, changes: dict[str, Any], options: dict[str, Any], text: str
) -> None:
    config = EptConfig(**{**FIELDS, **changes})
    with pytest.raises(OptionError, match=text):
        EptModel.attach(load_base(make_base()), config, **options)


def test_refuses_another_type(make_base: MakeBase) -> None:
    config = EptConfig(**FIELDS, base=BaseInfo("roberta"))
    with pytest.raises(BaseModelError, match="is a 'bert'"):
        EptModel.attach(load_base(make_base()), config)
    texts = dataclasses.replace(EptConfig(**FIELDS), targets=("q",), tasks=(GLUE["rte"],))
    with pytest.raises(OptionError, match="no heads"):
        EptModel.attach(load_base(make_base("t5")), texts, head_modules=["lm_head"])


def test_unknown_tasks_name_the_nearest(make_base: MakeBase) -> None:
    model = EptModel.attach(load_base(make_base()), EptConfig(**FIELDS))
    with pytest.raises(TaskError, match="did you mean 'sentiment'"):
        model(task="sentimant")
    with pytest.raises(TaskError, match="no task is active"):
        model()
    with model.task("mood") as task_id:
        assert task_id == 0
