"""Which pass is to blame for a bundle that is off: the checkpoint is compiled once more."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, get_args

from eptc.build import Bundle, export
from eptc.errors import EptcError, ParityError
from eptc.pair import Pair
from eptc.precision import OptimizeFor
from eptc.runtime.manifest import Manifest
from eptc.runtime.pack_manifest import read_pack
from eptc.runtime.pack_spec import PackTask
from eptc.runtime.verify import verify

__all__ = ["blame"]

_SOUND = "compiled once more, it agrees with the reference after every pass: none is to blame"
# What `eptc export` may be asked for again without the data the first build had.
_PRECISIONS = {"fp32": "fp32", "fp16-weights": "keep", "bf16-weights": "keep"}


def blame(pair: Pair) -> str:
    """Return what is known of the pass that is to blame for a bundle that is off.

    A build of the same checkpoint is proven before it is published: one that fails names the
    first pass after which the engine is off. Where it passes, the passes are sound, and since two
    builds of one input are equal to the byte, what differs was changed after the build, or the
    build was another version's.
    """
    manifest = pair.manifest
    precision = _PRECISIONS.get(manifest.precision)
    added = [record["name"] for record in manifest.passes if record.get("origin")]
    if precision is None or manifest.target != "onnx" or manifest.routing.mode == "frozen":
        return (
            "the first pass is not known: what the build was given beside the checkpoint "
            "(calibration text, a budget, a target's options) is not in the bundle"
        )
    if added:
        return f"the first pass is not known: the build used passes of others ({added[0]})"
    with tempfile.TemporaryDirectory(prefix="eptc-") as folder:
        try:
            fresh = export(pair.source.path, out=Path(folder) / "again", **_options(pair))
        except ParityError as error:
            return f"compiled once more, it fails as well: {error.fix or error.found}"
        except EptcError as error:
            return f"the first pass is not known: compiled once more, it fails: {error.found}"
        if pair.pack is not None:
            return _what_differs_of(pair, Path(folder) / "again")
        assert isinstance(fresh, Bundle)
        return _what_differs(pair.folder, manifest, fresh.manifest)


def _options(pair: Pair) -> dict[str, Any]:
    manifest, source = pair.manifest, pair.source
    mode = manifest.routing.mode
    options: dict[str, Any] = {
        "task": [task.name for task in pair.tasks] if pair.manifest.tasks else pair.task.name,
        "base": source.base.path,
        "precision": _PRECISIONS[manifest.precision],
        "optimize_for": next(p for p in get_args(OptimizeFor) if p == manifest.optimized_for),
        "routing": mode if mode in ("batch", "per-sample") else "exact",
        "format": source.format.name,
    }
    if pair.pack is not None:
        own = [entry.task.name for entry in _of_the_checkpoint(pair).values()]
        options |= {"task": list(dict.fromkeys(own)), "layout": "pack"}
    if not source.format.describes_tasks:
        options["tasks"] = [task.name for task in source.contents.tasks]
        options["top_k"] = source.contents.top_k
    return options


def _of_the_checkpoint(pair: Pair) -> dict[str, PackTask]:
    """Return the tasks of a pack that were made from the pair's checkpoint."""
    assert pair.pack is not None
    return {
        name: entry
        for name, entry in pair.pack.manifest.tasks.items()
        if entry.checkpoint["sha256"] == pair.source.sha256
    }


def _what_differs_of(pair: Pair, again: Path) -> str:
    """Say which files of a pack are not what a sound build writes.

    What its tasks share depends on those it was built with, and they may have gone.
    """
    assert pair.pack is not None
    if changed := [name for name, why in verify(pair.folder).files.items() if why is not None]:
        return f"{_SOUND}; {', '.join(changed)} was changed after the build"
    fresh = {entry.task.name: entry.record for entry in read_pack(again).tasks.values()}
    other = [
        entry.file
        for entry in _of_the_checkpoint(pair).values()
        if fresh.get(entry.task.name) != entry.record
    ]
    if other:
        return f"{_SOUND}; {', '.join(other)} is another than such a build writes"
    return f"{_SOUND}, and the tasks' files are those of such a build"


def _what_differs(folder: Path, manifest: Manifest, fresh: Manifest) -> str:
    """Say which files of a bundle are not what a sound build writes."""
    changed = [name for name, why in verify(folder).files.items() if why is not None]
    if changed:
        return f"{_SOUND}; {', '.join(changed)} was changed after the build"
    other = [name for name, found in manifest.files.items() if fresh.files.get(name) != found]
    if [name for name in other if name != "parity.json"]:
        tools = [
            f"{name} {version} (here {fresh.tools.get(name)})"
            for name, version in manifest.tools.items()
            if fresh.tools.get(name) != version
        ]
        made = f", which {', '.join(tools)} made" if tools else ""
        return f"{_SOUND}; {', '.join(other)} is another than such a build writes{made}"
    return f"{_SOUND}, and its files are those of such a build; manifest.json was changed after it"
