"""The prompt sites of a MEPT or SMoP state dict: which blocks have one, and its tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from eptc.architectures import setting
from eptc.checkpoint.base import BaseModel
from eptc.checkpoint.contents import Source
from eptc.checkpoint.mept_base import SAVE
from eptc.checkpoint.mept_files import Keys
from eptc.checkpoint.mept_settings import SAME_RUN, MeptSettings
from eptc.errors import CheckpointError
from eptc.ir import PromptSite, PromptTuning
from eptc.tensors import ArrayTensor, ComputedTensor, LazyTensor

__all__ = ["adapted_blocks", "no_experts", "note_sizes", "take_prompts"]

_INITIALISE = (
    "on T5 the training code leaves them as uninitialised memory (from_pretrained switches "
    "torch.nn.init off): initialise them and train again"
)
# Prompts stand among rows of the embedding, and training moves them little: three orders of
# magnitude are no training.
_FAR = 1e3


def no_experts(file: Path) -> CheckpointError:
    """Return the error of a file that lacks what training froze at random numbers."""
    return CheckpointError(
        f"{file} lacks the experts of the text's prompts, which training froze at random numbers "
        "on T5: what was trained is not enough",
        expected="prompt_encoder.embedding.weight (T5) or prompt_embedding.weight (Llama)",
        fix=SAVE,
    )


def adapted_blocks(
    path: Path, base: BaseModel, settings: MeptSettings, keys: Keys
) -> tuple[int, ...]:
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
    wanted = tuple(sorted({block for block in told if block < depth}))
    if wanted != keys.adapted:
        raise CheckpointError(
            f"{path} adapts the blocks {list(wanted)}, its tensors are of {list(keys.adapted)}",
            fix=SAME_RUN,
        )
    return wanted


def take_prompts(
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
        raise no_experts(file)
    site = take.site(keys.input, "the text", normed=not t5)
    return PromptTuning(
        base.architecture.model_type,
        settings.length,
        settings.top_k,
        settings.stochastic,
        site,
        blocks,
    )


def note_sizes(prompts: PromptTuning, embedding: LazyTensor) -> tuple[str, ...]:
    """Return a note for each tensor of prompts that is far larger than the embedding's numbers.

    Reads the embedding once.
    """
    usual = _largest(embedding)
    found = (t for site in prompts.sites for t in (site.experts, site.shared) if t is not None)
    return tuple(
        f"{tensor.name} has numbers up to {largest:.0e}, the embedding up to {usual:.0e}: were "
        "these prompts initialised? On T5 the training code leaves them as uninitialised memory"
        for tensor in found
        if (largest := _largest(tensor)) > _FAR * usual
    )


def _largest(tensor: LazyTensor) -> float:
    """Return the largest magnitude, without a copy of a tensor that may be large."""
    numbers = tensor.numpy()
    return max(float(numbers.max()), -float(numbers.min()))


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
        if settings.shared not in (None, shared is not None):
            told = "shared_expert" in settings.raw
            raise CheckpointError(
                f"{self.file} has {'no' if shared is None else 'the'} shared prompts of {where}",
                expected=f"what shared_expert says: {str(settings.shared).lower()}"
                if told
                else "shared_embedding at every prompt site, as other sites have it",
                fix=SAME_RUN if told else SAVE,
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
            self._prompts(roles["experts"], (rows, self.width)),
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
        tensor = self._prompts(name, (1, length, self.width))
        shape = (length, self.width)
        return ComputedTensor(name, tensor.dtype, shape, lambda: tensor.numpy().reshape(shape))

    def _prompts(self, name: str, shape: tuple[int, ...]) -> LazyTensor:
        """Return a tensor of prompts that a norm in float32 can be taken of."""
        tensor = self._take(name, shape)
        rows = tensor.numpy().astype(np.float64)
        largest = float(np.abs(rows).max(initial=0))
        if np.square(rows).sum(axis=-1).max(initial=0) > np.finfo(np.float32).max:
            raise CheckpointError(
                f"{name} in {self.file} has numbers up to {largest:.0e}, whose squares the norm "
                "before attention cannot add up in float32: these prompts were never initialised",
                expected="prompts about as large as the embedding's rows",
                fix=_INITIALISE,
            )
        return tensor

    def _take(self, name: str, shape: tuple[int, ...]) -> LazyTensor:
        try:
            return self.source.take(name, shape)
        except CheckpointError as error:
            if "finite" not in (error.expected or ""):
                raise
            raise CheckpointError(
                f"{error.found}: these prompts were never initialised",
                expected="finite numbers",
                fix=_INITIALISE,
            ) from error
