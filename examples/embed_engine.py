"""Use a bundle in a service: no compiler, no torch, no transformers.

    python examples/embed_engine.py BUNDLE "Great phone, would buy again."

Only the base installation of `ept-compiler` is needed. Load an engine once: threads may share it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from eptc.errors import EptcError
from eptc.runtime import Engine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eptc.runtime import Classification


def main(arguments: Sequence[str]) -> int:
    """Print each text's label, its probability or value, and the text; return the exit code."""
    if len(arguments) < 2:
        print("usage: embed_engine.py BUNDLE TEXT...", file=sys.stderr)
        return 2
    directory, *texts = arguments
    try:
        with Engine.load(directory) as engine:
            # Text beyond the length that training cut at is an error unless it may be cut here.
            answers = engine.classify(texts, truncate=True)
    except EptcError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for text, answer in zip(texts, answers, strict=True):
        print(f"{shown(answer)}\t{text}")
    return 0


def shown(answer: Classification) -> str:
    """Return an answer in a few characters."""
    if answer.value is not None:  # a regression
        return f"{answer.value:+.2f}"
    if answer.probabilities is None or answer.index is None:  # an answer written as text
        return str(answer.label)
    return f"{answer.label} {answer.probabilities[answer.index]:.3f}"


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
