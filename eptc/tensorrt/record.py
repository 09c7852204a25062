"""What a built engine depends on, and whether it can be used here."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Self

from eptc.errors import BundleError
from eptc.files import sha256
from eptc.runtime.json_fields import Fields
from eptc.runtime.manifest import bundle_file, parsed
from eptc.runtime.spec import file_name
from eptc.tensorrt.build_engine import RECORD

__all__ = ["Built", "EngineFile", "Here", "read_record"]

_SCHEMA = 1
_AGAIN = "run build_engine.py of the bundle here: engines are built where they run"


@dataclasses.dataclass(frozen=True)
class Here:
    """What there is to run engines.

    Args:
        tensorrt: version of the package.
        gpu: name of the GPU.
        compute_capability: the GPU's, such as `9.0`.
        driver: version of the NVIDIA driver.
    """

    tensorrt: str
    gpu: str
    compute_capability: str
    driver: str


@dataclasses.dataclass(frozen=True)
class EngineFile:
    """A built engine: its file and the file's SHA-256, and that of the graph it was built of."""

    file: str
    sha256: str
    graph_sha256: str


@dataclasses.dataclass(frozen=True)
class Built:
    """Engines, and what they were built by and for.

    Args:
        by: what there was where they were built.
        engines: by the graph's role.
    """

    by: Here
    engines: dict[str, EngineFile]

    @classmethod
    def from_json(cls, data: object) -> Self:
        """Read JSON values; raises BundleError."""
        fields = Fields(data, RECORD)
        fields.schema_version(_SCHEMA, RECORD)
        by = Here(*(fields.text(field.name) for field in dataclasses.fields(Here)))
        engines = {}
        for role, item in fields.mapping("engines").items():
            each = Fields(item, f"{RECORD}, engine {role!r}")
            engines[role] = EngineFile(
                file_name(each.text("file"), RECORD),
                each.text("sha256"),
                each.text("graph_sha256"),
            )
            each.finish()
        fields.finish()
        return cls(by, engines)

    def check(self, here: Here) -> None:
        """Check that engines run here.

        By default TensorRT's engines are for the version, the platform and the GPU that they were
        built with. An older driver may lack what their kernels need.

        Raises:
            BundleError: another version of TensorRT, another GPU, or an older driver.
        """
        by = self.by
        if by.tensorrt != here.tensorrt:
            raise BundleError(
                f"the engines were built by TensorRT {by.tensorrt}, and here is {here.tensorrt}",
                expected=f"tensorrt {by.tensorrt}",
                fix=f"pip install tensorrt=={by.tensorrt}, or {_AGAIN}",
            )
        for what, built, found in (
            ("compute capability", by.compute_capability, here.compute_capability),
            ("GPU", by.gpu, here.gpu),
        ):
            if built != found:
                raise BundleError(
                    f"the engines were built for {by.gpu} (compute capability "
                    f"{by.compute_capability}), and here is {here.gpu} "
                    f"({here.compute_capability})",
                    expected=f"the {what} {built}",
                    fix=_AGAIN,
                )
        if _numbers(here.driver) < _numbers(by.driver):
            raise BundleError(
                f"the engines were built under the NVIDIA driver {by.driver}, and here is "
                f"{here.driver}",
                expected=f"the driver {by.driver} or newer",
                fix=f"update the driver, or {_AGAIN}",
            )

    def check_files(self, folder: Path, graphs: dict[str, str]) -> dict[str, Path]:
        """Return the engines' files.

        Args:
            folder: the bundle's.
            graphs: SHA-256 of each graph's file, by role.

        Raises:
            BundleError: a graph without an engine, an engine of another graph, a damaged file.
        """
        found = {}
        for role, digest in graphs.items():
            engine = self.engines.get(role)
            if engine is None:
                raise BundleError(f"there is no engine of graph {role!r}", fix=_AGAIN)
            if engine.graph_sha256 != digest:
                raise BundleError(
                    f"{engine.file} was built of another graph {role!r} than the bundle has",
                    expected=f"a graph with SHA-256 {engine.graph_sha256}",
                    fix=_AGAIN,
                )
            path = bundle_file(folder, engine.file)
            if (actual := sha256(path)) != engine.sha256:
                raise BundleError(
                    f"{engine.file} has SHA-256 {actual}", expected=engine.sha256, fix=_AGAIN
                )
            found[role] = path
        return found


def read_record(folder: Path) -> Built:
    """Read what a bundle's engines were built by and for.

    Raises:
        BundleError: nothing is written of them, or what is cannot be read.
    """
    path = folder / RECORD
    if not path.is_file():
        raise BundleError(
            f"{folder} has no {RECORD}, which says what its engines were built by and for",
            fix=f"{_AGAIN}; with --record it writes that alone, of engines that trtexec built",
        )
    return parsed(path, Built.from_json, _AGAIN)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version))
