"""Reader of MEPT and SMoP checkpoints: prompts before the text, mixed by routers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eptc.checkpoint.base import BaseModel
from eptc.checkpoint.contents import Contents, ReadOptions, Source, check_routing
from eptc.checkpoint.mept_base import HEAD, SAVE, take_own
from eptc.checkpoint.mept_files import Keys, read_state_dict
from eptc.checkpoint.mept_prompts import adapted_blocks, no_experts, note_sizes, take_prompts
from eptc.checkpoint.mept_settings import MeptSettings, read_settings
from eptc.checkpoint.prompt_weights import prompt_weights
from eptc.checkpoint.single_task import single_task
from eptc.errors import CheckpointError
from eptc.ir import PromptLayout, PromptTuning
from eptc.runtime.routing import RoutingSpec
from eptc.tensors import LazyTensor

__all__ = ["read_mept"]


def read_mept(path: Path, base: BaseModel, options: ReadOptions) -> Contents:
    """Read a folder with a state dict, whole or of what was trained, and its settings.

    The base's own weights are taken from the base, after those of a whole state dict were
    compared with them: training froze them. A resized embedding and the classifier's head are
    taken from the state dict.

    Args:
        path: the folder.
        base: the base, as `prompted_base` gives it.
        options: the task's name and description, how rows are mixed, `top_k` where the folder
            does not say it.

    Raises:
        CheckpointError: missing, misshapen, uninitialised or contradictory tensors or settings.
        OptionError: an option that has no meaning here.
    """
    file, tensors = read_state_dict(path, allow_pickle=options.allow_pickle)
    keys = Keys.sort(tensors)
    sites = [keys.input, *(keys.blocks[block] for block in keys.adapted)]
    sizes = _sizes(file, tensors, sites)
    settings = read_settings(path, keys, sizes, options.top_k)
    layers = adapted_blocks(path, base, settings, keys)
    source = Source(file, tensors)
    prompts = take_prompts(file, base, settings, keys, source, layers)
    coupling, notes = _coupling(path, options, prompts)
    layout = prompts.layout(coupling)
    own = take_own(file, base, settings, keys, source)
    weights = {**base.weights, **own.weights}
    far = note_sizes(prompts, weights[base.architecture.embedding])
    head = {HEAD: own.head} if own.head is not None else {}
    task = single_task(
        dataclasses.replace(options, top_k=None),
        base.config,
        None if own.head is None else own.head.shape[0],
    )
    return Contents(
        format="mept",
        variant="mept" if settings.method == "prompt-expert" else "smop",
        adapters={},
        heads={task.name: head} if head else {},
        tasks=(task,),
        tensors={t.name: t for t in (*_tensors(prompts), *own.weights.values(), *head.values())},
        config=settings.raw,
        weights={**own.weights, **prompt_weights(base.config, prompts, layout, weights)},
        settings=own.settings,
        routing=RoutingSpec(
            "batch" if layout.coupled else "constant" if layout.constant else "per-sample",
            reads_padding=prompts.reads_padding,
        ),
        details={"prompts": _details(prompts, settings, layout, whole=own.whole)},
        notes=(*settings.notes, *notes, *own.notes, *far),
        prompts=layout,
    )


def _sizes(
    file: Path, tensors: Mapping[str, LazyTensor], sites: list[Mapping[str, str]]
) -> tuple[int, int]:
    """Return the rows of the experts and of the router of the first site that has both."""
    for site in sites:
        if {"experts", "router"} <= site.keys():
            experts, router = (tensors[site[role]].shape for role in ("experts", "router"))
            if len(experts) == len(router) == 2 and router[0]:
                return experts[0], router[0]
    if any("router" in site for site in sites):
        raise no_experts(file)
    raise CheckpointError(
        f"{file} has no prompts with a router",
        expected="tensors named prompt_embedding.weight and prompt_router.0.weight",
        fix=SAVE,
    )


def _coupling(
    path: Path, options: ReadOptions, prompts: PromptTuning
) -> tuple[Any, tuple[str, ...]]:
    """Return how rows are mixed, and what to say of it."""
    single = prompts.length == 1 and bool(prompts.blocks)
    if options.routing == "frozen":
        check_routing(
            options.routing,
            ("exact", "batch", "per-sample"),
            f"{path}, whose prompts are no weights that could be folded",
        )
    if single or not prompts.couples:
        why = (
            "whose training code fails for more than one row (num_virtual_tokens is 1)"
            if single
            else "whose rows do not depend on one another"
        )
        check_routing(options.routing, ("exact", "per-sample"), f"{path}, {why}")
    if single and options.routing == "exact":
        return "per-sample", (
            "num_virtual_tokens is 1: the training code answers one row at a time, and fails for "
            "more; this engine gives each row of a batch the answer it gets alone",
        )
    return ("per-sample" if options.routing == "per-sample" else "batch"), ()


def _tensors(prompts: PromptTuning) -> tuple[LazyTensor, ...]:
    return tuple(
        tensor
        for site in prompts.sites
        for tensor in (site.experts, site.router, site.shared)
        if tensor is not None
    )


def _details(
    prompts: PromptTuning, settings: MeptSettings, layout: PromptLayout, *, whole: bool
) -> dict[str, Any]:
    """Return what the manifest says of the prompts."""
    return {
        "method": settings.method,
        "virtual_tokens": prompts.length,
        "experts": prompts.num_experts,
        "top_k": prompts.top_k,
        "layers": list(layout.layers),
        "input_level": prompts.input is not None,
        "shared": layout.shared,
        "stochastic": prompts.stochastic,
        "constant": layout.constant,
        "state_dict": "whole" if whole else "trained",
    }
