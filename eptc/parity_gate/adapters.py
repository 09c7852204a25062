"""The adapter gate: a PEFT adapter as stock LoRA in PyTorch against the unfolded model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from eptc import text
from eptc.checkpoint import Checkpoint
from eptc.errors import CheckpointError, ParityError
from eptc.machine import available_memory
from eptc.nn.adapted import ReferenceModel
from eptc.nn.lora import LoraModel, load_lora, stream_lora
from eptc.parity_gate.adapter_files import check_files
from eptc.parity_gate.adapter_probes import adapter_probes, choices, logits
from eptc.parity_gate.compare import FP32, Bound, Comparison, compare
from eptc.parity_gate.gate import refuse, with_outcomes
from eptc.parity_gate.layers import LayerGate, layer_outputs
from eptc.parity_gate.memory import verified_by_block
from eptc.parity_gate.reference import load_reference, stream_reference
from eptc.parity_gate.report import ParityReport, furthest
from eptc.parity_gate.sensitivity import compare_beside_rounding
from eptc.tasks import Task, resolve

__all__ = ["AdapterGate"]

# Resident with everything imported.
_IMPORTED = 650 * 2**20
_LINEAR = (
    "1e-5 of the largest element of what the experts add, summed in float32 by the reference, one "
    "rounding of each factor, and of the base's weight"
)
_ADDED = Bound(1e-5, 0.0, _LINEAR)
_CUT = Bound(1e3, 1.0, "--max-rank asked for a loss; it may be no garbage")
# What float32 adds to the least share that can be lost: of it, and of the whole.
_MORE, _AT_MOST = 1e-3, 1e-5


_ADVICE = "this is a bug in eptc: report it with the checkpoint's shapes"


class AdapterGate:
    """Compares adapters with the unfolded model, whose files it reads by itself.

    Where two models do not fit in memory, linears are compared one at a time and no logits: the
    rest of the model is the same base on both sides.

    Args:
        source: the checkpoint.
        max_memory: bytes this process may have resident; None: what is available.
    """

    def __init__(self, source: Checkpoint, max_memory: int | None) -> None:
        self._source = source
        limit = available_memory() if max_memory is None else max_memory
        self._streamed = None
        with source.format.blamed("its reference fails"):
            room = None if limit is None else limit - _IMPORTED
            if verified_by_block(source, "fp32", room):
                self._streamed = stream_reference(source)
                self._reference: ReferenceModel = self._streamed.model
            else:
                self._reference = load_reference(source)

    def linears(self, task: str) -> LayerGate:
        """Return what compares linears of the IR with the reference's.

        Args:
            task: by name; the reference finds it by itself.
        """
        task_id = resolve(task, self._reference.tasks)
        loaded = {} if self._streamed is None else {"loaded": self._streamed.loaded}
        with self._source.format.blamed("its reference fails"):
            return LayerGate(layer_outputs(self._reference, task_id, **loaded))

    def prove(
        self,
        folder: Path,
        task: str,
        *,
        cut: Mapping[str, float] | None,
        layers: Mapping[str, float],
        progress: Callable[[str], None],
    ) -> dict[str, Any]:
        """Compare an adapter with the reference; return what was found, as JSON values.

        Args:
            folder: the adapter's.
            task: by name.
            cut: where its ranks were cut, the least share of each linear's size (by the Frobenius
                norm) that is lost then; None: it loses nothing.
            layers: outcome of the linears of the IR by stage.
            progress: called with what is being done.

        Raises:
            ParityError: it does not give the reference's answers.
        """
        task_id = resolve(task, self._reference.tasks)
        progress(f"parity: linears of {task}")
        adapter = self._load(folder, self._reference.tasks[task_id])
        check_files(folder, adapter)
        _check_rest(adapter, self._reference, task_id)
        linears, lost = self._compare_linears(adapter, task_id, cut)
        report = ParityReport(
            (), _ADDED if cut is None else _CUT, layers, 0.0, tuple(linears), (), 0,
            mode="whole model" if self._streamed is None else "linear by linear",
        )  # fmt: skip
        refuse(report, _ADVICE)
        flips = 0
        if self._streamed is None:
            nearest = furthest(linears)
            report = dataclasses.replace(
                report, tensors=(), bound=FP32 if cut is None else _CUT,
                weights=nearest.error / nearest.bound if nearest.bound else 0.0,
            )  # fmt: skip
            report, flips = self._compare_logits(adapter, task, report, progress)
            refuse(report, _ADVICE)
        summary = report.summary() | {"linears": len(linears), "flips": flips}
        if cut is not None:
            summary["lost_worst"] = _digits(max(lost))
            summary["lost_mean"] = _digits(float(np.mean(lost)))
        return summary

    def _load(self, folder: Path, task: Task) -> LoraModel:
        """Return an adapter on its base, by code that shares nothing with what wrote it."""
        base = self._source.base.path
        try:
            if self._streamed is None:
                return load_lora(folder, base, task=task)
            model = stream_lora(folder, base, task=task).model
        except CheckpointError as error:
            raise ParityError(
                f"the adapter that was written does not load: {error.found}", fix=_ADVICE
            ) from error
        assert isinstance(model, LoraModel)
        return model

    def _compare_logits(
        self,
        adapter: LoraModel,
        task: str,
        report: ParityReport,
        progress: Callable[[str], None],
    ) -> tuple[ParityReport, int]:
        """Return the report with the logits of every probe, and how many choices are others.

        The first probe that fails is the last. What flips for want of rank is no failure.
        """
        reference, kind = self._reference, self._source.base.architecture.kind
        described = reference.tasks[resolve(task, reference.tasks)]
        tokenizer = text.find_tokenizer(self._source.path, self._source.base.path)
        flips = 0
        for probe in adapter_probes(reference, described, kind, tokenizer):
            progress(f"parity: {probe.name}")
            answer = functools.partial(logits, reference.hf, probe, kind)
            with torch.no_grad(), reference.task(task):
                want, got = answer(), logits(adapter.hf, probe, kind)
                found, bound = compare_beside_rounding(
                    f"logits, {probe.name}", got, want, report.bound,
                    model=reference.hf, again=answer,
                )  # fmt: skip
            chosen = choices(probe.name, got, want, kind, FP32 if bound is _CUT else bound)
            flips += sum(choice.flipped for choice in chosen)
            report = with_outcomes(
                report, probe, [found, *([] if report.bound is _CUT else chosen)]
            )
            if not report.agrees:
                break
        return report, flips

    def _compare_linears(
        self, adapter: LoraModel, task_id: int, cut: Mapping[str, float] | None
    ) -> tuple[list[Comparison], list[float]]:
        """Compare what each linear adds with what the experts add; return what is lost of it too.

        Raises:
            ParityError: a linear is adapted on one side only.
        """
        reference = self._reference
        adapted = set(adapter.layers)
        folded = {path for path in reference.layers if _replaced(adapter, path)}
        if odd := sorted(adapted ^ (set(reference.layers) - folded)):
            raise ParityError(
                f"{odd[0]} is adapted on one side only",
                expected=f"the same {len(reference.layers)} linears as the reference adapts",
            )
        comparisons, lost = [], []
        for path, layer in sorted(adapter.layers.items()):
            experts = reference.layers[path]
            with torch.no_grad(), self._loaded(experts):
                want = experts.dense(task_id).double()
                weight = float(experts.weight.abs().max())
                a, b = layer.A.double(), layer.B.double()
                got = layer.scaling * (b @ a)
                terms = float((b.abs() @ a.abs()).max())
            left = float((got - want).norm())
            whole = float(want.norm())
            lost.append(left / whole if whole else 0.0)
            if cut is not None:
                comparisons.append(_no_nearer(path, left / (whole or 1.0), cut[path]))
                continue
            allowed = 1e-5 * float(want.abs().max()) + 2.0**-22 * terms + 2.0**-24 * weight
            comparisons.append(
                compare(
                    f"what {path} adds", got.numpy(), want.numpy(), Bound(1.0, 0.0, _LINEAR),
                    sizes=np.array(allowed),
                )
            )  # fmt: skip
        return comparisons, lost

    def _loaded(self, module: nn.Module) -> Any:
        return torch.no_grad() if self._streamed is None else self._streamed.loaded(module)


def _replaced(adapter: LoraModel, path: str) -> bool:
    """Whether a linear is one that the adapter replaces as a whole."""
    return path.partition(".")[0] in ("classifier", "score") and path not in adapter.layers


def _check_rest(adapter: LoraModel, reference: ReferenceModel, task_id: int) -> None:
    """Compare all other parameters, heads and base: they are the reference's to the bit.

    Raises:
        ParityError: one is not.
    """
    mine = _parameters(adapter, 0)
    for name, want in _parameters(reference, task_id).items():
        got = mine.get(name)
        if want.is_meta or (got is not None and got.is_meta):
            continue
        owner = name.removesuffix(".weight")
        if owner in reference.layers and _replaced(adapter, owner):
            want = want + reference.layers[owner].dense(task_id)
            same = got is not None and torch.allclose(got, want, rtol=1e-5, atol=1e-6)
        else:
            same = got is not None and torch.equal(got, want)
        if not same:
            raise ParityError(
                f"with the adapter, the parameter {name} is not the reference's",
                expected="the base's, or that of the task's head, to the bit",
                fix="this is a bug in eptc: report it",
            )


def _parameters(model: ReferenceModel, task_id: int) -> dict[str, torch.Tensor]:
    return {
        plain: parameter.detach()
        for name, parameter in model.hf.named_parameters(remove_duplicate=False)
        if (plain := model.plain_name(name, task_id))
    }


def _no_nearer(path: str, lost: float, least: float) -> Comparison:
    """Compare the share of a linear's size that is lost with what no matrix of its rank keeps."""
    bound = least * (1 + _MORE) + _AT_MOST
    error = lost if np.isfinite(lost) else np.inf
    return Comparison(f"what {path} lost", (1,), error, bound, (0,), lost, least, 1.0)


def _digits(value: float) -> float:
    return float(f"{value:.1e}")
