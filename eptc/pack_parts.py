"""What of a pack is compared by itself: each task, switched to and folded into the base."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eptc.layer_errors import LayerError, layer_errors
from eptc.pair import Pair
from eptc.parity_gate.probes import Example, Probe
from eptc.parts import Part, TaskPart
from eptc.runtime import Engine
from eptc.runtime.pack_tensors import read_tensors

if TYPE_CHECKING:
    from eptc.pack_sides import PackSides

__all__ = ["FoldedPart", "PackedPart"]


class PackedPart(TaskPart):
    """A task of a pack, its factors beside the base's weights.

    Args:
        sides: the pack and its reference.
        pair: the task beside its checkpoint.
    """

    def __init__(self, sides: PackSides, pair: Pair) -> None:
        super().__init__(sides, pair.packed, pair.task)
        self._pack_sides = sides
        self._pair = pair

    @property
    def pair(self) -> Pair:
        """The task beside its checkpoint."""
        return self._pair

    @property
    def engine(self) -> Engine:
        """The engine that shares its sessions with the other tasks'."""
        return self._pack_sides.engine_of(self.name, folded=False)

    def layers(self, name: str) -> list[LayerError]:
        """Return the error of every layer on a probe (`Part.layers`)."""
        assert self._pair.pack is not None
        probe, _ = self.outcomes(name)
        tensors = read_tensors(self._pair.folder, self._pair.pack.manifest, self.name)
        with self._sides.whole() as (_, reference):
            return layer_errors(
                self.engine, reference, self.task.name, probe, self._sides.bound, tensors
            )


class FoldedPart(Part):
    """The same task with sessions of its own, in whose weights its factors are.

    Its layers stand in no file: nothing but the runtime has the weights.

    Args:
        sides: the pack and its reference.
        task: the task as it is switched to.
    """

    def __init__(self, sides: PackSides, task: PackedPart) -> None:
        super().__init__(sides, f"{task.name}, folded")
        self._pack_sides = sides
        self._task = task

    @property
    def engine(self) -> Engine:
        """The engine that has sessions of its own."""
        return self._pack_sides.engine_of(self._task.name, folded=True)

    @property
    def seeded(self) -> dict[str, Probe]:
        """The probes of seeded tokens."""
        return self._task.seeded

    @property
    def _asked(self) -> str:
        return self._task.task.name

    @property
    def _texts(self) -> dict[str, list[Example]]:
        return self._task._texts

    def _text_probe(self, name: str) -> Probe:
        return self._task._text_probe(name)
