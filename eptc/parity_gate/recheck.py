"""The parity gate again, later: a bundle against the checkpoint it was made from."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from eptc import checkpoint, text
from eptc.errors import BundleError, OptionError, ParityError
from eptc.examples_file import Example, read_examples
from eptc.machine import available_memory
from eptc.nn import EptModel
from eptc.parity_gate.answers import Budget
from eptc.parity_gate.compare import FP32, bound_of
from eptc.parity_gate.gate import refuse
from eptc.parity_gate.memory import verified_by_block, whole_model_bytes
from eptc.parity_gate.report import ParityReport
from eptc.parity_gate.scores import score
from eptc.parity_gate.verifier import LocalVerifier, Subject
from eptc.precision import SCHEMES
from eptc.runtime import Engine, Manifest, load_manifest
from eptc.tasks import Task, fill

__all__ = ["parity"]

# What rounding moves over a whole model, relative to the largest logit: of sums in float32, and
# of weights that are stored in 16 bits (a step or two of that type). Lossy engines: `_noise`.
_NOISE = {"fp32": 2e-5, "fp16-weights": 2e-3, "bf16-weights": 1.6e-2}
_CALIBRATED, _SIMULATED = (
    {str(name) for name, scheme in SCHEMES.items() if getattr(scheme, what)}
    for what in ("calibrated", "simulated")
)


def parity(
    bundle: str | Path,
    *,
    reference: str | Path,
    base: str | Path | None = None,
    tasks: Sequence[str] | None = None,
    top_k: int | None = None,
    task_spec: str | Path | None = None,
    data: str | Path | None = None,
    allow_pickle: bool = False,
    progress: Callable[[Any], None] = lambda _: None,
) -> ParityReport:
    """Compare a bundle with the unfolded PyTorch model.

    Engines in 16 bits are judged by their twin (`eptc.calibration.simulated`): a CPU rounds
    elsewhere. Below float32 one label in a hundred may change where the reference is sure, in
    other engines none.

    Args:
        bundle: the bundle's folder.
        reference: the checkpoint it was made from.
        base: the base model's folder.
        tasks: task names in id order; None: the manifest's.
        top_k: experts a task uses; None: the manifest's.
        task_spec: JSON file with prompts and labels; None: the manifest's.
        data: JSON lines file with labelled examples; both sides are scored on it.
        allow_pickle: read `adapter_model.bin` (weights only).
        progress: called with what is being done.

    Returns:
        The report; it has passed.

    Raises:
        InputError: the bundle, the checkpoint or the data cannot be used, or the bundle was made
            from another checkpoint or base.
        ParityError: the engine does not give the reference's answers.
    """
    folder = Path(bundle)
    manifest = load_manifest(folder)
    task = manifest.task
    if task is None:
        raise BundleError(f"{folder} was built for no task", expected="a task's bundle")
    recorded = manifest.checkpoint
    released = recorded["format"] == "released"
    if released:
        tasks = tasks or [task["name"] for task in recorded["tasks"]]
        top_k = top_k if top_k is not None else int(recorded["top_k"])
    source = checkpoint.read(
        Path(reference),
        Path(base) if base is not None else None,
        top_k=top_k,
        tasks=tasks,
        task_spec=Path(task_spec) if task_spec is not None else None,
        specs={t["name"]: Task.from_json(t) for t in recorded["tasks"]} if released else None,
        allow_pickle=allow_pickle,
    )
    _check_origin(folder, manifest, source)
    names = [t.name for t in source.contents.tasks]
    if task.name not in names:
        raise BundleError(
            f"{folder} was built for task {task.name!r}, which the checkpoint does not have",
            expected=", ".join(names),
        )
    examples = read_examples(Path(data), task, labelled=True) if data is not None else None
    if examples is not None and task.kind == "generation":
        raise OptionError(f"task {task.name!r} has no labels to score", fix="leave --data out")
    subject = Subject(
        source, task.name, top_k, tasks, allow_pickle, examples,
        _by_block(folder, manifest.precision, source),
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        verifier = stack.enter_context(contextlib.closing(LocalVerifier(subject)))
        if manifest.precision in _SIMULATED:
            from eptc.calibration import twin

            folder = stack.enter_context(twin(folder))
        report = verifier.prove(folder, {}, progress)
        refuse(report, "build the bundle again; if it fails again, report it")
        if examples is None or verifier.tokenizer is None:
            return report
        progress("score")
        with Engine.load(folder, providers=["cpu"]) as engine:
            scores = _scores(engine, verifier.reference, task, verifier.tokenizer, examples)
    report = dataclasses.replace(report, scores=scores)
    lossy = bound_of(manifest.precision) != FP32
    budget = Budget() if lossy else Budget(max_flips=0.0)
    if reason := budget.exceeded(scores):
        raise ParityError(
            reason,
            fix="build with a precision that loses less" if lossy else "build the bundle again",
        )
    return report


def _by_block(folder: Path, precision: str, source: checkpoint.Checkpoint) -> bool:
    """Return whether a bundle is verified block by block.

    Raises:
        OptionError: it has to be for want of memory, and cannot be.
    """
    available = available_memory()
    found = verified_by_block(source, precision, available)
    if found and precision in _CALIBRATED:
        assert available is not None
        raise OptionError(
            f"{folder} is an engine in {precision}, whose ranges hold for the model as a whole: "
            f"comparing it takes {whole_model_bytes(source) / 1e9:.1f} GB, {available / 1e9:.1f} "
            "GB are available",
            fix="compare it where there is more memory",
        )
    return found


def _noise(precision: str) -> float:
    """Return which margins of the reference, relative to its best score, may go either way."""
    return _NOISE.get(precision, 2 * bound_of(precision).relative)


def _check_origin(folder: Path, manifest: Manifest, source: checkpoint.Checkpoint) -> None:
    for what, recorded, found in (
        ("checkpoint", manifest.checkpoint["sha256"], source.sha256),
        ("base model", manifest.base["sha256"], source.base.sha256),
    ):
        if recorded != found:
            raise BundleError(
                f"{folder} was made from another {what}: SHA-256 {recorded[:16]}..., "
                f"the one given has {found[:16]}...",
                fix=f"give the {what} it was made from, or build it again",
            )
    # The hash covers the tensors; this is said beside them.
    given: dict[str, object] = {
        "variant": source.contents.variant,
        "top_k": source.contents.top_k,
        "kernel_sizes": list(source.contents.kernel_sizes),
    }
    for key, value in given.items():
        if manifest.checkpoint.get(key) != value:
            raise BundleError(
                f"{folder} was made with {key} {manifest.checkpoint.get(key)}, the checkpoint "
                f"given has {value}",
                fix="give the checkpoint it was made from, or build it again",
            )


def _scores(
    engine: Engine,
    model: EptModel,
    task: Task,
    tokenizer: text.TrainingTokenizer,
    examples: Sequence[Example],
) -> Mapping[str, Any]:
    """Score both sides on labelled examples; the drop is a paired difference per example."""
    want, sure = _reference_answers(engine, model, task, tokenizer, examples)
    answers = engine.classify(list(examples), truncate=True)
    got = [a.value if task.kind == "regression" else a.index for a in answers]
    labels = [
        float(e["label"]) if task.kind == "regression" else task.labels.index(e["label"])
        for e in examples
    ]
    flips = [task.kind != "regression" and g != w for g, w in zip(got, want, strict=True)]
    metric, ours = score(task, got, labels)
    _, theirs = score(task, want, labels)
    return {
        "rows": len(examples),
        "metric": metric,
        "engine": round(ours, 4),
        "reference": round(theirs, 4),
        "drop": round(theirs - ours, 4),
        "flips": sum(flips),
        "flips_beyond_noise": sum(f and s for f, s in zip(flips, sure, strict=True)),
    }


def _reference_answers(
    engine: Engine,
    model: EptModel,
    task: Task,
    tokenizer: text.TrainingTokenizer,
    examples: Sequence[Example],
) -> tuple[list[Any], list[bool]]:
    """Return the reference's answer to each example, and whether it is sure of it."""
    want: list[Any] = []
    sure: list[bool] = []
    spec = engine.manifest.tokenizer
    limit = {"truncation": True, "max_length": spec.max_length} if spec and spec.max_length else {}
    generation = engine.manifest.generation
    noise = _noise(engine.manifest.precision)
    tokens = _label_tokens(engine.manifest, task, tokenizer)
    with torch.no_grad(), model.task(task.name):
        for example in examples:
            inputs = tokenizer.tokenizer(*fill(task, example), return_tensors="pt", **limit)
            if generation is None:
                logits = model.hf(**inputs).logits[0].numpy()
                want.append(
                    float(logits[0]) if task.kind == "regression" else int(logits.argmax())
                )
                sure.append(task.kind != "regression" and _margin(logits) > noise)
                continue
            inputs.pop("token_type_ids", None)
            index, margin = _written_label(model, engine.manifest, tokens, inputs)
            want.append(index)
            sure.append(margin > noise)
    return want, sure


def _label_tokens(
    manifest: Manifest, task: Task, tokenizer: text.TrainingTokenizer
) -> list[list[int]]:
    """Return each label as training wrote it, without an end.

    The released code gives a label the special tokens of a text of its own.
    """
    own = manifest.checkpoint["variant"] == "released"
    ids = [tokenizer.tokenizer.encode(label, add_special_tokens=own) for label in task.labels]
    stops = manifest.generation.eos_token_id if manifest.generation is not None else ()
    return [label[:-1] if label and label[-1] in stops else label for label in ids]


def _written_label(
    model: EptModel, manifest: Manifest, labels: list[list[int]], inputs: Mapping[str, Any]
) -> tuple[int, float]:
    """Let the reference write a label; return which, and its smallest margin on the way.

    The search is transformers' own: greedy, every step constrained to what continues a label.

    Args:
        model: the reference, on its task.
        manifest: the engine's, for the special tokens.
        labels: tokens of each label.
        inputs: one text.
    """
    generation = manifest.generation
    assert generation is not None
    start = 1 if manifest.kind == "encoder-decoder" else inputs["input_ids"].shape[1]
    stops = list(generation.eos_token_id)

    def allowed(_: int, sequence: torch.Tensor) -> list[int]:
        written = sequence[start:].tolist()
        n = len(written)
        longer = {label[n] for label in labels if label[:n] == written and len(label) > n}
        ends = stops if written in labels else []
        # Nothing is left to write where the engine has no stop token.
        return sorted({*longer, *ends}) or [generation.pad_token_id]

    output = model.hf.generate(
        **inputs, max_new_tokens=1 + max(map(len, labels)), do_sample=False, num_beams=1,
        pad_token_id=generation.pad_token_id, eos_token_id=stops or None,
        prefix_allowed_tokens_fn=allowed, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    written = output.sequences[0, start:].tolist()
    found = [i for i, label in enumerate(labels) if written[: len(label)] == label]
    margins = [_margin(scores[0].numpy()) for scores in output.scores]
    return max(found, key=lambda i: len(labels[i])), min(margins)


def _margin(scores: npt.NDArray[np.float32]) -> float:
    """Return how far the best of the allowed scores leads, relative to its size."""
    best = np.sort(scores[np.isfinite(scores)])[::-1][:2]
    if len(best) < 2:
        return float("inf")
    return float((best[0] - best[1]) / max(1.0, abs(best[0])))
