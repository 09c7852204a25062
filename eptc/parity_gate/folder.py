"""The parity gate of a Hugging Face folder: its weights, its tokenizer, what it answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import torch

from eptc.checkpoint import Checkpoint
from eptc.nn.adapted import ReferenceModel
from eptc.nn.streamed import StreamedModel
from eptc.parity_gate.adapter_probes import adapter_probes
from eptc.parity_gate.blocks import StreamedParameters
from eptc.parity_gate.compare import FP32
from eptc.parity_gate.folder_outputs import (
    check_folder_outputs,
    check_folder_tokenizer,
    load_folder,
)
from eptc.parity_gate.folder_weights import FolderWeights, check_folder_weights, tensor_files
from eptc.parity_gate.gate import refuse, with_outcomes
from eptc.parity_gate.layers import LayerOutputs, layer_outputs
from eptc.parity_gate.probes import Example, Probe, builtin_examples
from eptc.parity_gate.reference import load_reference, stream_reference
from eptc.parity_gate.report import ParityReport
from eptc.tasks import Task, resolve
from eptc.text import TrainingTokenizer

__all__ = ["FolderGate", "FolderReport"]

Float32 = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class FolderReport:
    """What was compared.

    Args:
        layers: largest deviation of an adapted linear by stage, as a fraction of its bound.
        weights: the tensors on disk.
        texts: how many texts both tokenizers made equal tokens of.
        outputs: what the model that transformers loads answers; None where both sides do not fit
            into memory.
    """

    layers: Mapping[str, float]
    weights: FolderWeights
    texts: int
    outputs: ParityReport | None

    def to_json(self) -> dict[str, Any]:
        """Return JSON values, errors to two digits: the others are noise."""
        found: dict[str, Any] = {
            "verified": True,
            "passed": True,  # or there would be an error instead
            "reference": "unfolded PyTorch model, float32",
            "mode": "weights" if self.outputs is None else "weights and outputs",
            "weights": {
                "tensors": self.weights.tensors,
                "adapted": self.weights.adapted,
                "largest_deviation": _digits(self.weights.deviation),
            },
            "layers": {stage: _digits(error) for stage, error in self.layers.items()},
            "texts_tokenized_equally": self.texts,
        }
        if self.outputs is not None:
            summary = self.outputs.summary()
            kept = ("reference", "tensors", "largest_error", "its_bound", "decisions", "flips",
                    "ties", "text_probes", "synthetic_probes")  # fmt: skip
            found["outputs"] = {key: summary[key] for key in kept}
        return found


def _digits(value: float) -> float:
    return float(f"{value:.2g}")


class FolderGate:
    """The reference of a build, and what a folder is compared with it by.

    Where there is room for two models, the folder is loaded as anybody would, and its answers
    are compared; else every tensor is, one parameter of the reference in memory at a time.

    Args:
        source: the checkpoint.
        task: name, alias or id, as the caller gave it.
        whole: whether both models may be in memory.

    Raises:
        InputError: the checkpoint or the base cannot be read.
    """

    def __init__(self, source: Checkpoint, task: str | int, *, whole: bool) -> None:
        self._source = source
        self._streamed: StreamedModel | None = None
        with source.format.blamed("its reference fails"):
            if whole:
                self._model = load_reference(source)
            else:
                self._streamed = stream_reference(source)
                self._model = self._streamed.model
            # The reference finds the task by itself: a reader that mixes up tasks is found out.
            self._task_id = resolve(task, self._model.tasks)

    @property
    def reference(self) -> ReferenceModel:
        """The unfolded model."""
        return self._model

    @property
    def task(self) -> Task:
        """The task, by the reference's own list."""
        return self._model.tasks[self._task_id]

    def layers(self) -> LayerOutputs:
        """Return what the reference's adapted linears give."""
        with self._source.format.blamed("its reference fails"):
            if self._streamed is not None:
                return layer_outputs(self._model, self._task_id, self._streamed.loaded)
            return layer_outputs(self._model, self._task_id)

    def prove(
        self,
        directory: Path,
        tokenizer: TrainingTokenizer | None,
        *,
        dtypes: Mapping[str, str],
        examples: Sequence[Example] | None = None,
        layers: Mapping[str, float] | None = None,
        progress: Callable[[str], None] = lambda _: None,
    ) -> FolderReport:
        """Compare a folder with the unfolded PyTorch model; once, for the last use of it.

        With weights in 16 bits the reference computes with those, once they are found to be
        right: what rounding does would hide what else is wrong.

        Args:
            directory: the folder.
            tokenizer: the tokenizer of training.
            dtypes: the type that each tensor is to be stored in.
            examples: texts to probe with; None for the built-in ones.
            layers: outcome of the layer gate by stage.
            progress: called with what is being done.

        Raises:
            ParityError: the first thing that is off.
        """
        model, task_id = self._model, self._task_id
        with self._source.format.blamed("its reference cannot be compared with"):
            progress("parity: weights")
            parameters: Mapping[str, Float32]
            places: Mapping[str, Hashable]
            if self._streamed is None:
                parameters, places = _in_memory(model, task_id)
            else:
                parameters = StreamedParameters(self._streamed, task_id)
                places = {n: tuple(sorted(self._streamed.twins(n))) for n in parameters}
            weights = check_folder_weights(
                directory, parameters, places, model.layers, task_id, dtypes
            )
            texts, task = 0, self.task
            if tokenizer is not None:
                progress("parity: tokenizer")
                shown = examples if examples is not None else builtin_examples(task)
                texts = check_folder_tokenizer(directory, tokenizer, task, shown)
            outputs = None
            if self._streamed is None:
                narrow = set(dtypes.values()) != {"float32"}
                if narrow:
                    _compute_as_stored(model, directory)
                outputs = ParityReport((), FP32, {}, weights.deviation, (), (), texts)
                if narrow:
                    said = "PyTorch model, float32, weights as they are stored"
                    outputs = dataclasses.replace(outputs, reference=said)
                outputs = self._answers(
                    directory, outputs, self.probes(tokenizer, examples), progress
                )
        return FolderReport(dict(layers or {}), weights, texts, outputs)

    def probes(
        self, tokenizer: TrainingTokenizer | None, examples: Sequence[Example] | None
    ) -> list[Probe]:
        """Return batches of text, where its form is known, and of seeded tokens."""
        kind = self._source.base.architecture.kind
        return adapter_probes(self._model, self.task, kind, tokenizer, examples)

    def _answers(
        self,
        directory: Path,
        report: ParityReport,
        probes: Sequence[Probe],
        progress: Callable[[str], None],
    ) -> ParityReport:
        """Return the report with what the folder's model answers; raise where it is off."""
        progress("parity: load the folder")
        kind, task = self._source.base.architecture.kind, self.task
        loaded = load_folder(directory, self._model, task, kind)
        for probe in probes:
            progress(f"parity: {probe.name}")
            found = check_folder_outputs(loaded, self._model, task, kind, probe)
            report = with_outcomes(report, probe, list(found))
            if not report.agrees:
                break
        refuse(report, "every weight is right, so the folder's configuration is not: report it")
        return report


def _in_memory(
    model: ReferenceModel, task_id: int
) -> tuple[dict[str, Float32], dict[str, Hashable]]:
    """Return the parameters of a model by their plain names, and which of them are one."""
    parameters: dict[str, Float32] = {}
    places: dict[str, Hashable] = {}
    for name, parameter in model.hf.named_parameters(remove_duplicate=False):
        if plain := model.plain_name(name, task_id):
            parameters[plain] = parameter.detach().numpy()
            places[plain] = id(parameter)
    return parameters, places


def _compute_as_stored(model: ReferenceModel, directory: Path) -> None:
    """Let adapted linears compute with the sums that were written, in float32; for good."""
    files = tensor_files(directory)
    for path, layer in model.layers.items():
        name = f"{path}.weight"
        with safetensors.safe_open(files[name], framework="pt") as file:
            layer.base.weight = torch.nn.Parameter(
                file.get_tensor(name).to(torch.float32), requires_grad=False
            )
        layer.__dict__["delta"] = _nothing


def _nothing(x: torch.Tensor) -> torch.Tensor:
    return x.new_zeros(())
