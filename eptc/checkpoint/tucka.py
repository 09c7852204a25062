"""Reader of the folders that the TuckA authors' code writes (a PEFT adapter of a type of its own).

Everything is in the tensors' names and shapes but the number of groups and the factor of the
adapters. What is stored is used: the authors' own loader draws the router's centroids anew.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from eptc.checkpoint.base import BaseModel, read_json
from eptc.checkpoint.contents import Contents, ReadOptions, Source, check_fit, consume_all
from eptc.checkpoint.peft_folder import CONFIG, read_tensors
from eptc.checkpoint.replaced import head_rows, refuse_partial, take_replaced
from eptc.checkpoint.single_task import single_task
from eptc.checkpoint.tucka_factors import TuckaSettings, core, norm_fits, unit
from eptc.checkpoint.tucka_router import read_router
from eptc.errors import CheckpointError, TaskError
from eptc.ir import Adapter, Branch, CentroidRouter, Routed, Tucker
from eptc.runtime.routing import RoutingMode, RoutingSpec
from eptc.tasks import Task
from eptc.tensors import ComputedTensor, LazyTensor, SafetensorsFile

__all__ = ["holds_unmerged", "read_tucka"]

_PREFIX = "base_model.model."
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.tucka_(?P<part>g|c|u|ec)")
_HEADS = ("classifier", "score")
# Below the saved head: the copy PEFT made of it, and what it was copied from.
_COPIES = re.compile(r"base_model\.model\.[^.]+\.(modules_to_save|original_module)\..+")
_PARTS = ("g", "c", "u")


def holds_unmerged(path: Path) -> bool:
    """Whether a folder is what the authors' `merge_and_unload` leaves: a model, nothing merged."""
    file = path / "model.safetensors"
    if not file.is_file() or (path / CONFIG).is_file():
        return False
    return any(".tucka_u." in name for name in SafetensorsFile(file))


def read_tucka(path: Path, base: BaseModel, options: ReadOptions) -> Contents:
    """Read a TuckA adapter.

    Args:
        path: the folder: adapter_config.json and adapter_model.safetensors or .bin.
        base: the base model it was trained on.
        options: the task's name and description; what is to become of the routes.

    Raises:
        CheckpointError: missing, extra, misshapen or non-finite tensors; no router or several; a
            router that was saved before it had centroids; a folder that only looks merged.
        OptionError: an option that has no meaning here.
        TaskError: a description that does not fit, or labels of a decoder.
    """
    if holds_unmerged(path):
        raise CheckpointError(
            f"{path} is what the authors' merge_and_unload leaves: nothing in it is merged, and "
            "transformers would draw the adapted linears anew",
            expected=f"the adapter's own folder: {CONFIG} and adapter_model.safetensors",
            fix="give the folder that training saved, and the base with --base",
        )
    settings = TuckaSettings.read(path)
    tensors = read_tensors(path, options.allow_pickle)
    source = Source(path, tensors)
    modules = _modules(path, tensors)
    for parts in modules.values():
        for part, name in parts.items():
            settings.check(path, part, tensors[name])
    inert = _take_inert(source, modules, settings)
    routed = {name: parts for name, parts in modules.items() if name not in inert}
    columns = {name: tensors[parts["u"]].shape[0] for name, parts in routed.items()}
    check_fit(
        path, base, {name: (base.linears.get(name, (0,))[0], n) for name, n in columns.items()}
    )
    router = read_router(source, tensors, routed, settings, base, options)
    _refuse_unread(base, str(router.site))
    adapters = {
        name: _adapter(source, parts, base, name, settings, router)
        for name, parts in sorted(routed.items())
    }
    names = {name: _plain(name) for name in source.left}
    replaced = take_replaced(source, base, names)
    refuse_partial(source, base, replaced.head)
    consume_all(source)
    task = single_task(options, base.config, head_rows(base, replaced.head))
    _refuse_scoring(base, task)
    return Contents(
        format="tucka",
        variant="tucka",
        adapters=adapters,
        heads={task.name: replaced.head} if replaced.head else {},
        tasks=(task,),
        tensors=source.finite,
        config=read_json(path / CONFIG, CheckpointError),
        weights=replaced.weights,
        settings=replaced.settings,
        routing=_routing(options, router, base),
        details={
            "tucka": {**dataclasses.asdict(settings), "router": router.site, "inert": inert},
        },
        notes=_notes(path, settings, base, inert, head=bool(replaced.head)),
    )


def _modules(path: Path, tensors: Mapping[str, LazyTensor]) -> dict[str, dict[str, str]]:
    """Return the names of each adapted linear's tensors, by part."""
    modules: dict[str, dict[str, str]] = {}
    for name in tensors:
        if (match := _KEY.fullmatch(name)) and not _COPIES.fullmatch(name):
            modules.setdefault(match["module"], {})[match["part"]] = name
    lost = [
        f"{_PREFIX}{module}.tucka_{part}"
        for module, parts in sorted(modules.items())
        for part in _PARTS
        if part not in parts
    ]
    if not modules or lost:
        raise CheckpointError(
            f"{path} lacks {', '.join(lost[:3])}" if lost else f"{path} adapts no linear",
            expected="tucka_g, tucka_c and tucka_u of each adapted linear",
            fix="use the file the training run saved",
        )
    return modules


def _take_inert(
    source: Source, modules: Mapping[str, Mapping[str, str]], settings: TuckaSettings
) -> list[str]:
    """Take the adapters inside a saved head; return their linears.

    PEFT trains a copy of the head, and the route never reaches a copy: with one group such an
    adapter adds nothing, with several the first forward fails.
    """
    inert = sorted(name for name in modules if name.split(".")[0] in _HEADS)
    if inert and settings.k > 1:
        raise CheckpointError(
            f"{source.path} adapts {inert[0]}, a part of the saved head, with {settings.k} groups",
            expected="one group: with more the authors' code fails on the first forward",
            fix="use the files of one training run",
        )
    for name in inert:
        for part in _PARTS:
            _take(source, modules[name][part], part, settings, None)
    for name in [name for name in source.left if _COPIES.fullmatch(name)]:
        source.take(name, source.finite[name].shape)
    return inert


def _take(
    source: Source, name: str, part: str, settings: TuckaSettings, columns: int | None
) -> LazyTensor:
    return source.take(name, settings.shapes(columns)[part])


def _adapter(
    source: Source,
    names: Mapping[str, str],
    base: BaseModel,
    module: str,
    settings: TuckaSettings,
    router: CentroidRouter,
) -> Adapter:
    columns = base.linears[module][1]
    g, c, u = (_take(source, names[part], part, settings, columns) for part in _PARTS)
    for tensor, normalised in ((g, tuple(g.numpy())), (c, (c.numpy(),)), (u, (u.numpy(),))):
        if not all(norm_fits(np.asarray(part)) for part in normalised):
            raise CheckpointError(
                f"{tensor.name} in {source.path} is divided by a norm that is 0 or infinite in "
                "float32",
                expected="numbers that are not all zeros, and none too large to be squared",
                fix="use a checkpoint that was saved while or after training",
            )
    basis = ComputedTensor(u.name, "float64", u.shape, functools.partial(unit, u))
    weight = base.weights[f"{module}.weight"]
    branches = []
    for expert in range(settings.k * settings.t):
        group, slot = divmod(expert, settings.t)
        compute = functools.partial(core, g, c, group, slot)
        matrix = ComputedTensor(g.name, "float64", (settings.r, settings.r), compute)
        delta = Tucker(basis, matrix, weight)
        branches.append(Branch(delta, Routed(router, expert), settings.alpha))
    return Adapter(module, tuple(branches))


def _plain(name: str) -> str:
    """Return what the name of a saved parameter is in the Hugging Face model."""
    return name.removeprefix(_PREFIX).replace(".base_layer.", ".")


def _routing(options: ReadOptions, router: CentroidRouter, base: BaseModel) -> RoutingSpec:
    """Return what the answer to one row depends on."""
    if options.routing == "frozen":
        return RoutingSpec("frozen")
    mode: RoutingMode = "per-sample" if router.unit == "row" else "batch"
    return RoutingSpec(mode, _reads_padding(base, str(router.site)))


def _reads_padding(base: BaseModel, site: str) -> bool:
    """Whether padding changes the route.

    DeBERTa sets the embeddings of padding to zero, which moves no mean's direction; further in
    nothing is zero any more.
    """
    first = next(iter(base.architecture.stacks)) + ".0.attention.self."
    return base.architecture.model_type != "deberta-v2" or not site.startswith(first)


def _refuse_unread(base: BaseModel, site: str) -> None:
    """Refuse a DeBERTa that calls its router on the table of positions and drops the result.

    The call sets the route for all that follows, and a traced graph has no trace of it.

    Raises:
        CheckpointError: such a base.
    """
    config = base.config
    reads = {"query_proj": "p2c", "key_proj": "c2p"}.get(site.rpartition(".")[2])
    if (
        base.architecture.model_type == "deberta-v2"
        and config.get("relative_attention")
        and config.get("share_att_key")
        and reads is not None
        and reads not in (config.get("pos_att_type") or ())
    ):
        raise CheckpointError(
            f"the base {base.path} projects its positions with {site}, which routes, and does not "
            f"read them: its pos_att_type {config.get('pos_att_type')!r} lacks {reads!r}",
            expected=f"{reads!r} in pos_att_type, as in DeBERTa-v2 and v3",
            fix="its routes cannot be compiled",
        )


def _refuse_scoring(base: BaseModel, task: Task) -> None:
    """Refuse a closed set of answers that a decoder would be given all at once.

    Raises:
        TaskError: the router would read the tokens of all answers together; the authors' code
            writes one token after another.
    """
    if base.architecture.kind == "decoder-only" and task.labels:
        raise TaskError(
            f"task {task.name!r} has labels, which are scored all at once, and every token of a "
            "TuckA decoder changes the route of the others",
            expected="a task of the kind generation",
            fix="describe it without labels, and compare what it writes",
        )


def _notes(
    path: Path, settings: TuckaSettings, base: BaseModel, inert: list[str], *, head: bool
) -> tuple[str, ...]:
    notes = []
    if settings.t == 1 and settings.k > 1:
        notes.append(
            f"{path} has groups of one expert (t = 1, k = {settings.k}): groups tie wherever two "
            "centroids point towards the input, and which one wins differs from runtime to runtime"
        )
    if not head and base.architecture.kind == "encoder-classifier":
        notes.append(
            f"{path} holds no classification head, and the base's is used: the authors' scripts "
            "for images train a head and do not save it"
        )
    halves = sorted({t.dtype for t in base.weights.values()} - {"float32", "float64"})
    if halves:
        notes.append(
            f"the base is stored in {halves[0]}: the authors' code would route in it, the engine "
            "routes in float32 and may choose otherwise where two groups are close"
        )
    notes += [f"the adapter of {name} adds nothing: it is inside the saved head" for name in inert]
    return tuple(notes)
