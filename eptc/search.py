"""The cheapest precision for each weight that keeps a budget on labelled data."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir

from eptc.errors import OptionError, ParityError
from eptc.parity_gate import Budget, Example
from eptc.precision_plan import PrecisionPlan
from eptc.run_passes import Step
from eptc.trials import EXACT, LOWER, Out, Trials

__all__ = ["Found", "search"]

# Plans whose answers may be asked for where the caller does not say.
_EVALUATIONS = 100


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search found.

    Args:
        plan: the cheapest plan that keeps the budget, of those that were tried.
        record: how it was found, as JSON values. `searched_weight_bytes` is what the weights
            take that could be stored in several levels, with their scales, and
            `searched_weight_bytes_exact` what they take in float32; `weights.bin` holds the
            others as well.
    """

    plan: PrecisionPlan
    record: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class _Move:
    """One step down for a group of weights: what it costs in answers, for each byte it saves."""

    slope: float
    group: str
    level: str


def search(
    graphs: Mapping[str, onnx_ir.Model],
    exact: Path,
    passes: Callable[[PrecisionPlan], Sequence[Step]],
    examples: Sequence[Example],
    budget: Budget,
    *,
    evaluations: int | None,
    minutes: float | None,
    progress: Callable[[Any], None],
) -> Found:
    """Search the plan with the fewest bytes of weights that keeps a budget.

    First each group of weights alone is stored in each lower level, and the error of the answers
    measured on some rows. Steps down are then taken in the order of error for each byte saved,
    as if errors added up: of these plans, one after another a step lower, the last that keeps the
    budget is found by bisection, on all rows. Then every further step is tried once while there
    are evaluations left. Nothing is drawn at random: the same input gives the same plan. What was
    evaluated is kept on disk, so that a search that was interrupted goes on where it was.

    Args:
        graphs: the exact graphs; left as they are.
        exact: their bundle.
        passes: the passes that bring about a plan.
        examples: labelled texts.
        budget: what a plan may cost.
        evaluations: how often some plan's answers may be asked for; None: 100. It decides how
            fine the groups are: single weights, blocks of the model, or all weights together.
        minutes: wall time after which the best plan so far is taken; None: no limit.
        progress: called with what is being done.

    Raises:
        OptionError: no weight can be stored lower.
        ParityError: no plan that stores anything lower keeps the budget.
    """
    evaluations = _EVALUATIONS if evaluations is None else evaluations
    with Trials(graphs, exact, passes, examples, progress) as trials:
        if not trials.levels:
            raise OptionError(
                "no weight of this model can be stored in integers: none is wide enough",
                fix="build with --precision fp32, keep or fp16",
            )
        trials.limit(evaluations, minutes)
        groups, fineness = _groups(trials.levels, evaluations)
        best: tuple[PrecisionPlan, dict[str, Any]] | None = None
        moves: list[_Move] = []
        taken: list[_Move] = []
        last = "nothing was tried on all rows"
        try:
            moves = _moves(trials, groups)
            low, high = 0, len(moves)  # plan 0 is the exact one
            while low < high:
                middle = (low + high + 1) // 2
                plan = _plan(trials, groups, moves[:middle])
                scores = trials.scores(plan)
                if reason := budget.exceeded(scores):
                    high, last = middle - 1, reason
                else:
                    low, best, taken = middle, (plan, scores), moves[:middle]
            for move in moves[low + 1 :]:
                plan = _plan(trials, groups, [*taken, move])
                scores = trials.scores(plan)
                if not budget.exceeded(scores):
                    best, taken = (plan, scores), [*taken, move]
        except Out as out:
            stopped: str | None = str(out)
        else:
            stopped = None
        if best is None:
            raise ParityError(
                f"no plan was found that stores anything below {EXACT} and keeps the budget: "
                f"{last}" + (f"; {stopped}" if stopped else ""),
                fix="allow a larger --max-drop or --max-flips"
                + (", more --search-evaluations or --search-minutes" if stopped else "")
                + ", or build with --precision fp32",
            )
        plan, scores = best
        record = {
            "groups": fineness,
            "evaluations": trials.evaluated,
            "evaluations_allowed": evaluations,
            "minutes_allowed": minutes,
            "stopped": stopped,
            "budget": dataclasses.asdict(budget),
            "searched_weight_bytes": trials.cost(plan),
            "searched_weight_bytes_exact": trials.cost(_plan(trials, groups, [])),
            "scores": scores,
        }
        return Found(plan, record)


def _groups(
    levels: Mapping[str, Sequence[str]], evaluations: int
) -> tuple[dict[str, list[str]], str]:
    """Return groups of weights, the finest that can be tried in so many evaluations."""
    ways: dict[str, Callable[[str], str]] = {
        "single weights": lambda name: name,
        "blocks": lambda name: found[0] if (found := re.match(r".*?\.\d+(?=\.)", name)) else name,
        "all weights together": lambda _: "all",
    }
    for fineness, key in ways.items():  # noqa: B007  # the last one counts
        groups: dict[str, list[str]] = {}
        for name in sorted(levels):
            groups.setdefault(key(name), []).append(name)
        alone = sum(len(_levels(levels, names)) for names in groups.values())
        if alone + math.ceil(math.log2(alone + 1)) + 1 <= evaluations:
            break
    return groups, fineness


def _levels(levels: Mapping[str, Sequence[str]], names: Iterable[str]) -> list[str]:
    """Return the lower levels that some weights of a group have."""
    return [level for level in LOWER if any(level in levels[name] for name in names)]


def _moves(trials: Trials, groups: Mapping[str, Sequence[str]]) -> list[_Move]:
    """Return every step down that is worth taking, the best bargain first.

    Of a group's levels those count that lie on the lower convex hull of error over bytes saved.
    """
    moves = []
    exact = trials.cost(_plan(trials, groups, []))
    for group, names in groups.items():
        points = [(0, 0.0, EXACT)]
        for level in _levels(trials.levels, names):
            plan = _plan(trials, groups, [_Move(0.0, group, level)])
            points.append((exact - trials.cost(plan), trials.error(plan), level))
        hull = [points[0]]
        for point in sorted(points[1:]):
            if point[0] <= hull[-1][0]:
                continue
            while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
                hull.pop()
            hull.append(point)
        moves += [
            _Move(_slope(one, other), group, other[2]) for one, other in itertools.pairwise(hull)
        ]
    return sorted(moves, key=lambda move: (move.slope, move.group))


def _slope(one: tuple[int, float, str], other: tuple[int, float, str]) -> float:
    return (other[1] - one[1]) / (other[0] - one[0])


def _plan(
    trials: Trials, groups: Mapping[str, Sequence[str]], moves: Iterable[_Move]
) -> PrecisionPlan:
    """Return the plan that some steps down, in order, come to."""
    weights = dict.fromkeys(trials.levels, EXACT)
    for move in moves:
        for name in groups[move.group]:
            if move.level in trials.levels[name]:
                weights[name] = move.level
    return PrecisionPlan(weights)
