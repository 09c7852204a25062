"""Bundles to write pages about: a good one, damaged ones, one whose names are hostile."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import eptc


@pytest.fixture(scope="session")
def tone(small_native: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the small native checkpoint."""
    out = tmp_path_factory.mktemp("page") / "tone"
    eptc.export(small_native.ckpt, base=small_native.base, task="tone", out=out)
    return out


@pytest.fixture(scope="session")
def damaged(tone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, one bit of one weight another."""
    out = Path(shutil.copytree(tone, tmp_path_factory.mktemp("damaged") / "tone"))
    data = bytearray((out / "weights.bin").read_bytes())
    data[len(data) // 2 // 4 * 4 + 2] ^= 0x40
    (out / "weights.bin").write_bytes(bytes(data))
    return out


@pytest.fixture(scope="session")
def several(small_native: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of every task of the same checkpoint."""
    out = tmp_path_factory.mktemp("several") / "all"
    eptc.export(small_native.ckpt, base=small_native.base, task="all", out=out)
    return out


@pytest.fixture(scope="session")
def pack(small_native: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack of two tasks of the same checkpoint, for reading."""
    out = tmp_path_factory.mktemp("packed") / "pack"
    eptc.export(
        small_native.ckpt, base=small_native.base, task="tone,score", layout="pack", out=out
    )
    return out


@pytest.fixture(scope="session")
def page(small_native: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Return a function that writes a page about a bundle; gives its path and its content."""

    def write(bundle: Path, **options: Any) -> tuple[Path, Any]:
        out = tmp_path_factory.mktemp("written") / "report.html"
        given = {"reference": small_native.ckpt, "base": small_native.base, **options}
        return out, eptc.report(bundle, out=out, **given)

    return write


@pytest.fixture(scope="session")
def good_page(page: Callable[..., Any], tone: Path) -> tuple[Path, Any]:
    """A page about the good bundle, and its content."""
    found: tuple[Path, Any] = page(tone, seconds={"fold-pyramid": 0.25})
    return found


@pytest.fixture(scope="session")
def bad_page(page: Callable[..., Any], damaged: Path) -> tuple[Path, Any]:
    """A page about the damaged bundle, and its content."""
    found: tuple[Path, Any] = page(damaged)
    return found


@pytest.fixture(scope="session")
def pack_page(page: Callable[..., Any], pack: Path) -> tuple[Path, Any]:
    """A page about the pack, and its content."""
    found: tuple[Path, Any] = page(pack)
    return found
