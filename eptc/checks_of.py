"""The checks of what a folder holds: a bundle, or a pack, whose tasks are checked one by one."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from eptc.checks import Check, Checks, Found, Limits, NotCheckedError, rounded
from eptc.errors import BundleError
from eptc.pack_sides import PackSides
from eptc.pair import Pair
from eptc.parity_gate.packs import check_pack_weights
from eptc.parts import TaskPart
from eptc.runtime.spec import PACK

__all__ = ["PackChecks", "checks_of"]


class PackChecks(Checks):
    """The checks of one pack; arguments as for `Checks`.

    Every task that was made from the reference is compared as it is switched to and folded.
    """

    sides: PackSides

    def __init__(
        self, bundle: str | Path, *, limits: Limits | None = None, **options: Any
    ) -> None:
        super().__init__(bundle, limits=limits, **options)
        self.sides = PackSides(Path(bundle), limits or Limits(), options)

    def _origins(self) -> Iterator[Check]:
        for name in self.sides.names:
            yield Check("origin", "", functools.partial(self._origin_of, name), name)

    def _origin_of(self, name: str) -> Found:
        found = self.sides.pairs[name]
        if isinstance(found, Pair):
            return {"checkpoint": found.source.sha256, "base": found.source.base.sha256}
        others = any(isinstance(pair, Pair) for pair in self.sides.pairs.values())
        if others and isinstance(found, BundleError):
            raise NotCheckedError(f"not compared here: {found.found}")
        raise found

    def _of_weights(self, tasks: Sequence[TaskPart]) -> Iterator[Check]:
        for part in tasks:
            yield Check("weights", "", functools.partial(self._weights_of, part), part.name)

    def _weights_of(self, part: TaskPart) -> Found:
        pack = self.sides.pair.pack
        assert pack is not None
        with self.sides.whole() as (_, reference):
            found = check_pack_weights(pack, part.name, reference, part.task_id(reference))
        return {"of_its_bound": rounded(found[0]), "of_its_bound_folded": rounded(found[1])}


def checks_of(bundle: str | Path, *, limits: Limits | None = None, **options: Any) -> Checks:
    """Return the checks of a bundle, or of a pack.

    Args:
        bundle: the folder.
        limits: what is allowed instead of what the bundle says.
        options: the reference and how to read it, as for `eptc.parity`.
    """
    kind = PackChecks if (Path(bundle) / PACK).exists() else Checks
    return kind(bundle, limits=limits, **options)
