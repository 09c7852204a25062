"""Many builds from one plan: a matrix of tasks, precisions and targets, resumed where it ended."""

from __future__ import annotations

from eptc.builds.outcome import Outcome, Report
from eptc.builds.plan import Build, BuildPlan
from eptc.builds.run import build_all

__all__ = ["Build", "BuildPlan", "Outcome", "Report", "build_all"]
