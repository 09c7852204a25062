"""Three graphs of one routed model: the base alone, eptc's, and what the exporter makes of it."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eptc.checkpoint import Checkpoint, Routing
    from eptc.lower.graph_spec import GraphSpec

__all__ = ["write_base_graphs", "write_engine", "write_exported"]


def write_engine(checkpoint: Path, base: Path, folder: Path, routing: Routing) -> None:
    """Write eptc's engine."""
    import eptc

    eptc.export(checkpoint, base=base, out=folder, routing=routing, verify=False)


def write_base_graphs(checkpoint: Path, base: Path, folder: Path) -> None:
    """Write the base model's own engine: the same passes, without adapters and prompts."""
    from eptc import lower
    from eptc.job import Job
    from eptc.options import Options
    from eptc.passes.specialize_router import SpecializeRouter
    from eptc.run_passes import run_graph_passes

    job = Job.read(checkpoint, Options(base=base))
    plain = dataclasses.replace(job.source.contents, adapters={}, prompts=None)
    job = dataclasses.replace(job, source=dataclasses.replace(job.source, contents=plain))
    graphs = job.bound(SpecializeRouter(job.task_id).rewrite(job.source.model))
    run_graph_passes(graphs, job.graph_passes())
    folder.mkdir()
    lower.write(graphs, folder)


def write_exported(checkpoint: Path, base: Path, folder: Path, routing: Routing) -> None:
    """Write what torch.onnx.export makes of the PyTorch module as it is, fully optimised.

    EPT's router chooses with `topk`: its own stable sort has no ONNX operator.
    """
    import torch

    from eptc import checkpoint as checkpoints
    from eptc.lower.attention import traced_attention
    from eptc.lower.graph_spec import example

    source = checkpoints.read(checkpoint, base, routing=routing)
    tasks = source.contents.tasks
    reference = source.format.reference(checkpoint, base, source.options, tasks)
    for layer in reference.layers.values():
        if source.format.name == "native":
            layer.router.__class__ = _topk_router()
            # What attention is told to compute with goes into every `config`; this is another.
            del layer.config
    folder.mkdir()
    with _quiet(), torch.no_grad(), reference.task(0), traced_attention(reference.hf):
        for name, spec in _specs(source, reference.hf).items():
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


def _specs(source: Checkpoint, hf_model: Any) -> Mapping[str, GraphSpec]:
    """Return what is exported: the graphs eptc would make, of another module."""
    from eptc.lower import encoder_decoder
    from eptc.lower.trace import _LOWERINGS

    if source.contents.prompts is not None:
        return encoder_decoder.graphs(hf_model, _encode, rows="encoder_sequence")
    lowering = importlib.import_module(_LOWERINGS[source.base.architecture.kind])
    found: Mapping[str, GraphSpec] = lowering.graphs(hf_model)
    return found


def _encode(hf_model: Any, input_ids: Any, attention_mask: Any) -> Any:
    """Run the encoder with its prompts, which makes the mask longer by itself."""
    return hf_model.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]


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
