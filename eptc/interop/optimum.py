"""The layout `optimum`: a bundle whose files optimum-onnx's ORTModel classes find and load.

An encoder with a classification head, and a decoder alone, are what those classes expect. Of an
encoder-decoder they want three graphs: the engine's two under other names, and one for the first
step, which has no past and reads the encoder's state. All share one `weights.bin`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir

from eptc import bundle
from eptc.errors import OptionError, ParityError
from eptc.interop.portable import portable_config, portable_tokenizer
from eptc.job import Job
from eptc.lower.first_step import first_step
from eptc.precision import SCHEMES
from eptc.runtime import Manifest
from eptc.runtime.cpus import usable_cpus
from eptc.runtime.providers import CPU
from eptc.runtime.session import open_session
from eptc.runtime.spec import GenerationSpec

__all__ = ["FILES", "added_graphs", "check_layout", "compare_first_step", "lay_out"]

FILES: Final = {"encoder": "encoder_model.onnx", "decoder": "decoder_with_past_model.onnx"}
_FIRST: Final = "decoder_model.onnx"
_BUG: Final = "this is a bug in eptc: report it"
# Tokens after the start token that the first step is compared on.
_FED: Final = 4
_Arrays = dict[str, npt.NDArray[Any]]


def check_layout(job: Job) -> None:
    """Refuse what optimum cannot run, or what cannot be compared here; nothing is built yet.

    Raises:
        OptionError: heads of another width than optimum takes them to have, bfloat16, fp8, or a
            graph that does not fit into memory to be compared.
    """
    options, source = job.options, job.source
    if options.precision == "bf16":
        raise OptionError(
            "--layout optimum was given together with --precision bf16, which numpy, and so "
            "optimum, has no type for",
            fix="leave one out",
        )
    if SCHEMES[options.precision].number == "fp8":
        raise OptionError(
            f"--layout optimum was given together with --precision {options.precision}, whose "
            "operators ONNX Runtime must not fuse, which optimum does not tell it",
            fix="leave one out",
        )
    kind, settings = source.base.architecture.kind, job.config.to_dict()
    if kind == "decoder-only":
        expected = int(settings["hidden_size"]) // int(settings["num_attention_heads"])
        if (width := settings.get("head_dim") or expected) != expected:
            raise OptionError(
                f"the model's heads are {width} numbers wide, and optimum takes them to be "
                f"{expected}: hidden_size / num_attention_heads",
                fix="leave --layout out",
            )
    if kind == "encoder-decoder" and options.verify:
        from eptc.parity_gate.memory import engine_bytes

        needed, limit = engine_bytes(source), job.plan.limit
        if limit is not None and needed > limit:
            raise OptionError(
                f"--layout optimum adds a graph, which is compared as a whole: that takes "
                f"{needed / 1e6:.0f}MB, the limit is {limit / 1e6:.0f}MB",
                fix=f"give --max-memory {needed / 1e6:.0f}MB or more, where there is as much, or "
                "--no-verify, which the manifest records",
            )


def lay_out(directory: Path, manifest: Manifest, *, verify: bool) -> Manifest:
    """Rename and add what optimum needs in a finished bundle; return its new manifest.

    Args:
        directory: the bundle's folder.
        manifest: its manifest.
        verify: whether what is added is compared with the engine's own graphs.

    Raises:
        ParityError: the added graph gives other numbers than the engine's own.
    """
    for name, change in (("config.json", portable_config), ("tokenizer_config.json", _plain)):
        path = directory / name
        if path.is_file():
            bundle.write_json(path, change(json.loads(path.read_text("utf-8"))))
    if manifest.generation is not None:
        _name_tokens(directory / "generation_config.json", manifest.generation)
    found: dict[str, Any] = {"name": "optimum", "graphs": []}
    if manifest.kind == "encoder-decoder":
        manifest = _with_names(directory, manifest)
        _write_first(directory, manifest)
        found["graphs"] = [_FIRST]
        if verify:
            found |= compare_first_step(directory, manifest)
    parity = {**manifest.parity, "layout": found}
    changed = {"config.json", "generation_config.json", "tokenizer_config.json"}
    files = {name: record for name, record in manifest.files.items() if name not in changed}
    return bundle.write_manifest(
        directory, dataclasses.replace(manifest, parity=parity, files=files)
    )


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return portable_tokenizer(config, {})


def _name_tokens(path: Path, settings: GenerationSpec) -> None:
    """Write the engine's special tokens where the base's generation configuration has none.

    What is not in that file, ORTModel classes do not look for in config.json.
    """
    stops = list(settings.eos_token_id)
    tokens = {
        "decoder_start_token_id": settings.decoder_start_token_id,
        "eos_token_id": stops[0] if len(stops) == 1 else stops or None,
        "pad_token_id": settings.pad_token_id,
    }
    found = json.loads(path.read_text("utf-8"))
    found |= {
        key: token for key, token in tokens.items() if token is not None and found.get(key) is None
    }
    bundle.write_json(path, dict(sorted(found.items())))


def _with_names(directory: Path, manifest: Manifest) -> Manifest:
    """Give the engine's graphs the names that optimum looks for."""
    graphs = {}
    for role, spec in manifest.graphs.items():
        (directory / spec.file).rename(directory / FILES[role])
        graphs[role] = dataclasses.replace(spec, file=FILES[role])
    return dataclasses.replace(manifest, graphs=graphs)


def _write_first(directory: Path, manifest: Manifest) -> None:
    """Write the graph of the first step; its weights are where the others' are."""
    from eptc.passes.stable_names import StableNames
    from eptc.run_passes import run_graph_passes

    encoder, decoder = (
        onnx_ir.load(directory / manifest.graphs[role].file) for role in ("encoder", "decoder")
    )
    model = first_step(encoder, decoder)
    run_graph_passes({"the first step": model}, [StableNames()])
    proto = onnx_ir.to_proto(model)
    del proto.graph.value_info[:]
    (directory / _FIRST).write_bytes(proto.SerializeToString(deterministic=True))


def added_graphs(manifest: Manifest) -> list[str]:
    """Return the files of the graphs that the layout added to a bundle's own."""
    return list((manifest.parity.get("layout") or {}).get("graphs", ()))


def compare_first_step(directory: Path, manifest: Manifest) -> dict[str, Any]:
    """Run the first step both ways on seeded tokens; return what was compared.

    One graph at a time is in memory.

    Raises:
        ParityError: a logit or a number of the cache differs by more than float32's rounding.
    """
    from eptc.parity_gate.compare import FP32, compare
    from eptc.parity_gate.probes import synthetic
    from eptc.parity_gate.report import furthest

    assert manifest.vocab_size is not None
    assert manifest.generation is not None
    probes = synthetic(manifest.vocab_size, None, token_types=0, left=False)[:4]
    encoded = _run(directory / FILES["encoder"], [probe.feeds() for probe in probes])
    given: list[_Arrays] = []
    for probe in probes:
        start = np.full((len(probe.input_ids), 1), manifest.generation.decoder_start_token_id)
        ids = np.concatenate([start, probe.input_ids[:, :_FED]], axis=1)
        given.append({"input_ids": ids, "encoder_attention_mask": probe.attention_mask})
    states = [each.pop("last_hidden_state") for each in encoded]
    fed = [
        {**feeds, **_as_past(cache), **_empty_past(manifest, len(feeds["input_ids"]))}
        for feeds, cache in zip(given, encoded, strict=True)
    ]
    wanted = [
        {**made, **cache}
        for made, cache in zip(_run(directory / FILES["decoder"], fed), encoded, strict=True)
    ]
    fed = [
        {**feeds, "encoder_hidden_states": state}
        for feeds, state in zip(given, states, strict=True)
    ]
    found = []
    for probe, made, want in zip(probes, _run(directory / _FIRST, fed), wanted, strict=True):
        if made.keys() != want.keys():
            odd = sorted(made.keys() ^ want.keys())
            raise ParityError(f"{_FIRST} and the engine do not both give {odd[0]}", fix=_BUG)
        found += [compare(f"{n}, {probe.name}", made[n], want[n], FP32) for n in sorted(want)]
    worst = furthest(found)
    if not worst.passed:
        raise ParityError(
            f"{_FIRST}, which --layout optimum adds, differs from the engine's own graphs: "
            f"{worst.explain()}",
            fix=_BUG,
        )
    error, bound = (float(f"{value:.2g}") for value in (worst.error, worst.bound))
    return {"tensors": len(found), "largest_error": error, "its_bound": bound}


def _run(path: Path, feeds: Sequence[_Arrays]) -> list[_Arrays]:
    """Return the outputs of a graph for each of some feeds."""
    session = open_session(path, [(CPU, {})], threads=usable_cpus())
    names = [output.name for output in session.get_outputs()]
    return [dict(zip(names, session.run(names, each), strict=True)) for each in feeds]


def _as_past(cache: _Arrays) -> _Arrays:
    return {name.replace("present.", "past_key_values.", 1): v for name, v in cache.items()}


def _empty_past(manifest: Manifest, batch: int) -> _Arrays:
    generation = manifest.generation
    assert generation is not None
    shape = (batch, generation.num_key_value_heads, 0, generation.head_dim)
    return {
        spec.name: np.zeros(shape, spec.dtype)
        for spec in manifest.graphs["decoder"].inputs
        if ".decoder." in spec.name
    }
