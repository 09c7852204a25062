"""The checks of a bundle as tests of pytest."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from eptc.checks import Check, Checks, Limits, NotCheckedError
from eptc.checks_of import checks_of
from eptc.errors import EptcError

__all__ = ["collect"]


def collect(
    session: pytest.Session, bundle: Path, options: Mapping[str, Any], limits: Mapping[str, float]
) -> list[pytest.Item]:
    """Return a test for each check, in the order `eptc.checks.Checks` has.

    Args:
        session: of the run; what the checks load is freed with it.
        bundle: the bundle's folder, or a pack's.
        options: the reference and how to read it, as for `eptc.parity`.
        limits: fields of `Limits`.
    """
    checks = checks_of(bundle, limits=Limits(**limits), **options)
    session.config.add_cleanup(checks.sides.close)
    parent = _Bundle.from_parent(
        session, name=bundle.name, nodeid=f"eptc::{_plain(bundle.resolve().name)}"
    )
    parent.checks = checks
    with _own_warnings():
        return list(parent.collect())


class _Bundle(pytest.Collector):
    """A bundle; its name is part of what its tests are called in reports."""

    checks: Checks

    def collect(self) -> Iterator[_CheckItem]:
        """Yield a test for each check."""
        for check in self.checks:
            name = f"{check.name}[{_plain(check.which)}]" if check.which else check.name
            item = _CheckItem.from_parent(self, name=name)
            item.check = check
            item.add_marker("eptc")
            if self.config.pluginmanager.hasplugin("xdist"):
                # With --dist loadgroup one worker has them all, and loads the model once.
                item.add_marker(pytest.mark.xdist_group("eptc"))
            yield item


class _CheckItem(pytest.Item):
    """One check."""

    check: Check

    def runtest(self) -> None:
        """Run the check; what it measured goes into JUnit's properties."""
        try:
            with _own_warnings():
                found = self.check.run()
        except NotCheckedError as error:
            pytest.skip(str(error))
        self.user_properties += [(f"eptc_{name}", value) for name, value in found.items()]

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """Say what was found, expected and what to do; a traceback is for bugs alone."""
        if isinstance(excinfo.value, EptcError):
            return f"{self.check.name} {self.check.which}".strip() + f": {excinfo.value}"
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int, str]:
        """Return where the check belongs: to the bundle."""
        return self.path, 0, f"eptc {self.name}"


@contextlib.contextmanager
def _own_warnings() -> Iterator[None]:
    """Leave out what torch and transformers warn about: a user's tests may take it for errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _plain(text: str) -> str:
    """Return text as part of a test's name: letters, digits, dots and hyphens."""
    return re.sub(r"[^\w.]+", "-", text).strip("-")
