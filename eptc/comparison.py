"""Every precision of one engine side by side: size, latency, score, flips."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eptc import bundle
from eptc.build import Bundle, export
from eptc.calibration import read_calibration
from eptc.errors import InputError, MissingExtraError, OptionError, ParityError
from eptc.examples_file import read_examples
from eptc.job import Job
from eptc.options import IN_BLOCKS, Options
from eptc.parity_gate.answers import CLAIMED
from eptc.precision import SCHEMES, OptimizeFor, Precision
from eptc.runtime import Engine
from eptc.runtime.cpus import usable_cpus

__all__ = ["Comparison", "Row", "compare_precisions", "table"]

# Texts that each engine is asked, one at a time, in every round; rounds that are not counted.
_TEXTS, _ROUNDS, _WARMUP = 20, 6, 1
# As a part of an axis, points this near to one another have one label.
_NEAR = 0.06
_COLOUR = "#57606a"  # reads on light and dark pages


@dataclasses.dataclass(frozen=True)
class Row:
    """One precision.

    Args:
        precision: its name.
        refused: why there is no such engine; None where there is one.
        bundle_bytes: size of the bundle.
        weight_bytes: of its `weights.bin`.
        milliseconds: median time of a text alone; of a simulated precision, None: this machine
            would compute it in float32.
        score: of the task's metric on the data.
        drop: points lost against float32, with its paired 95 % interval.
        drop_interval: see `drop`.
        flips: labels that are others than float32's.
        flips_beyond_noise: of those, where float32 is sure.
        cosine: of the scores of all labels.
    """

    precision: Precision
    refused: str | None = None
    bundle_bytes: int | None = None
    weight_bytes: int | None = None
    milliseconds: float | None = None
    score: float | None = None
    drop: float | None = None
    drop_interval: tuple[float, float] | None = None
    flips: int | None = None
    flips_beyond_noise: int | None = None
    cosine: float | None = None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `--precision all` made.

    Args:
        path: its folder: a bundle for each precision, `comparison.json`, `.md` and `.svg`.
        metric: the task's.
        examples: rows it was measured on.
        rows: every precision, also those there is no engine of.
    """

    path: Path
    metric: str
    examples: int
    rows: tuple[Row, ...]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**dataclasses.asdict(self), "path": str(self.path)}


def compare_precisions(
    ckpt: str | Path,
    *,
    out: str | Path,
    data: str | Path | None = None,
    optimize_for: OptimizeFor | None = None,
    calibration: str | Path | None = None,
    max_drop: float | None = None,
    max_flips: float | None = None,
    progress: Callable[[Any], None] = lambda _: None,
    **options: Any,
) -> Comparison:
    """Build an engine in every precision, and write down what each costs.

    A precision that does not run where it is to, or whose engine loses more than it may, is a row
    that says why; the others go on.

    Args:
        ckpt: folder of the checkpoint.
        out: a new or empty folder: it gets a bundle for each precision, named after it, and
            `comparison.json`, `comparison.md` and `comparison.svg`.
        data: JSON lines file with labelled examples.
        optimize_for: as for `export`.
        calibration: likewise; without it there is no `int8-static`.
        max_drop: likewise, of each engine below float32.
        max_flips: likewise.
        progress: likewise.
        options: further ones of `export`.

    Raises:
        InputError: something about the input; nothing was written.
        MissingExtraError: matplotlib is not installed.
    """
    if data is None:
        raise OptionError(
            "--precision all compares scores, and was given no data to score on",
            expected="--data FILE: JSON lines with the task's fields and `label`",
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError(
            "matplotlib is not installed, which draws the comparison",
            fix="pip install 'ept-compiler[plot]'",
        )
    out = Path(out)
    labelled: dict[str, Any] = {"data": data, "max_drop": max_drop, "max_flips": max_flips}
    # What is wrong with all of them is said now, not in every row.
    target = {"target": options.get("target", "onnx")}
    Options(optimize_for=optimize_for, **target).check()
    lossy = {"precision": "int8-weights", "optimize_for": "cpu", "target": "onnx"}
    job = Job.read(ckpt, Options(**{**labelled, **options, **lossy}))
    read_examples(Path(data), job.task, labelled=True)
    if calibration is not None:
        read_calibration(Path(calibration), job.task)
    with bundle.draft(out, force=False) as draft:
        built: dict[Precision, Bundle] = {}
        refused: dict[Precision, str] = {}
        for precision, scheme in SCHEMES.items():
            if precision == "auto":
                continue
            progress(f"precision {precision}")
            given = options | (labelled if scheme.lossy else {})
            if scheme.calibrated:
                given["calibration"] = calibration
            if precision not in IN_BLOCKS:
                given.pop("block_method", None)
            try:
                found = export(
                    ckpt, out=draft.path / precision, precision=precision,
                    optimize_for=optimize_for, progress=progress, **given,
                )  # fmt: skip
            except (InputError, ParityError) as error:
                if precision == "fp32":
                    raise
                refused[precision] = error.found
                continue
            if precision == "keep" and found.manifest.precision == "fp32":
                shutil.rmtree(found.path)  # the base has nothing to keep
            else:
                built[precision] = found
        progress("latency")
        comparison = _compared(out, built, refused, data)
        _write(draft.path, comparison)
        draft.publish()
    return comparison


def _compared(
    out: Path, built: Mapping[Precision, Bundle], refused: Mapping[Precision, str], data: Any
) -> Comparison:
    from eptc.parity_gate import answers, compare_answers, right_answers

    task = built["fp32"].manifest.task
    assert task is not None
    examples = read_examples(Path(data), task, labelled=True)
    labels = right_answers(task, examples)
    with built["fp32"].load(providers=["cpu"]) as engine:
        want = answers(engine, examples)
    latencies = _latencies(
        {name: b.path for name, b in built.items() if not SCHEMES[name].simulated},
        examples[:: max(1, len(examples) // _TEXTS)][:_TEXTS],
    )
    rows = [Row(name, reason) for name, reason in refused.items()]
    scores: dict[str, Any] = {}
    for precision, found in built.items():
        scores = found.manifest.parity.get("scores") or {}
        if not scores:
            with found.load(providers=["cpu"]) as engine:
                scores = compare_answers(task, want, answers(engine, examples), labels)
        files = found.manifest.files
        rows.append(
            Row(
                precision, None, sum(record.size for record in files.values()),
                files["weights.bin"].size, latencies.get(precision), scores["engine"],
                round(100 * scores["drop"], 2),
                (
                    round(100 * scores["drop_interval"][0], 2),
                    round(100 * scores["drop_interval"][1], 2),
                ),
                scores["flips"], scores["flips_beyond_noise"], scores["cosine"],
            )
        )  # fmt: skip
    order = list(SCHEMES)
    rows.sort(key=lambda row: order.index(row.precision))
    return Comparison(out, scores["metric"], len(examples), tuple(rows))


def _latencies(
    bundles: Mapping[Precision, Path], texts: Sequence[Mapping[str, Any]]
) -> dict[Precision, float]:
    """Return the median milliseconds that each engine takes for a text, asked in turn."""
    taken: dict[Precision, list[float]] = {name: [] for name in bundles}
    with contextlib.ExitStack() as stack:
        engines = {
            name: stack.enter_context(Engine.load(path, providers=["cpu"]))
            for name, path in bundles.items()
        }
        for number, text in itertools.product(range(_ROUNDS + _WARMUP), texts):
            for name, engine in engines.items():
                start = time.perf_counter()
                engine.classify([text], truncate=True)
                if number >= _WARMUP:
                    taken[name].append(1000 * (time.perf_counter() - start))
    return {name: round(statistics.median(times), 3) for name, times in taken.items()}


def _write(folder: Path, comparison: Comparison) -> None:
    bundle.write_json(folder / "comparison.json", comparison.to_json())
    (folder / "comparison.md").write_text(_markdown(comparison), "utf-8")
    _draw(comparison, folder / "comparison.svg")


def table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return the heads of the comparison's columns, and the cells of each engine's row."""
    exact = next(row for row in comparison.rows if row.precision == "fp32")
    heads = [
        "precision", "bundle MB", "of fp32", "ms a text", "of fp32", comparison.metric,
        "points lost", "95 % interval", "flips", "where sure", "cosine",
    ]  # fmt: skip
    cells = []
    for row in comparison.rows:
        if row.refused is not None:
            continue
        assert row.bundle_bytes and exact.bundle_bytes and exact.milliseconds  # noqa: PT018
        assert row.drop is not None
        assert row.drop_interval is not None
        cells.append([
            row.precision, f"{row.bundle_bytes / 1e6:.1f}",
            f"{row.bundle_bytes / exact.bundle_bytes:.3f}",
            "-" if row.milliseconds is None else f"{row.milliseconds:.2f}",
            "-" if row.milliseconds is None else f"{row.milliseconds / exact.milliseconds:.2f}",
            f"{row.score:.4f}", f"{row.drop + 0.0:.2f}",
            f"{row.drop_interval[0]:.2f} to {row.drop_interval[1]:.2f}", str(row.flips),
            str(row.flips_beyond_noise), f"{row.cosine:.6f}",
        ])  # fmt: skip
    return heads, cells


def _markdown(comparison: Comparison) -> str:
    heads, cells = table(comparison)
    lines = [heads, ["---"] * len(heads), *cells]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    for row in comparison.rows:
        if row.refused is not None:
            text += f"\n\nNo {row.precision}: {row.refused}."
    return (
        f"# Precisions\n\n{comparison.examples} labelled rows; a text at a time on "
        f"{usable_cpus()} CPUs; fp16 and bf16 are simulated, so they have no latency here. A "
        f"loss of less than its interval says nothing, and fewer than {CLAIMED} rows speak for "
        f"themselves alone.\n\n{text}\n"
    )


def _draw(comparison: Comparison, path: Path) -> None:
    """Draw the score over the size and over the latency: up and left is better."""
    import matplotlib
    from matplotlib.figure import Figure

    shown = [row for row in comparison.rows if row.refused is None]
    # Text stays text: its outlines would depend on the fonts that are installed.
    settings: dict[str, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": "eptc", "font.family": "sans-serif",
        "font.size": 9, "text.color": _COLOUR, "axes.labelcolor": _COLOUR,
        "axes.edgecolor": _COLOUR, "xtick.color": _COLOUR, "ytick.color": _COLOUR,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(9.6, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        left.set(xlabel="bundle, MB", ylabel=comparison.metric)
        right.set(xlabel="ms a text")
        sizes = {row.precision: (row.bundle_bytes or 0) / 1e6 for row in shown}
        times = {row.precision: row.milliseconds for row in shown if row.milliseconds is not None}
        _points(left, sizes, shown)
        _points(right, times, shown)
        for axes in (left, right):
            axes.set_xlim(left=0)
            axes.margins(0.15)
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
        figure.savefig(path, transparent=True, metadata={"Date": None})


def _points(axes: Any, places: Mapping[Precision, float], rows: Sequence[Row]) -> None:
    """Draw a point for each precision; those that lie on one another share their label."""
    near = _NEAR * max(places.values())
    labels: dict[tuple[float, float | None], list[str]] = {}
    for row in sorted(rows, key=lambda row: places.get(row.precision, 0.0)):
        if row.precision not in places:
            continue
        x = places[row.precision]
        axes.plot([x], [row.score], "o", color="#4c9f70" if row.precision == "fp32" else "#d1803b")
        beside = [key for key in labels if key[1] == row.score and x - key[0] < near]
        labels.setdefault(beside[0] if beside else (x, row.score), []).append(row.precision)
    for place, names in labels.items():
        axes.annotate(
            ", ".join(names), place, xytext=(5, 4), textcoords="offset points", fontsize=8
        )
