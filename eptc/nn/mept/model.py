"""`MeptModel`: a Hugging Face model that gives the answers of a MEPT or SMoP checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from eptc.errors import CheckpointError
from eptc.nn.adapted import SingleTaskModel
from eptc.nn.mept.base import task_model
from eptc.nn.mept.llama import prompt_llama
from eptc.nn.mept.site import PromptSite
from eptc.nn.mept.stored import StoredMept, StoredSite, read
from eptc.nn.mept.t5 import prompt_t5
from eptc.tasks import Task

__all__ = ["Coupling", "MeptModel"]

# `batch`: as the original code computes, where a row's answer may depend on its batch-mates.
Coupling = Literal["batch", "per-sample"]


class MeptModel(SingleTaskModel):
    """A checkpoint on its base, in eval mode.

    Attributes:
        hf: T5ForConditionalGeneration or LlamaForSequenceClassification; takes ids and mask of
            the text alone and answers as the checkpoint's own code does.
        input: the site of the text, None where nothing reads it and the file lacks it.
        blocks: the sites before blocks, by their number.
        layers: adapted linears: none.
        heads: modules that each task has its own copy of: none.
        prompts: positions that prompts take.
    """

    def __init__(self, hf: Any, stored: StoredMept, task: Task, mode: Coupling) -> None:
        super().__init__(hf, task)
        self.layers = {}
        self.prompts = stored.length
        # The original code fails for more than one row where a block has one prompt.
        coupled = mode == "batch" and not (stored.length == 1 and stored.blocks)
        t5 = hf.config.model_type == "t5"
        stack = hf.encoder if t5 else hf.model
        blocks = stack.block if t5 else stack.layers
        self.blocks = {
            block: _site(site, stored, f"block {block}", coupled=coupled)
            for block, site in stored.blocks.items()
            if block < len(blocks)
        }
        self.input = None
        if "experts" in stored.input:
            self.input = _site(stored.input, stored, "the input", coupled=coupled)
            stack.prompts = self.input
        for number, site in self.blocks.items():
            blocks[number].prompts = site
        if t5:
            if self.input is None and 0 not in self.blocks:
                raise CheckpointError(
                    "the file lacks prompt_encoder.embedding.weight, which was random and frozen",
                    fix="use the full state dict",
                )
            prompt_t5(hf, self.input, self.blocks, swaps=coupled and stored.length > 1)
        else:
            if self.input is None:
                raise CheckpointError("the file lacks prompt_embedding.weight")
            prompt_llama(hf, self.input, self.blocks)

    @classmethod
    def load(
        cls,
        directory: str | Path,
        base_dir: str | Path,
        *,
        task: Task | None = None,
        mode: Coupling = "batch",
        top_k: int | None = None,
        allow_pickle: bool = False,
    ) -> MeptModel:
        """Return a checkpoint on its base.

        Args:
            directory: the checkpoint's folder.
            base_dir: the base's: its configuration, and its weights where the checkpoint holds
                only what was trained.
            task: its one task; None: one named `default`.
            mode: `batch` as the original code computes, `per-sample` without what mixes rows.
            top_k: how many experts are mixed, where the folder does not say.
            allow_pickle: whether a `.bin` file may be read, weights only.

        Raises:
            OptionError: a pickle may not be read.
            CheckpointError: the checkpoint is damaged or does not fit the base.
            BaseModelError: the base cannot be used.
        """
        stored = read(Path(directory), top_k=top_k, allow_pickle=allow_pickle)
        hf = task_model(Path(base_dir), stored.tensors, stored.settings)
        return cls(hf, stored, task or _default(hf), mode).eval()


def _site(site: StoredSite, stored: StoredMept, where: str, *, coupled: bool) -> PromptSite:
    if lost := sorted({"experts", "router"} - site.keys()):
        raise CheckpointError(f"{where} has no {lost[0]}")
    experts, router, length = site["experts"], site["router"], stored.length
    if len(experts) != length * len(router):
        raise CheckpointError(
            f"{where} has {len(experts)} prompts for {len(router)} experts of {length}"
        )
    shared = site.get("shared")
    if shared is not None and tuple(shared.shape[:2]) != (1, length):
        raise CheckpointError(f"{where} shares {shared.shape[1]} prompts, an expert has {length}")
    return PromptSite(
        experts.reshape(len(router), -1),
        router,
        None if shared is None else shared[0],
        # Never trained: a file of what was trained lacks them.
        site.get("norm", torch.ones(experts.shape[1])),
        length=length,
        top_k=stored.top_k,
        stochastic=stored.settings["stochastic"],
        coupled=coupled,
    )


def _default(hf: Any) -> Task:
    if hf.config.model_type == "t5":
        return Task("default", "generation")
    labels = tuple(f"LABEL_{i}" for i in range(hf.config.num_labels))
    return Task("default", "classification", labels=labels)
