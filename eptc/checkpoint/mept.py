"""Reader of MEPT and SMoP checkpoints: prompts before the text, mixed by routers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from eptc.architectures import setting
from eptc.checkpoint.base import BaseModel
from eptc.checkpoint.contents import Contents, ReadOptions, Source
from eptc.checkpoint.mept_base import HEAD, SAVE, take_own
from eptc.checkpoint.mept_files import Keys, MeptSettings, read_settings, read_state_dict
from eptc.checkpoint.single_task import single_task
from eptc.errors import CheckpointError, OptionError
from eptc.ir import PromptLayout, PromptSite, PromptTuning
from eptc.ir.prompt_weights import prompt_weights
from eptc.runtime.routing import RoutingSpec
from eptc.tensors import ArrayTensor, ComputedTensor, LazyTensor

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
    layers = _layers(path, base, settings, keys)
    source = Source(file, tensors)
    prompts = _prompts(file, base, settings, keys, source, layers)
    coupling, notes = _coupling(path, options, prompts)
    layout = prompts.layout(coupling)
    own = take_own(file, base, settings, keys, source)
    weights = {**base.weights, **own.weights}
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
        notes=(*notes, *own.notes),
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
        raise _no_experts(file)
    raise CheckpointError(
        f"{file} has no prompts with a router",
        expected="tensors named prompt_embedding.weight and prompt_router.0.weight",
        fix=SAVE,
    )


def _no_experts(file: Path) -> CheckpointError:
    return CheckpointError(
        f"{file} lacks the experts of the text's prompts, which training froze at random numbers "
        "on T5: what was trained is not enough",
        expected="prompt_encoder.embedding.weight (T5) or prompt_embedding.weight (Llama)",
        fix=SAVE,
    )


def _layers(path: Path, base: BaseModel, settings: MeptSettings, keys: Keys) -> tuple[int, ...]:
    """Return the blocks that replace the prompts: those that the tensors say."""
    told = settings.raw.get("layers")
    llama = base.architecture.model_type == "llama"
    depth = int(setting(base.config, "num_hidden_layers" if llama else "num_layers"))
    if keys.adapted and keys.adapted[-1] >= depth:
        raise CheckpointError(
            f"{path} has prompts for block {keys.adapted[-1]}, the base has {depth} blocks",
            fix="give the base the prompts were trained on with --base",
        )
    if settings.method == "prompt-routing" or told is None:
        return keys.adapted
    if not isinstance(told, list) or not all(type(block) is int for block in told):
        raise CheckpointError(f"layers in {path} is {told!r}", expected="a list of block numbers")
    wanted = tuple(sorted({block for block in told if block < depth}))
    if wanted != keys.adapted:
        raise CheckpointError(
            f"{path} adapts the blocks {list(wanted)}, its tensors are of {list(keys.adapted)}",
            fix="use the settings of the run that saved the tensors",
        )
    return wanted


def _prompts(
    file: Path,
    base: BaseModel,
    settings: MeptSettings,
    keys: Keys,
    source: Source,
    layers: tuple[int, ...],
) -> PromptTuning:
    """Return the sites that anything reads."""
    t5 = base.architecture.model_type == "t5"
    if settings.stochastic and t5 and settings.method == "prompt-expert":
        raise CheckpointError(
            f"{file.parent} was trained with stochastic prompts on a T5, where the training code "
            "itself fails to answer",
            expected="stochastic false, or a Llama classifier",
        )
    width = base.weights[base.architecture.embedding].shape[1]
    take = _Take(file, source, settings, width)
    blocks = {
        block: take.site(keys.blocks[block], f"block {block}", normed=True) for block in layers
    }
    if t5 and 0 in layers:
        return PromptTuning(
            "t5", settings.length, settings.top_k, settings.stochastic, None, blocks
        )
    if "experts" not in keys.input:
        raise _no_experts(file)
    site = take.site(keys.input, "the text", normed=not t5)
    return PromptTuning(
        base.architecture.model_type,
        settings.length,
        settings.top_k,
        settings.stochastic,
        site,
        blocks,
    )


@dataclasses.dataclass(frozen=True)
class _Take:
    """Takes the tensors of sites."""

    file: Path
    source: Source
    settings: MeptSettings
    width: int

    def site(self, roles: Mapping[str, str], where: str, *, normed: bool) -> PromptSite:
        """Return a site with every tensor it must have."""
        settings = self.settings
        rows = settings.length * settings.experts
        for role in ("experts", "router"):
            if role not in roles:
                raise CheckpointError(f"{self.file} lacks the {role} of {where}", fix=SAVE)
        shared = roles.get("shared")
        if (
            settings.shared not in (None, shared is not None)
            and settings.method != "prompt-routing"
        ):
            raise CheckpointError(
                f"{self.file} has {'no' if shared is None else 'the'} shared prompts of {where}",
                expected=f"what shared_expert says: {str(settings.shared).lower()}",
                fix="use the settings of the run that saved the tensors",
            )
        found = None
        if shared is not None:
            found = self._shared(shared)
        norm: LazyTensor | None = None
        if normed:
            ones = ArrayTensor("layer_norm.weight", np.ones(self.width, np.float32))
            # Never trained: a file of what was trained lacks it.
            norm = self._take(roles["norm"], (self.width,)) if "norm" in roles else ones
        return PromptSite(
            self._take(roles["experts"], (rows, self.width)),
            self._take(roles["router"], (settings.experts, self.width)),
            found,
            norm,
        )

    def _shared(self, name: str) -> LazyTensor:
        length = self.settings.length
        stored = self.source.finite[name].shape
        if len(stored) == 3 and stored[1] != length:
            raise CheckpointError(
                f"{name} in {self.file} shares {stored[1]} prompts, an expert has {length}: the "
                "training code itself fails to add them",
                expected="shared_expert_ratio 'one', or 'half' with two experts",
            )
        tensor = self._take(name, (1, length, self.width))
        shape = (length, self.width)
        return ComputedTensor(name, tensor.dtype, shape, lambda: tensor.numpy().reshape(shape))

    def _take(self, name: str, shape: tuple[int, ...]) -> LazyTensor:
        try:
            return self.source.take(name, shape)
        except CheckpointError as error:
            if "finite" not in (error.expected or ""):
                raise
            raise CheckpointError(
                f"{error.found}: these prompts were never initialised",
                expected="finite numbers",
                fix="on T5 the training code leaves them as uninitialised memory "
                "(from_pretrained switches torch.nn.init off): initialise them and train again",
            ) from error


def _coupling(
    path: Path, options: ReadOptions, prompts: PromptTuning
) -> tuple[Any, tuple[str, ...]]:
    """Return how rows are mixed, and what to say of it."""
    if options.routing == "frozen":
        raise OptionError(
            f"--routing frozen was given for {path}, whose prompts are no weights that could be "
            "folded",
            expected="exact, batch or per-sample",
        )
    single = prompts.length == 1 and bool(prompts.blocks)
    if options.routing == "batch" and (single or not prompts.couples):
        raise OptionError(
            f"--routing batch was given for {path}, "
            + (
                "whose training code fails for more than one row (num_virtual_tokens is 1)"
                if single
                else "whose rows do not depend on one another"
            ),
            expected="exact or per-sample",
        )
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
