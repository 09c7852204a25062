"""Prompt tuning: vectors before the text, mixed from experts by a router for each row.

::

    p = softmax(W q);  v, e = the top_k largest of p
    P = sum_j v_j E[e_j] + shared            [n, d]

A site before a block reads q from the rows that arrive there and replaces their first n.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from eptc.tensors import LazyTensor

__all__ = ["Coupling", "PromptLayout", "PromptSite", "PromptTuning"]

# Whether rows of a batch are mixed as the original code mixes them.
Coupling = Literal["batch", "per-sample"]


@dataclasses.dataclass(frozen=True)
class PromptLayout:
    """What a prompted task model computes: everything but the numbers.

    Args:
        length: n, prompts of a row.
        experts: experts of a site.
        top_k: how many of them are mixed.
        layers: blocks that replace the prompts, ascending.
        shared: whether a site adds prompts that every row gets.
        constant: whether prompts depend on nothing.
        coupled: whether rows are mixed: with `top_k` 1 each row gets the experts of all rows,
            and T5's first prompts change places where a batch has n rows.
    """

    length: int
    experts: int
    top_k: int
    layers: tuple[int, ...]
    shared: bool
    constant: bool
    coupled: bool

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**dataclasses.asdict(self), "layers": list(self.layers)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PromptLayout:
        """Make a layout from what `to_json` returned."""
        return cls(**{**data, "layers": tuple(data["layers"])})

    def of_blocks(self, kept: tuple[int, ...]) -> PromptLayout:
        """Return the layout of a model that has only some of the blocks, in their order."""
        layers = tuple(new for new, old in enumerate(kept) if old in self.layers)
        return dataclasses.replace(self, layers=layers)


@dataclasses.dataclass(frozen=True)
class PromptSite:
    """The tensors of one site.

    Args:
        experts: E [experts * n, d]; expert e has the rows from e * n on.
        router: W [experts, d].
        shared: prompts that every row gets [n, d], or None.
        norm: weight of the RMS norm that the router's input passes [d], or None.
    """

    experts: LazyTensor
    router: LazyTensor
    shared: LazyTensor | None
    norm: LazyTensor | None


@dataclasses.dataclass(frozen=True)
class PromptTuning:
    """Prompts of a T5 or of a Llama classifier.

    Args:
        model_type: `t5` or `llama`.
        length: n, prompts of a row.
        top_k: how many experts a site mixes.
        stochastic: the mean of all experts instead.
        input: the site of the text; None where nothing reads what it would give.
        blocks: the sites before blocks, by their number.
    """

    model_type: str
    length: int
    top_k: int
    stochastic: bool
    input: PromptSite | None
    blocks: Mapping[int, PromptSite]

    @property
    def sites(self) -> tuple[PromptSite, ...]:
        """The sites that are read, the text's first."""
        return tuple(site for site in (self.input, *self.blocks.values()) if site is not None)

    @property
    def num_experts(self) -> int:
        """Experts of each site."""
        return self.sites[0].router.shape[0]

    @property
    def couples(self) -> bool:
        """Whether the original code mixes the rows of a batch."""
        swaps = self.model_type == "t5" and self.input is not None and self.length > 1
        return swaps or (self.top_k == 1 and not self.stochastic)

    @property
    def reads_padding(self) -> bool:
        """Whether an answer depends on how far its row is padded.

        A block's router sums padding too, and a Llama classifier reads its last position.
        """
        routed = bool(self.blocks) and not (self.stochastic or self.num_experts == 1)
        return routed or self.model_type == "llama"

    def layout(self, coupling: Coupling) -> PromptLayout:
        """Return what the model computes; where nothing mixes rows, both modes are the same."""
        coupled = coupling == "batch" and self.couples
        return PromptLayout(
            self.length,
            self.num_experts,
            self.top_k,
            tuple(sorted(self.blocks)),
            self.sites[0].shared is not None,
            # One expert has the probability 1; added up over rows it depends on their number.
            self.stochastic or (self.num_experts == 1 and not coupled),
            coupled,
        )
