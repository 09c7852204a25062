"""Every precision of one engine side by side: size, latency, score, flips."""

from __future__ import annotations

import importlib.util
import itertools
import shutil
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from eptc import bundle
from eptc.build import Bundle, export
from eptc.calibration import read_calibration
from eptc.comparison_report import Comparison, Row, write
from eptc.errors import InputError, MissingExtraError, OptionError, ParityError
from eptc.examples_file import read_examples
from eptc.job import Job
from eptc.options import IN_BLOCKS, WITH_RANGES, Options
from eptc.precision import SCHEMES, OptimizeFor, Precision
from eptc.precision_plan import PrecisionPlan
from eptc.runtime import Engine

__all__ = ["TAKEN_BY", "Comparison", "Row", "compare_precisions"]

# Texts that each engine is asked, one at a time, in every round; rounds that are not counted.
_TEXTS, _ROUNDS, _WARMUP = 20, 6, 1
# Options that some precisions alone take; others are built without.
_LOSSY = [name for name, scheme in SCHEMES.items() if scheme.lossy]
TAKEN_BY: dict[str, Collection[str]] = {
    "data": _LOSSY,
    "max_drop": _LOSSY,
    "max_flips": _LOSSY,
    "calibration": [name for name, scheme in SCHEMES.items() if scheme.calibrated],
    "calibration_method": WITH_RANGES,
    "block_method": IN_BLOCKS,
    "precision_plan": ["auto"],
    "search_evaluations": ["auto"],
    "search_minutes": ["auto"],
}
# Options that say what is written, whatever the precision.
_OF_TARGET = ("target", "profile", "tensorrt_version", "build")
_CHOSEN_HERE = (
    "its plan was chosen on these rows, so its score says too much good: score it on others with "
    "`eptc parity --data`"
)


def compare_precisions(
    ckpt: str | Path,
    *,
    out: str | Path,
    data: str | Path | None = None,
    precisions: Collection[Precision] | None = None,
    optimize_for: OptimizeFor | None = None,
    progress: Callable[[Any], None] = lambda _: None,
    **options: Any,
) -> Comparison:
    """Build an engine in every precision, and write down what each costs.

    A precision that does not run where it is to, lacks what it needs (`int8-static` calibration
    text, `auto` a budget or a plan), or whose engine loses more than it may, is a row that says
    why; the others go on.

    Args:
        ckpt: folder of the checkpoint.
        out: a new or empty folder: it gets a bundle for each precision, named after it, and
            `comparison.json`, `comparison.md` and `comparison.svg`.
        data: JSON lines file with labelled examples.
        precisions: which beside `fp32`; None: all.
        optimize_for: as for `export`.
        progress: likewise.
        options: further ones of `export`, such as a budget; each goes to the precisions that
            take it.

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
    out, options = Path(out), {**options, "data": data}
    _check(ckpt, optimize_for, options)
    with bundle.draft(out, force=False) as draft:
        built: dict[Precision, Bundle] = {}
        refused: dict[Precision, str] = {}
        for precision in SCHEMES:
            if precision != "fp32" and precisions is not None and precision not in precisions:
                continue
            progress(f"precision {precision}")
            try:
                found = export(
                    ckpt, out=draft.path / precision, precision=precision,
                    optimize_for=optimize_for, progress=progress, **_taken(precision, options),
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
        write(draft.path, comparison)
        draft.publish()
    return comparison


def _taken(precision: Precision, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that a precision takes."""
    return {
        name: value
        for name, value in options.items()
        if precision in TAKEN_BY.get(name, (precision,))
    }


def _check(ckpt: str | Path, optimize_for: OptimizeFor | None, options: Mapping[str, Any]) -> None:
    """Raise InputError for what is wrong with all of it: now, not in every row."""
    own = {name: options[name] for name in _OF_TARGET if name in options}
    Options(optimize_for=optimize_for, **own).check()
    # Which precisions run there, their rows say.
    options = {name: value for name, value in options.items() if name not in own}
    job = Job.read(ckpt, Options(precision="int8-weights", **_taken("int8-weights", options)))
    read_examples(Path(options["data"]), job.task, labelled=True)
    if options.get("calibration") is not None:
        read_calibration(Path(options["calibration"]), job.task)
    searched = [name for name, takers in TAKEN_BY.items() if takers == ["auto"]]
    if any(options.get(name) is not None for name in searched):
        Options(precision="auto", **_taken("auto", options)).check()
    if options.get("precision_plan") is not None:
        PrecisionPlan.read(Path(options["precision_plan"]))


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
                scores = compare_answers(
                    task, want, answers(engine, examples), labels,
                    precision=found.manifest.precision,
                )  # fmt: skip
        files = found.manifest.files
        low, high = scores["drop_interval"]
        milliseconds, ratio = latencies.get(precision, (None, None))
        rows.append(
            Row(
                precision,
                bundle_bytes=sum(record.size for record in files.values()),
                weight_bytes=files["weights.bin"].size,
                milliseconds=milliseconds,
                time_of_fp32=ratio,
                score=scores["engine"],
                drop=round(100 * scores["drop"], 2),
                drop_interval=(round(100 * low, 2), round(100 * high, 2)),
                flips=scores["flips"],
                flips_beyond_noise=scores["flips_beyond_noise"],
                cosine=scores["cosine"],
                note=_CHOSEN_HERE if scores.get("chosen_on_these_rows") else None,
            )
        )
    order = list(SCHEMES)
    rows.sort(key=lambda row: order.index(row.precision))
    return Comparison(out, scores["metric"], len(examples), tuple(rows))


def _latencies(
    bundles: Mapping[Precision, Path], texts: Sequence[Mapping[str, Any]]
) -> dict[Precision, tuple[float, float]]:
    """Return how long each engine takes for a text.

    Each is asked in turn with float32's, so that what slows the machine down for a while falls on
    both; more than these two are never in memory.

    Args:
        bundles: the engines; one is `fp32`.
        texts: what they are asked, one at a time.

    Returns:
        Median milliseconds, and the median ratio to what float32 took for the same text just
        before.
    """
    found: dict[Precision, tuple[float, float]] = {}
    exact: list[float] = []
    with Engine.load(bundles["fp32"], providers=["cpu"]) as fp32:
        for name, path in bundles.items():
            if name == "fp32":
                continue
            with Engine.load(path, providers=["cpu"]) as engine:
                before, after = _in_turn((fp32, engine), texts)
            exact += before
            ratios = [b / a for a, b in zip(before, after, strict=True)]
            found[name] = _median(after), _median(ratios)
        if not exact:  # nothing else runs here
            [exact] = _in_turn((fp32,), texts)
    return {"fp32": (_median(exact), 1.0), **found}


def _in_turn(engines: Sequence[Engine], texts: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """Return the milliseconds of every call of each engine."""
    taken: list[list[float]] = [[] for _ in engines]
    for number, text in itertools.product(range(_ROUNDS + _WARMUP), texts):
        for engine, times in zip(engines, taken, strict=True):
            start = time.perf_counter()
            engine.classify([text], truncate=True)
            if number >= _WARMUP:
                times.append(1000 * (time.perf_counter() - start))
    return taken


def _median(numbers: Sequence[float]) -> float:
    return round(statistics.median(numbers), 3)
