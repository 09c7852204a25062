"""Build the engines of a bundle where there is a GPU, and prove them as the bundle was proven."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eptc import bundle
from eptc.errors import InputError, OptionError
from eptc.nn.frozen import frozen
from eptc.parity_gate import LocalVerifier, ParityReport, Subject, refuse
from eptc.parity_gate.compare import bound_of
from eptc.parity_gate.gate import make_probes, run_probes
from eptc.parity_gate.outputs import WRITTEN
from eptc.parity_gate.probes import Probe, builtin_examples
from eptc.parity_gate.reference import frozen_gates
from eptc.parity_gate.several import mixed_probes
from eptc.planning import Plan
from eptc.runtime import Engine
from eptc.runtime.manifest import Manifest
from eptc.tasks import chosen
from eptc.tensorrt.build_engine import PROFILES, RECORD
from eptc.tensorrt.engine import load
from eptc.tensorrt.profiles import Range, Ranges
from eptc.tensorrt.scripts import SCRIPT

__all__ = ["build_engines", "check_plan", "fits", "prove_engine"]

Progress = Callable[[Any], None]


def check_plan(plan: Plan) -> None:
    """Raise OptionError where the reference is too large to prove an engine with."""
    if plan.verification == "block by block":
        raise OptionError(
            "--build was given, and the model is verified block by block for want of memory, "
            "which an engine cannot be",
            fix="give a larger --max-memory where there is as much, or leave --build out and run "
            "build_engine.py of the bundle",
        )


def build_engines(
    directory: Path, manifest: Manifest, subject: Subject, progress: Progress
) -> Manifest:
    """Build a bundle's engines with its own script, prove them, and list them in its manifest.

    Args:
        directory: the bundle's folder, its scripts in it.
        manifest: its manifest.
        subject: what the engines are compared with.
        progress: called with what is being done.

    Raises:
        InputError: TensorRT does not build them.
        ParityError: they do not give the reference's answers.
    """
    progress("build the engines")
    ran = subprocess.run(  # noqa: S603  # this interpreter, the bundle's own script
        [sys.executable, SCRIPT], cwd=directory, capture_output=True, text=True, check=False
    )
    if ran.returncode:
        last = "\n".join(ran.stderr.strip().splitlines()[-5:])
        raise InputError(
            f"TensorRT does not build the engines:\n{last}",
            fix="leave --build out; the bundle itself is sound",
        )
    dimensions = json.loads((directory / PROFILES).read_text("utf-8"))["dimensions"]
    found = {
        name: Range(size["min"], size["opt"], size["max"]) for name, size in dimensions.items()
    }
    with contextlib.closing(LocalVerifier(subject)) as verifier, load(directory) as engine:
        report, left_out = prove_engine(engine, verifier, subject, found, progress)
    refuse(report, "the bundle passed in ONNX Runtime, so TensorRT computes something else")
    record = json.loads((directory / RECORD).read_text("utf-8"))
    by = {key: record[key] for key in ("tensorrt", "gpu", "compute_capability", "driver")}
    proof = {**report.summary(), "probes_outside_the_profile": left_out, "engines_by": by}
    parity = {**manifest.parity, "tensorrt": proof}
    return bundle.write_manifest(directory, dataclasses.replace(manifest, parity=parity))


def prove_engine(
    engine: Engine,
    verifier: LocalVerifier,
    subject: Subject,
    found: Ranges,
    progress: Progress,
) -> tuple[ParityReport, int]:
    """Run the output gate and the decision gate on an engine whose graphs were proven before.

    Args:
        engine: the engine, whatever runs it.
        verifier: the reference side, the whole model in memory.
        subject: what it is compared with.
        found: the sizes it was built for.
        progress: called with what is being done.

    Returns:
        The report, which has passed or not, and how many probes were left out since the engine
        was not built for their sizes.

    Raises:
        OptionError: it was built for the sizes of too few probes to be proven.
    """
    reference, tokenizer = verifier.reference, verifier.tokenizer
    manifest, examples = engine.manifest, subject.examples
    empty = ParityReport((), bound_of(manifest.precision), {}, 0.0, (), (), 0)
    task_ids = chosen(subject.task, reference.tasks)
    views = [engine.for_task(place) for place in range(len(task_ids))]
    left_out = 0
    parts: dict[str, ParityReport] = {}
    with frozen(reference, frozen_gates(manifest)):
        for view, task_id in zip(views, task_ids, strict=True):
            name = reference.tasks[task_id].name
            own = examples.get(name) if isinstance(examples, Mapping) else examples
            probes, _ = make_probes(view, reference, task_id, tokenizer, own)
            kept = _fitting(probes, manifest, found)
            left_out += len(probes) - len(kept)
            parts[name] = run_probes(view, reference, name, kept, empty, progress)
            if not parts[name].agrees or len(views) == 1:
                return parts[name], left_out
        given = {
            task.name: (examples or {}).get(task.name) or builtin_examples(task)
            for task in manifest.tasks
            if examples is None or isinstance(examples, Mapping)
        }
        probes = mixed_probes(engine, reference, tokenizer, given)
        kept = _fitting(probes, manifest, found)
        left_out += len(probes) - len(kept)
        mixed = run_probes(engine, reference, list(parts), kept, empty, progress)
    return empty.of_tasks(parts, mixed), left_out


def _fitting(probes: Sequence[Probe], manifest: Manifest, found: Ranges) -> list[Probe]:
    """Return the probes that an engine was built for.

    Raises:
        OptionError: none, or no text where there is some: seeded tokens say nothing about it. Of
            rows of several tasks seeded tokens are enough, each task having been proven by itself.
    """
    kept = [probe for probe in probes if fits(probe, manifest, found)]
    texts = [probe for probe in probes if not probe.synthetic and probe.task_ids is None]
    needed = texts or probes
    if not any(fits(probe, manifest, found) for probe in needed):
        shapes = sorted({probe.shape for probe in needed})
        raise OptionError(
            f"the engine was built for batch={found['batch']} and sequence={found['sequence']}, "
            "which no batch fits that would prove it",
            expected="batches such as " + ", ".join(f"{b} x {n}" for b, n in shapes[:3]),
            fix="give a wider --profile, or --probe with texts of the engine's sizes",
        )
    return kept


def fits(probe: Probe, manifest: Manifest, found: Ranges) -> bool:
    """Return whether an engine was built for all sizes that a probe runs it with.

    Args:
        probe: the batch.
        manifest: the engine's.
        found: the sizes it was built for.
    """
    batch, length = probe.shape
    sizes = {"batch": batch, "sequence": length}
    if manifest.generation is not None:
        new = min(WRITTEN, manifest.generation.max_new_tokens)
        if manifest.kind == "encoder-decoder":
            fed = new if probe.answer is None else probe.answer.shape[1] - 1
            sizes |= {"decoder_sequence": fed, "past_sequence": fed}
        else:
            # The prompt and what was written after it are run at once, too.
            sizes |= {"sequence": length + new, "past_sequence": length + new}
    return all(found[name].low <= size <= found[name].high for name, size in sizes.items())
