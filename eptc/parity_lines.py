"""What a parity summary says, in lines for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["beside_routes", "folder_lines", "parity_lines", "thrown_away"]


def parity_lines(parity: Mapping[str, Any]) -> Iterator[str]:
    """Yield what was compared, and how near it came.

    Args:
        parity: a manifest's `parity`, or the summary of a report.
    """
    for name, found in (("parity before lowering", parity.get("exact")), ("parity", parity)):
        if found and found["verified"]:
            yield f"{name} passed{_under(found)}: {_compared(found)}"
            for task, part in found.get("tasks", {}).items():
                yield f"  {task}: {_compared(part)}"
            if mixed := found.get("mixed"):
                yield f"  rows of several tasks in a batch: {_compared(mixed)}"
    if (frozen := parity.get("frozen")) is not None:
        yield beside_routes(frozen)


def folder_lines(parity: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the model of a folder was compared with; nothing where nothing was.

    Args:
        parity: of one task, as `eptc.json` says it.
    """
    if not parity["verified"]:
        return
    weights = parity["weights"]
    yield (
        f"parity passed: {weights['tensors']} tensors on disk, {weights['adapted']} of them with "
        f"experts, off by at most {weights['largest_deviation']:.2g} of their bound"
    )
    for name, key in (("in transformers", "outputs"), ("in onnxruntime-genai", "genai")):
        if (found := parity.get(key)) is not None:
            yield f"parity {name} passed: {_compared(found)}"


def beside_routes(frozen: Mapping[str, Any]) -> str:
    """Return what constant gates change of the answers of the model that routes.

    Args:
        frozen: what `parity.frozen` of a manifest holds.
    """
    rows, flips = frozen["rows"], frozen["flips"]
    said = "beside the model that routes: "
    if flips is not None:
        said += f"{flips} of {rows} answers change on {frozen['text']}"
    if frozen["error"] is not None:
        what = "values" if flips is None else "scores"
        where = f" over {rows} rows of {frozen['text']}" if flips is None else ""
        said += ("" if flips is None else "; ") + f"{what} are off by {frozen['error']:.2g}{where}"
        said += f" (root mean square), cosine {frozen['cosine']:.6f}"
    return said


def thrown_away(spread: Mapping[str, Sequence[float]]) -> str:
    """Return how far gates spread that were replaced by their means.

    Args:
        spread: standard deviation of each expert's gate, by linear.
    """
    typical = {
        path: (sum(s * s for s in each) / len(each)) ** 0.5 for path, each in spread.items()
    }
    widest = max(typical, key=lambda path: typical[path])
    return (
        f"a standard deviation of {sum(typical.values()) / len(typical):.2g} on average, "
        f"{typical[widest]:.2g} in {widest}"
    )


def _under(found: Mapping[str, Any]) -> str:
    return " under the same constant gates" if found.get("constant_gates") else ""


def _compared(found: Mapping[str, Any]) -> str:
    left_out = found.get("rows_left_out", 0)
    return (
        f"{found['tensors']} tensors, largest error {found['largest_error']:.2g} (allowed "
        f"{found['its_bound']:.2g}); {found['decisions']} decisions, {found['flips']} flips"
        # A bundle of an earlier version does not say of how many.
        + (f"; {left_out} of {found.get('rows', '?')} rows left out, whose routes are within "
           "rounding of others" if left_out else "")
    )  # fmt: skip
