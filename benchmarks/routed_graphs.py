"""Three graphs of one routed model: the base alone, eptc's, and what the exporter makes of it."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["write_base_graphs", "write_checkpoint", "write_engine", "write_exported"]

# As in the training example and the paper: two experts of each size, two of eight used.
KERNEL_SIZES = (2, 2, 4, 4, 8, 8, 16, 16)
RANK, TOP_K = 8, 2
TASK = "task-1"


def write_checkpoint(base: Path, folder: Path, targets: tuple[str, ...], *, shared: bool) -> None:
    """Write a native checkpoint whose routers read each token and the task, random tensors.

    Args:
        base: folder of the base model.
        folder: of the checkpoint.
        targets: the linears to adapt, by the ends of their names.
        shared: whether all linears have one A and B.
    """
    import torch

    from eptc.nn import EptConfig, EptModel, GateConfig, load_base
    from eptc.tasks import Task

    hf_model = load_base(base)
    kind: Any = "generation" if hf_model.config.is_encoder_decoder else "classification"
    labels = () if kind == "generation" else ("no", "yes")
    config = EptConfig(
        variant="paper",
        targets=targets,
        kernel_sizes=KERNEL_SIZES,
        top_k=TOP_K,
        rank=RANK,
        tasks=tuple(Task(f"task-{i}", kind, labels=labels) for i in range(2)),
        gate=GateConfig("token+task"),
        sharing="model" if shared else "per-linear",
    )
    model = EptModel.attach(hf_model, config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".kernels." in name:
            # So that the experts move an output by about a tenth of itself.
            torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    model.save(folder, base_dir=base)


def write_engine(checkpoint: Path, base: Path, folder: Path) -> None:
    """Write eptc's engine."""
    import eptc

    eptc.export(checkpoint, task=TASK, base=base, out=folder, verify=False)


def write_base_graphs(checkpoint: Path, base: Path, folder: Path) -> None:
    """Write the base model's own engine: the same passes, without any adapter."""
    from eptc import lower
    from eptc.job import Job
    from eptc.options import Options
    from eptc.passes.specialize_router import SpecializeRouter
    from eptc.pipeline import run_graph_passes

    job = Job.read(checkpoint, Options(TASK, base))
    model = SpecializeRouter(job.task_id).rewrite(job.source.model)
    plain = {p: dataclasses.replace(a, branches=()) for p, a in model.adapters.items()}
    graphs = job.bound(model.replace(adapters=plain))
    run_graph_passes(graphs, job.graph_passes())
    folder.mkdir()
    lower.write(graphs, folder)


def write_exported(checkpoint: Path, base: Path, folder: Path) -> None:
    """Write what torch.onnx.export makes of the PyTorch module as it is, fully optimised.

    The router chooses with `topk`: its own stable sort has no ONNX operator.
    """
    import torch

    from eptc.architectures import architecture
    from eptc.lower.attention import traced_attention
    from eptc.lower.graph_spec import example
    from eptc.lower.trace import _LOWERINGS
    from eptc.nn import load_reference

    reference = load_reference(checkpoint, base)
    for layer in reference.layers.values():
        layer.router.__class__ = _topk_router()
        # What attention is told to compute with goes into every `config`; this one is another.
        del layer.config
    folder.mkdir()
    lowering = importlib.import_module(_LOWERINGS[architecture(reference.hf.config).kind])
    with _quiet(), torch.no_grad(), reference.task(TASK), traced_attention(reference.hf):
        for name, spec in lowering.graphs(reference.hf).items():
            shapes = tuple(
                {
                    axis: torch.export.Dim.DYNAMIC
                    for axis, size in enumerate(port.shape)
                    if isinstance(size, str)
                }
                for port in spec.inputs
            )
            fixed = spec.module.forward.__code__.co_argcount - 1
            program = torch.onnx.export(
                spec.module.eval(),
                tuple(example(port) for port in spec.inputs),
                dynamic_shapes=(*shapes[:fixed], shapes[fixed:])
                if len(shapes) > fixed
                else shapes,
                input_names=[port.name for port in spec.inputs],
                output_names=[port.name for port in spec.outputs],
                dynamo=True,
                verbose=False,
            )
            assert program is not None
            program.save(folder / f"{name}.onnx", external_data=True)


def _topk_router() -> type[Any]:
    import torch

    from eptc.nn import Gates, TokenRouter

    class TopkRouter(TokenRouter):
        def forward(self, x: Any, embedding: Any) -> Gates:
            logits = torch.nn.functional.linear(self._input(x, embedding), self.weight)
            values, chosen = (logits / self.gate.temperature).topk(self.top_k, dim=-1)
            gates = torch.zeros_like(logits).scatter(-1, chosen, values.softmax(-1))
            return Gates(gates, tuple(range(logits.shape[-1])))

    return TopkRouter


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
