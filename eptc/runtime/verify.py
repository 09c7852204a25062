"""Checking a bundle as it lies on disk, without a reference: hashes, graphs, tokenizer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from eptc.errors import BundleError, OptionError
from eptc.files import sha256
from eptc.runtime.graph import signature
from eptc.runtime.manifest import SEALED_FROM, Manifest, bundle_file, read_manifest
from eptc.runtime.pack_manifest import PackManifest
from eptc.runtime.providers import CPU
from eptc.runtime.session import open_session
from eptc.runtime.spec import MANIFEST, PACK, FileRecord
from eptc.runtime.tokenizer import TextTokenizer

__all__ = ["VerifyReport", "file_problem", "tokenizer_problems", "verify"]


@dataclasses.dataclass(frozen=True)
class VerifyReport:
    """What `verify` found.

    Args:
        manifest: the bundle's, or the pack's.
        files: each listed file, and what is wrong with it or None.
        graphs: each graph, and why it does not load or None.
        problems: everything that is wrong, one sentence each; empty for a sound bundle.
        warnings: what is odd but harms nothing: unlisted files, no parity check.
    """

    manifest: Manifest | PackManifest
    files: dict[str, str | None]
    graphs: dict[str, str | None]
    problems: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def raise_for_problems(self) -> None:
        """Raise BundleError with the first problem and how many there are."""
        if self.problems:
            more = f" (and {len(self.problems) - 1} more)" if len(self.problems) > 1 else ""
            raise BundleError(
                self.problems[0] + more, fix="copy the bundle again, or build it again"
            )

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "ok": self.ok,
            "files": dict(self.files),
            "graphs": dict(self.graphs),
            "problems": list(self.problems),
            "warnings": list(self.warnings),
        }


def verify(directory: str | Path) -> VerifyReport:
    """Check every file's size and SHA-256, and that graphs and tokenizer load; of a pack, tasks.

    Files are read in pieces. Graphs are loaded on the CPU, unoptimised, and only where every
    listed file is as it was written. A file the manifest does not list is a warning: nothing
    reads it.

    Raises:
        BundleError: there is no manifest to check against, or it is damaged or newer.
    """
    folder = Path(directory)
    if (folder / PACK).exists():
        from eptc.runtime.verify_pack import verify_pack  # it asks for what is here

        return verify_pack(folder)
    manifest = read_manifest(folder)
    files = {name: file_problem(folder, name, record) for name, record in manifest.files.items()}
    problems = [f"{name}: {reason}" for name, reason in files.items() if reason is not None]
    graphs: dict[str, str | None] = {}
    for name in manifest.graphs:
        graphs[name] = _graph(folder, manifest, name) if not problems else "not loaded"
    if not problems:
        problems += [f"graph {name!r}: {why}" for name, why in graphs.items() if why is not None]
        problems += tokenizer_problems(folder, manifest)
    return VerifyReport(manifest, files, graphs, tuple(problems), _warnings(folder, manifest))


def file_problem(folder: Path, name: str, record: FileRecord) -> str | None:
    """Return what is wrong with a listed file, read in pieces; None for a sound one."""
    try:
        path = bundle_file(folder, name)
        size = path.stat().st_size
        if size != record.size:
            return f"has {size} bytes instead of {record.size}"
        digest = sha256(path)
    except BundleError as error:
        return error.found
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if digest != record.sha256:
        return f"has SHA-256 {digest} instead of {record.sha256}"
    return None


def _graph(folder: Path, manifest: Manifest, name: str) -> str | None:
    spec = manifest.graphs[name]
    try:
        path = bundle_file(folder, spec.file)
        session = open_session(path, [(CPU, {})], threads=1, optimize=False)
    except (BundleError, OptionError) as error:
        return error.found
    return signature(session, spec)


def tokenizer_problems(folder: Path, manifest: Manifest) -> list[str]:
    """Return why a bundle's tokenizer does not load; nothing where it does, or there is none."""
    if manifest.tokenizer is None:
        return []
    try:
        TextTokenizer(bundle_file(folder, manifest.tokenizer.file), manifest.tokenizer)
    except BundleError as error:
        return [error.found]
    return []


def _warnings(folder: Path, manifest: Manifest) -> tuple[str, ...]:
    known = {MANIFEST, *manifest.files}
    extra = sorted(path.name for path in folder.iterdir() if path.name not in known)
    found = [f"{name} is not listed in the manifest" for name in extra]
    if manifest.schema_version < SEALED_FROM:
        found.append(f"{MANIFEST} is of an earlier version: a change of it would not be seen")
    if manifest.parity.get("verified") is not True:
        found.append("the engine was not compared with its reference when it was built")
    return tuple(found)
