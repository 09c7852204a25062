"""Checking a pack as it lies on disk, without a reference: hashes, graphs, every task."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from eptc.errors import BundleError, OptionError
from eptc.runtime.graph import signature
from eptc.runtime.manifest import bundle_file
from eptc.runtime.pack_manifest import PackManifest, read_pack
from eptc.runtime.pack_tensors import factor_names, read_tensors
from eptc.runtime.providers import CPU
from eptc.runtime.session import open_session
from eptc.runtime.spec import PACK
from eptc.runtime.verify import VerifyReport, file_problem, tokenizer_problems

if TYPE_CHECKING:
    from eptc.runtime.spec import GraphSpec

__all__ = ["verify_pack"]


def verify_pack(folder: Path) -> VerifyReport:
    """Check every file's size and SHA-256, that graphs load, and what each task's file holds.

    Raises:
        BundleError: there is no manifest to check against, or it is damaged or newer.
    """
    manifest = read_pack(folder)
    records = dict(manifest.files)
    records |= {entry.file: entry.record for entry in manifest.tasks.values()}
    files = {name: file_problem(folder, name, record) for name, record in records.items()}
    problems = [f"{name}: {reason}" for name, reason in files.items() if reason is not None]
    graphs = dict.fromkeys([*manifest.graphs, *_folded_names(manifest)], "not loaded")
    found: dict[str, str | None] = dict(graphs)
    if not problems:
        any_task = next(iter(manifest.tasks))
        for folded in (False, True):
            specs = manifest.engine(any_task, folded=folded).graphs
            for role, spec in specs.items():
                name = _folded_names(manifest)[role] if folded else role
                found[name] = _graph(folder, manifest, spec, folded=folded)
        problems += [f"graph {name!r}: {why}" for name, why in found.items() if why is not None]
    if not problems:
        for name in manifest.tasks:
            problems += _task(folder, manifest, name)
    return VerifyReport(manifest, files, found, tuple(problems), _warnings(folder, manifest))


def _folded_names(manifest: PackManifest) -> dict[str, str]:
    return {role: f"{role}, folded" for role in manifest.graphs}


def _graph(folder: Path, manifest: PackManifest, spec: GraphSpec, *, folded: bool) -> str | None:
    try:
        session = open_session(
            bundle_file(folder, spec.file), [(CPU, {})], threads=1, optimize=False
        )
    except (BundleError, OptionError) as error:
        return error.found
    optional = {value.name for value in session.get_overridable_initializers()}
    wanted = set(manifest.heads)
    if not folded:
        wanted |= {name for path in manifest.linears for name in factor_names(path)}
    if odd := sorted(optional ^ wanted):
        return f"{odd[0]} is {'an' if odd[0] in optional else 'no'} optional input"
    return signature(session, spec)


def _task(folder: Path, manifest: PackManifest, name: str) -> list[str]:
    try:
        read_tensors(folder, manifest, name)
    except BundleError as error:
        return [f"task {name!r}: {error.found}"]
    return [f"task {name!r}: {why}" for why in tokenizer_problems(folder, manifest.engine(name))]


def _warnings(folder: Path, manifest: PackManifest) -> tuple[str, ...]:
    known = {PACK, *manifest.files, *(entry.file for entry in manifest.tasks.values())}
    extra = sorted(path.name for path in folder.iterdir() if path.name not in known)
    found = [f"{name} is not listed in the manifest" for name in extra]
    return tuple(found) + tuple(
        f"task {name!r} was not compared with its reference when it was added"
        for name, entry in manifest.tasks.items()
        if entry.parity.get("verified") is not True
    )
