"""Shapes that an engine is built for: the least, the usual and the largest of each dimension.

Dimensions have names. Those of one name are one size in all graphs, since what one gives is what
another is fed; `total_sequence` is always past and new tokens together. An encoder-decoder's text
is `sequence`, what its decoder is fed is `decoder_sequence`, and `encoder_sequence` is the text
with the prompts before it, where a checkpoint has some.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from eptc.errors import OptionError
from eptc.runtime.manifest import Manifest
from eptc.runtime.spec import GraphSpec
from eptc.similar_names import did_you_mean

__all__ = [
    "Profile", "Range", "Ranges", "check_given", "dimension", "parse_profiles", "profiles",
    "ranges",
]  # fmt: skip

_FORM = "NAME=MIN:OPT:MAX, such as batch=1:8:32"
# Rows that `Engine.classify` puts together, and what is usual of them.
_BATCH = (1, 8, 32)
# Tokens of a text where nothing tells, and the step that lengths are rounded up to.
_USUAL, _LONGEST, _STEP = 64, 512, 8
# Sizes that follow from others.
_SUMS = {
    "total_sequence": "past and new tokens together",
    "encoder_sequence": "the text and the prompts before it",
}


@dataclasses.dataclass(frozen=True)
class Range:
    """Sizes of one dimension.

    Args:
        low: the least.
        usual: what kernels are chosen for.
        high: the largest.
        source: where it is from: `given`, `probe`, or `default`.
    """

    low: int
    usual: int
    high: int
    source: str = "default"

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {"min": self.low, "opt": self.usual, "max": self.high, "from": self.source}

    def __str__(self) -> str:
        return f"{self.low}:{self.usual}:{self.high}"


Ranges = Mapping[str, Range]
# Shapes of each input of a graph with named dimensions: least, usual, largest.
Profile = dict[str, dict[str, list[int]]]


def parse_profiles(given: Sequence[str]) -> dict[str, Range]:
    """Read `NAME=MIN:OPT:MAX`.

    Raises:
        OptionError: another form, sizes out of order, one below 1 (0 for a past), or a name twice.
    """
    found: dict[str, Range] = {}
    for text in given:
        match = re.fullmatch(r"\s*(\w+)\s*=\s*(-?\d+):(-?\d+):(-?\d+)\s*", text)
        if match is None:
            raise OptionError(f"--profile is {text!r}", expected=_FORM)
        name, (low, usual, high) = match[1], (int(match[i]) for i in (2, 3, 4))
        if name in found:
            raise OptionError(f"--profile {name} is given twice", fix="give it once")
        if not low <= usual <= high:
            raise OptionError(f"--profile is {text!r}", expected="MIN <= OPT <= MAX")
        least = 0 if name == "past_sequence" else 1
        if low < least:
            raise OptionError(f"--profile is {text!r}", expected=f"sizes of {least} or more")
        found[name] = Range(low, usual, high, "given")
    return found


def dimension(graph: str, name: str, names: Collection[str]) -> str:
    """Return what a dimension of a graph is called in profiles.

    Args:
        graph: the graph's role.
        name: the dimension's name in it.
        names: of all of the graph's dimensions.
    """
    if graph != "decoder":
        return name
    if name == "encoder_sequence":
        # Prompts lengthen what the encoder gives; the mask is then the text's alone.
        return name if "mask_sequence" in names else "sequence"
    return {"sequence": "decoder_sequence", "mask_sequence": "sequence"}.get(name, name)


def check_given(given: Ranges, names: Sequence[str], positions: int | None, kind: str) -> None:
    """Check profiles against the graphs before anything is written.

    Args:
        given: what the caller said.
        names: dimensions of the graphs, as `dimension` calls them.
        positions: tokens that the model has positions for; None where they have no bound.
        kind: the engine's.

    Raises:
        OptionError: a dimension that there is not, sizes that the model cannot have, or ones that
            leave out what every answer needs.
    """
    own = sorted(set(names) - set(_SUMS))
    limits = {} if positions is None else {"sequence": positions, "past_sequence": positions - 1}
    # An answer begins without a past, and goes on by one token a step.
    needed = {"past_sequence": 0, "decoder_sequence": 1}
    if kind == "decoder-only":
        needed["sequence"] = 1
    for name, range_ in given.items():
        if name not in own:
            why = did_you_mean(name, own)
            if name in _SUMS and name in names:
                why = f", which is {_SUMS[name]}"
            raise OptionError(
                f"--profile names the dimension {name!r}{why}", expected=", ".join(own)
            )
        if range_.high > limits.get(name, range_.high):
            raise OptionError(
                f"--profile is {name}={range_}, and the model takes {limits[name]} at most",
                expected=f"a largest size of {limits[name]} or less",
            )
        if range_.low > needed.get(name, range_.low):
            raise OptionError(
                f"--profile is {name}={range_}, and answers are written with {needed[name]}",
                expected=f"a least size of {needed[name]}",
            )


def ranges(manifest: Manifest, lengths: Sequence[int], given: Ranges) -> dict[str, Range]:
    """Return the range of each dimension of a bundle.

    What is not given comes of the texts' lengths; without texts, of what the model takes. Any
    text up to the longest is taken, any past up to an answer to it.

    Args:
        manifest: the bundle's.
        lengths: tokens of each text that was given; may be empty.
        given: what the caller said.
    """
    limit = manifest.tokenizer.max_length if manifest.tokenizer is not None else None
    generation = manifest.generation
    if limit is None and generation is not None:
        limit = generation.max_positions
    text = _text_range(lengths, limit)
    text = given.get("sequence", text)
    found = {"batch": Range(*_BATCH), "sequence": text}
    if generation is not None and manifest.kind == "encoder-decoder":
        new = generation.max_new_tokens
        # Labels are scored as whole answers.
        found["decoder_sequence"] = Range(1, 1, new)
        found["past_sequence"] = Range(0, new // 2, new)
    elif generation is not None:
        most = text.high + generation.max_new_tokens
        if generation.max_positions is not None:
            most = min(most, generation.max_positions)
        # Most steps add one token to a past; the first has the whole prompt, and none.
        found["sequence"] = text if text.source == "given" else dataclasses.replace(text, usual=1)
        found["past_sequence"] = Range(0, min(text.usual, most - 1), most - 1)
    found |= given
    if manifest.kind == "decoder-only":
        found["total_sequence"] = _sum(found["sequence"], found["past_sequence"])
    if manifest.kind == "encoder-decoder" and (prompts := _prompts(manifest)):
        found["encoder_sequence"] = _sum(found["sequence"], Range(prompts, prompts, prompts))
    return found


def _prompts(manifest: Manifest) -> int:
    """Return how many tokens stand before each text."""
    return int((manifest.checkpoint.get("prompts") or {}).get("virtual_tokens", 0))


def _sum(*parts: Range) -> Range:
    low, usual, high = (
        sum(getattr(part, field) for part in parts) for field in ("low", "usual", "high")
    )
    return Range(low, usual, high, "sum")


def _text_range(lengths: Sequence[int], limit: int | None) -> Range:
    if not lengths:
        high = min(limit or _LONGEST, _LONGEST)
        return Range(1, min(_USUAL, high), high)
    ordered = sorted(max(1, length) for length in lengths)  # a text may have no tokens
    high = -(-ordered[-1] // _STEP) * _STEP
    if limit is not None:
        high = min(high, limit)
    return Range(1, min(ordered[len(ordered) // 2], high), high, "probe")


def profiles(graphs: Mapping[str, GraphSpec], found: Ranges) -> dict[str, Profile]:
    """Return, by graph, the shapes of every input that has a named dimension."""
    result: dict[str, Profile] = {}
    for role, graph in graphs.items():
        names = {size for tensor in graph.inputs for size in tensor.shape if isinstance(size, str)}
        sizes = {name: found[dimension(role, name, names)] for name in names}
        result[role] = {
            tensor.name: {
                bound: [
                    size if isinstance(size, int) else getattr(sizes[size], field)
                    for size in tensor.shape
                ]
                for bound, field in (("min", "low"), ("opt", "usual"), ("max", "high"))
            }
            for tensor in graph.inputs
            if any(isinstance(size, str) for size in tensor.shape)
        }
    return result
