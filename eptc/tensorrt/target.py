"""The target `tensorrt`: a bundle whose graphs TensorRT takes, and what builds its engines."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir

from eptc.errors import OptionError
from eptc.examples_file import read_examples, read_task_examples
from eptc.passes.clip_integers import ClipIntegers
from eptc.passes.count_in_float import CountInFloat
from eptc.runtime.inputs import prepare
from eptc.runtime.loading import open_tokenizer
from eptc.runtime.manifest import Manifest
from eptc.runtime.row_tasks import RowTasks
from eptc.target_base import Target
from eptc.tensorrt.build_engine import BuildError, machine, package
from eptc.tensorrt.operators import Version, check_graphs, parse_version
from eptc.tensorrt.profiles import (
    Ranges,
    check_given,
    dimension,
    parse_profiles,
    profiles,
    ranges,
)
from eptc.tensorrt.scripts import write_scripts
from eptc.text import max_positions

if TYPE_CHECKING:
    from eptc.job import Job
    from eptc.options import Options

__all__ = ["TensorRT", "missing"]


@dataclasses.dataclass(frozen=True)
class TensorRT(Target):
    """A bundle that ONNX Runtime runs and TensorRT can be given.

    Args:
        version: TensorRT's.
        given: sizes of dimensions that the caller said.
        probe: the file of examples whose lengths tell the others; None: none does.
        build: whether engines are built here.
    """

    name = "tensorrt"
    optimize_for = "any"
    graph_passes = (ClipIntegers(), CountInFloat())

    version: Version = (0, 0)
    given: Ranges = dataclasses.field(default_factory=dict)
    probe: Path | None = None
    build: bool = False

    def told(self, options: Options) -> TensorRT:
        """Return the target as the options say it; raise OptionError for what no build can do."""
        if options.build:
            if lacking := missing():
                raise OptionError(
                    f"--build was given, and engines cannot be built here: {lacking}",
                    expected="the package tensorrt (10 or newer), an NVIDIA driver and a GPU",
                    fix="leave --build out, and run build_engine.py of the bundle where they are",
                )
            if not options.verify:
                raise OptionError(
                    "--build was given together with --no-verify, and an engine is published with "
                    "its proof",
                    fix="leave one out",
                )
        return dataclasses.replace(
            self,
            version=parse_version(options.tensorrt_version),
            given=parse_profiles(options.profile),
            probe=None if options.probe is None else Path(options.probe),
            build=options.build,
        )

    def check_graphs(self, graphs: Mapping[str, onnx_ir.Model], job: Job) -> None:
        """Raise OptionError for graphs that TensorRT does not take, or profiles they do not."""
        names = [name for role, graph in graphs.items() for name in _dimensions(role, graph)]
        architecture = job.source.base.architecture
        positions = None
        if architecture.kind != "encoder-decoder":
            positions = max_positions(job.config.to_dict())
            if positions is not None and (prompts := job.source.contents.prompts) is not None:
                positions -= prompts.length  # which stand before the text
        check_given(self.given, names, positions, architecture.kind)
        check_graphs(graphs, self.version)

    def notes(self, manifest: Manifest) -> tuple[str, ...]:
        """Say what TensorRT does not check of an engine of several tasks."""
        if not manifest.tasks:
            return ()
        return (
            "ONNX Runtime refuses a row whose task_ids names no task, TensorRT need not: whoever "
            "runs the engines has to check them, as eptc.tensorrt.engine does",
        )

    def add(self, directory: Path, manifest: Manifest, out: Path) -> None:
        """Write profiles, the build script and the commands of trtexec."""
        lengths = [] if self.probe is None else _lengths(directory, manifest, self.probe)
        found = ranges(manifest, lengths, self.given)
        shapes = profiles(manifest.graphs, found)
        write_scripts(out, manifest, found, shapes, self.version)


def _dimensions(role: str, graph: onnx_ir.Model) -> list[str]:
    """Return what the dimensions of a graph are called in profiles."""
    found = {
        size.value
        for value in graph.graph.inputs
        if value.shape is not None and not value.is_initializer()
        for size in value.shape
        if isinstance(size, onnx_ir.SymbolicDim) and size.value is not None
    }
    return [dimension(role, name, found) for name in sorted(found)]


def _lengths(directory: Path, manifest: Manifest, probe: Path) -> list[int]:
    """Return the tokens of each example, as the engine cuts it; none without a tokenizer."""
    tokenizer = open_tokenizer(directory, manifest)
    if tokenizer is None:
        return []
    found: list[int] = []
    rows, several = RowTasks(manifest), bool(manifest.tasks)
    examples: Mapping[Any, Any]
    if several:
        by_task = read_task_examples(probe, manifest.tasks)
        names = [task.name for task in manifest.tasks]
        examples = {names.index(name): each for name, each in by_task.items()}
    else:
        examples = {0: read_examples(probe, manifest.task)}
    for place, given in examples.items():
        places = rows.places(len(given), place if several else None)
        encoded = tokenizer.encode(
            prepare(given, rows.at(places)), truncate=True, limits=rows.limits(places)
        )
        found += [len(each.ids) for each in encoded]
    return found


def missing() -> str | None:
    """Return what is missing here to build engines; None where nothing is."""
    try:
        package()
        machine()
    except BuildError as error:
        return str(error)
    return None
