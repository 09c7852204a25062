"""The target `hf`: one task's folded model as a folder that transformers loads."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from eptc import text
from eptc.errors import OptionError, TaskError
from eptc.examples_file import Example, read_examples
from eptc.interop.base import Folder, FolderJob, FolderTarget, write_provenance
from eptc.interop.hf_texts import write_card, write_texts
from eptc.interop.hf_weights import SHARD, Shard, plan_shards, shards_peak, write_shards
from eptc.ir import AdaptedModel
from eptc.job import Written
from eptc.machine import available_memory, release_memory
from eptc.options import Options
from eptc.pipeline import adapter_passes
from eptc.run_passes import PassRecord, run_adapter_passes
from eptc.tasks import Task

if TYPE_CHECKING:
    from eptc.parity_gate.folder import FolderGate

__all__ = ["Folded", "HuggingFace", "check_model_options", "fits", "write_folded"]

# Resident with torch and transformers imported and no graph traced, measured.
_IMPORTED = 620 * 2**20
_PRECISIONS = ("fp32", "keep")


class HuggingFace(FolderTarget):
    """A plain model: weights, configuration, tokenizer, model card."""

    name: ClassVar[str] = "hf"
    takes: ClassVar[frozenset[str]] = frozenset({"precision", "probe"})

    def check(self, options: Options) -> None:
        """Raise OptionError for a precision such a folder cannot have."""
        check_model_options(options, _PRECISIONS, "which stores plain weights")

    def write(self, job: FolderJob, directory: Path) -> Folder:
        """Write the folder of one task, proven."""
        dtype = "float32" if job.options.precision == "fp32" else None
        folded = write_folded(job, directory, dtype)
        precision = job.options.precision
        write_card(directory, job, folded.records, folded.parity, precision)
        write_provenance(
            directory, job, job.task_ids, target=self.name, passes=folded.records,
            parity=folded.parity, tools=("safetensors",), precision=precision,
        )  # fmt: skip
        names = tuple(task.name for task in job.tasks)
        return Folder(
            directory, self.name, names, tuple(folded.records), (), {}, {names[0]: folded.parity}
        )


def check_model_options(options: Options, precisions: Sequence[str], why: str) -> None:
    """Check what targets have in common that write a folded model.

    Args:
        options: what is asked for.
        precisions: what the target can store.
        why: of its own, for the message.

    Raises:
        OptionError: another precision, or texts to verify on and no verification.
    """
    if options.precision not in precisions:
        raise OptionError(
            f"--precision {options.precision} was given together with --target {options.target}, "
            f"{why}",
            expected=" or ".join(f"--precision {name}" for name in precisions),
        )
    if options.probe is not None and not options.verify:
        raise OptionError("--probe was given together with --no-verify", fix="leave one out")


@dataclasses.dataclass(frozen=True)
class Folded:
    """What was written, and what it was compared with.

    Args:
        records: what the passes did.
        parity: what was compared, as JSON values.
        gate: the reference; None where nothing is to be compared.
        tokenizer: of training; None where there is none.
        examples: texts that the caller gave to verify on; None for the built-in ones.
    """

    records: Sequence[PassRecord]
    parity: Mapping[str, Any]
    gate: FolderGate | None
    tokenizer: text.TrainingTokenizer | None
    examples: Sequence[Example] | None


def write_folded(job: FolderJob, directory: Path, dtype: str | None) -> Folded:
    """Fold a task, write its model, and compare it with the reference.

    Args:
        job: what is asked for.
        directory: an empty folder.
        dtype: type of the weights; None: each in the base's own.

    Raises:
        InputError: several tasks, prompts or routes that read the input, or too little memory.
        ParityError: what was written does not give the reference's answers.
    """
    source, options, clock = job.source, job.options, job.clock
    task = _only_task(job)
    _check_foldable(job)
    _check_memory(job, task, dtype)
    examples = None if options.probe is None else read_examples(Path(options.probe), task)
    tokenizer = text.find_tokenizer(source.path, source.base.path)
    gate = None
    if options.verify:
        from eptc.parity_gate.folder import FolderGate

        with clock.stage("load the reference"):
            named = 0 if options.task is None else options.task
            assert isinstance(named, str | int)  # one task
            gate = FolderGate(source, named, whole=fits(job))
    with clock.stage("hash and check the base model"):
        source.check_base()
    with clock.stage("specialise and fold"):
        model, records, layers = _fold(job, dtype, gate)
    shards = plan_shards(model.weights, dtype, SHARD)
    release_memory()  # small pieces of every linear: some 400 MB at 7B
    with clock.stage("write"):
        write_shards(shards, directory, lambda done, total: job.progress(Written(done, total)))
        write_texts(directory, source, task, model.config, _most(shards), tokenizer)
    release_memory()
    parity: Mapping[str, Any] = {"verified": False}
    if gate is not None:
        with clock.stage("parity"):
            parity = gate.prove(
                directory, tokenizer, examples=examples, layers=layers, progress=job.progress,
                dtypes={name: t.dtype for shard in shards for name, t in shard.tensors.items()},
            ).to_json()  # fmt: skip
    return Folded(records, parity, gate, tokenizer, examples)


def _only_task(job: FolderJob) -> Task:
    """Return the task; raise TaskError where several were asked for."""
    if job.several:
        raise TaskError(
            f"several tasks were chosen, {job.options.task!r}, and --target {job.options.target} "
            "folds one of them into the base's weights",
            fix="choose one with --task, or keep them beside one base with --target lora",
        )
    return job.tasks[0]


def _check_foldable(job: FolderJob) -> None:
    """Raise OptionError for what does not come down to plain weights."""
    source, contents = job.source, job.source.contents
    if contents.prompts is not None:
        what = f"its {contents.prompts.length} prompts before the text are no weights of the base"
    else:
        routed = [path for path, a in contents.adapters.items() if a.input_router is not None]
        if not routed:
            return
        what = f"experts are chosen by the input in {len(routed)} linears, such as {routed[0]}"
    raise OptionError(
        f"--target {job.options.target} folds a task into plain weights, and {source.path} "
        f"({contents.format}) cannot be folded: {what}",
        expected="a checkpoint whose routes depend on the task alone",
        fix="--target onnx compiles it, routes and prompts included",
    )


def _check_memory(job: FolderJob, task: Task, dtype: str | None) -> None:
    """Raise OptionError where writing takes more memory than was allowed."""
    limit = job.options.max_memory
    weights = {**job.source.weights, **job.source.contents.heads.get(task.name, {})}
    needed = _IMPORTED + shards_peak(plan_shards(weights, dtype, SHARD), weights)
    if limit is not None and needed > limit:
        raise OptionError(
            f"writing the folder takes {needed / 1e6:.0f}MB, the limit is {limit / 1e6:.0f}MB",
            fix=f"give --max-memory {needed / 1e6:.0f}MB or more",
        )


def fits(job: FolderJob) -> bool:
    """Whether the reference and the folder's model may be in memory together."""
    from eptc.parity_gate.memory import whole_model_bytes

    limit = job.options.max_memory
    limit = available_memory() if limit is None else limit
    return limit is None or _IMPORTED + whole_model_bytes(job.source) <= limit


def _fold(
    job: FolderJob, dtype: str | None, gate: FolderGate | None
) -> tuple[AdaptedModel, Sequence[PassRecord], dict[str, float]]:
    """Run the adapter passes; with a reference, each is followed by the layer gate."""
    from eptc.parity_gate import LayerGate

    source, layers = job.source, dict[str, float]()
    check, task_id = None, job.task_ids[0]
    if gate is not None:
        check = LayerGate(gate.layers())
        stage = f"the {source.contents.format} reader"
        layers[stage] = check.check(source.model, stage)

    def after(record: PassRecord, model: AdaptedModel) -> None:
        if check is not None:
            stage = f"the pass {record.label}"
            layers[stage] = check.check(model, stage)
        job.progress(record)

    model, records = run_adapter_passes(
        source.model, adapter_passes(task_id, dtype), task_id=task_id,
        probe=None if check is None else check.probe, after=after,
    )  # fmt: skip
    return model, records, layers


def _most(shards: Sequence[Shard]) -> str:
    """Return the type that most bytes are stored in: transformers loads all of them as one."""
    kinds: collections.Counter[str] = collections.Counter()
    for shard in shards:
        for tensor in shard.tensors.values():
            kinds[tensor.dtype] += tensor.nbytes
    return kinds.most_common(1)[0][0]
