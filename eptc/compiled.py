"""What a build compiles: a model's graphs, to be written, proven and lowered in precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir

from eptc import bundle, lower, text
from eptc.describe import describe, write_texts
from eptc.given_texts import GivenTexts
from eptc.ir import AdaptedModel
from eptc.job import Clock, Job, Progress, Written
from eptc.planning import WRITERS
from eptc.precision_plan import FILE as PLAN
from eptc.run_passes import PassRecord, run_adapter_passes, run_graph_passes
from eptc.runtime.manifest import Manifest

if TYPE_CHECKING:
    from eptc.judge import Judge
    from eptc.parity_gate import Verifier

__all__ = ["Compiled", "Compiler"]


class Compiler:
    """Compiles the model of one build.

    Args:
        job: the build.
        verifier: the reference side; None where nothing is compared with it.
        clock: of the build.
        progress: called with what is being done, and with each finished pass.
    """

    def __init__(
        self, job: Job, verifier: Verifier | None, clock: Clock, progress: Progress
    ) -> None:
        self.job = job
        self.verifier = verifier
        self.clock = clock
        self.progress = progress
        self.layers: dict[str, float] = {}

    def rewrite(self) -> tuple[AdaptedModel, list[PassRecord]]:
        """Run the adapter passes; with a reference, each is followed by the layer gate."""
        job, progress = self.job, self.progress
        passes, task_ids, model = job.adapter_passes(), job.task_ids, job.model
        if self.verifier is None:
            return run_adapter_passes(
                model, passes, task_id=task_ids, probe=None,
                after=lambda record, _: progress(record), origins=job.origins,
            )  # fmt: skip
        from eptc.parity_gate import LayerGate

        stage = f"the {job.source.contents.format} reader"
        gate = LayerGate(self.verifier.layers())
        self.layers[stage] = gate.check(model, stage)

        def after(record: PassRecord, model: AdaptedModel) -> None:
            stage = f"the pass {record.label}"
            self.layers[stage] = gate.check(model, stage)
            progress(record)

        return run_adapter_passes(
            model, passes, task_id=task_ids, probe=gate.probe, after=after, origins=job.origins
        )

    def compile(self, model: AdaptedModel, records: Sequence[PassRecord]) -> Compiled:
        """Run the graph passes on a model's graphs.

        Args:
            model: what the adapter passes made.
            records: what they did.
        """
        job = self.job
        with self.clock.stage("graph passes"):
            graphs = job.bound(model)
            done = run_graph_passes(graphs, job.graph_passes(), job.origins)
            self.told(done)
            job.options.aim.target.check_graphs(graphs, job)
        return Compiled(self, model, graphs, [*records, *done])

    def told(self, records: Sequence[PassRecord]) -> None:
        """Show what passes did."""
        for record in records:
            self.progress(record)


class Compiled:
    """A model as graphs: in float32, until its precision is lowered.

    Args:
        compiler: what made them.
        model: the model.
        graphs: by name.
        records: what every pass so far did.

    Attributes:
        judge: who compares what is written; None where nothing is to be compared.
    """

    def __init__(
        self,
        compiler: Compiler,
        model: AdaptedModel,
        graphs: Mapping[str, onnx_ir.Model],
        records: list[PassRecord],
    ) -> None:
        self.graphs = graphs
        self.records = records
        self._compiler = compiler
        self._model = model
        self.judge = self._judge()

    def write(self, directory: Path, precision: str) -> Manifest:
        """Write a bundle that nobody has compared with anything."""
        compiler, job, model = self._compiler, self._compiler.job, self._model
        source, base = job.source, job.source.base.path
        tokenizer = text.find_tokenizer(source.path, base)
        generation = text.generation_config(base)
        with compiler.clock.stage("write"):
            digests = lower.write(
                self.graphs, directory, threads=WRITERS, in_flight=job.plan.in_flight,
                progress=lambda done, total: compiler.progress(Written(done, total)),
            )  # fmt: skip
            # Settings that config.json leaves out have the values transformers gives them.
            settings = {**job.config.to_dict(), **model.config}
            manifest = describe(
                source, job.task_ids, settings, generation, self.graphs, tokenizer, self.records,
                precision=precision, optimize_for=job.options.provider, plugins=job.plugins,
            )  # fmt: skip
            write_texts(directory, source, model, generation, tokenizer)
            return bundle.write_manifest(directory, manifest, digests)

    def proven(self, directory: Path) -> Path:
        """Write it in float32 into a new folder, prove it, and return the folder."""
        directory.mkdir()
        manifest = self.write(directory, "fp32")
        if self.judge is not None:
            self.judge.prove_exact(directory, manifest)
        return directory

    def lower_precision(
        self, directory: Path, exact: Path | None, texts: GivenTexts
    ) -> tuple[str, ...]:
        """Lower the graphs' precision in place, and return what a user should know about it.

        Args:
            directory: of the bundle, where the plan of what each weight is stored as is written.
            exact: the engine in float32, where ranges or a search need one.
            texts: what ranges are seen on, and what a search scores on.
        """
        from eptc.lossy import lower_precision

        compiler, job = self._compiler, self._compiler.job
        with compiler.clock.stage("lower the precision"):
            lowered = lower_precision(
                self.graphs, job.options, job.source.base.architecture, exact,
                plan=job.precision_plan, texts=texts.texts, data=texts.data,
                progress=compiler.progress,
            )  # fmt: skip
        compiler.told(lowered.records)
        self.records += lowered.records
        job.options.aim.target.check_graphs(self.graphs, job)
        bundle.write_json(directory / PLAN, lowered.report)
        return lowered.notes

    def _judge(self) -> Judge | None:
        """Return who compares what is written; None where nothing is to be compared."""
        compiler, options = self._compiler, self._compiler.job.options
        if compiler.verifier is None and options.data is None and options.routing != "frozen":
            return None
        from eptc.judge import Judge

        return Judge(
            compiler.job, self._model, compiler.verifier, compiler.layers, compiler.clock,
            compiler.progress,
        )  # fmt: skip
