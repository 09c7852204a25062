"""Engines of precision plans, tried one after another on labelled data."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir

from eptc import bundle, lower
from eptc.cache import cache_folder, code_hash
from eptc.lower.weights import PART
from eptc.parity_gate import Example, answers, compare_answers, right_answers
from eptc.precision_plan import LEVELS, PrecisionPlan, stored_weights
from eptc.run_passes import Step, run_graph_passes
from eptc.runtime import Engine, load_manifest

__all__ = ["EXACT", "LOWER", "Out", "Trials", "levels"]

logger = logging.getLogger(__name__)

# Rows on which single weights are tried; plans are tried on all.
_TRIED = 128
EXACT, *LOWER = LEVELS


class Out(Exception):  # noqa: N818  # a signal, not an error
    """The evaluations or the minutes are used up."""


class Trials:
    """Engines of plans, made in one folder from one file with every weight in every level."""

    def __init__(
        self,
        graphs: Mapping[str, onnx_ir.Model],
        exact: Path,
        passes: Callable[[PrecisionPlan], Sequence[Step]],
        examples: Sequence[Example],
        progress: Callable[[Any], None],
    ) -> None:
        self._graphs = graphs
        self._exact = exact
        self._passes = passes
        self._progress = progress
        self._folder = exact.with_name("trial")
        self.evaluated = 0
        self._allowed, self._until = 0, math.inf
        lowered = _lowered(graphs, passes)
        self.levels = _known(lowered)
        self._bytes = {level: _bytes(found) for level, found in lowered.items()}
        self._folder.mkdir()
        self._library = lower.WeightsFile.write(
            {
                f"{level}/{name}": model
                for level, found in lowered.items()
                for name, model in found.items()
            },
            self._folder,
        )
        manifest = load_manifest(exact)
        graph_files = {spec.file for spec in manifest.graphs.values()}
        for name in manifest.files:
            if name not in graph_files and name != lower.WEIGHTS:
                shutil.copy(exact / name, self._folder / name)
        self._manifest = manifest

        self._examples = list(examples)
        places = np.linspace(0, len(self._examples) - 1, min(len(self._examples), _TRIED))
        self._some = [self._examples[place] for place in places.astype(int)]
        with Engine.load(exact, providers=["cpu"]) as engine:
            assert engine.task is not None
            self._task = engine.task
            self._want = answers(engine, self._examples)
            self._want_some = answers(engine, self._some)
        self._labels = right_answers(self._task, self._examples)
        self._memory = _Memory.open(self._key())

    def __enter__(self) -> Trials:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def limit(self, evaluations: int, minutes: float | None) -> None:
        """Allow so many evaluations and so many minutes from now on."""
        self._allowed = evaluations
        self._until = math.inf if minutes is None else time.monotonic() + 60 * minutes

    def cost(self, plan: PrecisionPlan) -> int:
        """Return the bytes that the weights of a plan take."""
        return sum(self._bytes[level][name] for name, level in plan.weights.items())

    def error(self, plan: PrecisionPlan) -> float:
        """Return the mean squared error of a plan's scores on some rows."""

        def measure(engine: Engine) -> float:
            got = answers(engine, self._some)
            return float(np.mean((got.scores - self._want_some.scores) ** 2))

        return float(self._evaluate("error", plan, measure))

    def scores(self, plan: PrecisionPlan) -> dict[str, Any]:
        """Return how a plan's answers compare with the exact ones on all rows."""

        def measure(engine: Engine) -> dict[str, Any]:
            got = answers(engine, self._examples)
            return compare_answers(self._task, self._want, got, self._labels)

        return dict(self._evaluate("scores", plan, measure))

    def _evaluate(self, what: str, plan: PrecisionPlan, measure: Callable[[Engine], Any]) -> Any:
        """Return what was measured of a plan, now or by an earlier search; either counts."""
        if self.evaluated >= self._allowed:
            raise Out(f"all {self._allowed} evaluations were used")
        if time.monotonic() >= self._until:
            raise Out("the time was up")
        self.evaluated += 1
        self._progress(f"search: evaluation {self.evaluated} of {self._allowed} at most")
        key = hashlib.sha256(json.dumps([what, plan.to_json()]).encode()).hexdigest()
        found = self._memory.get(key)
        if found is None:
            graphs = _copies(self._graphs)
            run_graph_passes(graphs, self._passes(plan))
            self._write(graphs)
            with Engine.load(self._folder, providers=["cpu"]) as engine:
                found = measure(engine)
            self._memory.put(key, found)
        return found

    def _write(self, graphs: Mapping[str, onnx_ir.Model]) -> None:
        """Put the engine of some graphs into the folder, in the place of the last one."""
        for name, model in graphs.items():
            self._library.write_graph(model, self._folder / self._manifest.graphs[name].file)
        bundle.write_manifest(
            self._folder,
            dataclasses.replace(self._manifest, files={}),
            {lower.WEIGHTS: self._library.sha256},
        )

    def _key(self) -> str:
        """Return what evaluations depend on beside the plan."""
        manifest = self._manifest.to_json()
        content = {
            # Its task, prompt and lengths too: files that are equal may be asked otherwise.
            "manifest": {**manifest, "passes": None, "parity": None},
            "library": self._library.sha256,
            "examples": self._examples,
            "code": _code(),
            "versions": [
                importlib.metadata.version(name) for name in ("ept-compiler", "onnx-ir", "numpy")
            ],
        }
        import onnxruntime

        content["onnxruntime"] = onnxruntime.__version__
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@functools.cache
def _code() -> str:
    """Return the SHA-256 (hex) of the code that makes engines and compares their answers."""
    home = Path(__file__).parent
    folders = ("passes", "lower", "runtime", "parity_gate")
    return code_hash(path for name in folders for path in sorted((home / name).glob("*.py")))


class _Memory:
    """What was evaluated, a JSON line for each, in a file that the next search reads."""

    def __init__(self, path: Path | None, known: dict[str, Any]) -> None:
        self._path = path
        self._known = known

    @classmethod
    def open(cls, key: str) -> _Memory:
        """Read what is known; without a cache folder nothing is, and nothing is kept."""
        folder = cache_folder()
        if folder is None:
            return cls(None, {})
        path, known = folder / "search" / f"{key}.jsonl", {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for line in path.read_text("utf-8").splitlines() if path.exists() else ():
                # The last line of a search that was killed may be half a line.
                try:
                    found, value = json.loads(line)
                except (ValueError, TypeError):
                    continue
                if isinstance(found, str) and isinstance(value, float | dict):
                    known[found] = value
        except (OSError, UnicodeDecodeError) as error:
            logger.warning("the search cannot be resumed: %s", error)
            return cls(None, {})
        return cls(path, known)

    def get(self, key: str) -> Any:
        return self._known.get(key)

    def put(self, key: str, value: Any) -> None:
        self._known[key] = value
        if self._path is None:
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write("\n" + json.dumps([key, value]))
        except OSError as error:
            logger.warning("the search cannot be resumed: %s", error)
            self._path = None


def levels(
    graphs: Mapping[str, onnx_ir.Model], passes: Callable[[PrecisionPlan], Sequence[Step]]
) -> dict[str, tuple[str, ...]]:
    """Return the levels that each weight can be stored in, of those that have a choice.

    Args:
        graphs: the exact graphs; left as they are.
        passes: the passes that bring about a plan.
    """
    return _known(_lowered(graphs, passes))


def _lowered(
    graphs: Mapping[str, onnx_ir.Model], passes: Callable[[PrecisionPlan], Sequence[Step]]
) -> dict[str, dict[str, onnx_ir.Model]]:
    """Return the graphs with every weight in each level that it can be stored in."""
    found = {level: _copies(graphs) for level in LEVELS}
    for level in LOWER:
        plan = PrecisionPlan(dict.fromkeys(stored_weights(graphs), level))
        run_graph_passes(found[level], passes(plan))
    return found


def _known(lowered: Mapping[str, Mapping[str, onnx_ir.Model]]) -> dict[str, tuple[str, ...]]:
    stored = {level: stored_weights(graphs) for level, graphs in lowered.items()}
    return {
        name: found
        for name in stored[EXACT]
        if len(found := tuple(n for n in LEVELS if stored[n].get(name) == n)) > 1
    }


def _copies(graphs: Mapping[str, onnx_ir.Model]) -> dict[str, onnx_ir.Model]:
    return {name: model.clone() for name, model in graphs.items()}


def _bytes(graphs: Mapping[str, onnx_ir.Model]) -> dict[str, int]:
    """Return how many bytes each weight takes with its scales, by name; once for all graphs."""
    sizes: dict[str, int] = {}
    for name, value in {
        name: value
        for model in graphs.values()
        for name, value in model.graph.initializers.items()
    }.items():
        if value.const_value is not None:
            weight = name.partition(PART)[0]
            sizes[weight] = sizes.get(weight, 0) + value.const_value.nbytes
    return sizes
