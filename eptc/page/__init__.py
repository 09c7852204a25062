"""Parity as one HTML page that needs no network, no script and no installed fonts."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from eptc.checks_of import checks_of
from eptc.errors import MissingExtraError, OutputError
from eptc.files import replacing
from eptc.page.content import Content, collect
from eptc.page.render import render

__all__ = ["Content", "check_out", "report"]


def report(
    bundle: str | Path,
    *,
    out: str | Path,
    reference: str | Path,
    base: str | Path | None = None,
    seconds: Mapping[str, float] | None = None,
    called: str | None = None,
    progress: Callable[[Any], None] = lambda _: None,
    **options: Any,
) -> Content:
    """Compare a bundle with the unfolded PyTorch model, and write what was found as a page.

    Unlike `eptc.parity`, which ends at the first failure, all checks are made, and the files'
    hashes are among them. A page is written whether they pass or not.

    Args:
        bundle: the bundle's folder, or a pack's.
        out: the HTML file; another page is replaced.
        reference: the checkpoint it was made from.
        base: the base model's folder.
        seconds: wall time of passes by name, as far as it is known; a bundle records none.
        called: what the page calls the bundle; None: its folder's name.
        progress: called with what is being done.
        options: the others of `eptc.parity`; without `task`, every task of a pack that was made
            from the checkpoint is compared.

    Returns:
        What the page says; `Content.raise_for_failure` turns a failure into an error.

    Raises:
        MissingExtraError: jinja2 is not installed.
        OutputError: the page cannot be written, or something else than a page is there.
    """
    if importlib.util.find_spec("jinja2") is None:
        raise MissingExtraError(
            "the package 'jinja2' is not installed, with which a report is written",
            expected="the packages of reports",
            fix="pip install 'ept-compiler[report]'",
        )
    out = Path(out)
    check_out(out, Path(bundle))
    with checks_of(bundle, reference=reference, base=base, **options) as checks:
        content = collect(
            checks,
            called=called or Path(bundle).resolve().name,
            seconds=seconds or {},
            progress=progress,
        )
    # What cannot be read as UTF-8, such as the name of a file, is shown as what it is.
    page = render(content).encode(errors="backslashreplace")
    try:
        with replacing(out) as file:
            file.write(page)
    except OSError as error:
        raise OutputError(f"the report {out} cannot be written: {error.strerror}") from error
    return content


def check_out(out: Path, bundle: Path) -> None:
    """Refuse a place for a page before anything is compared; nothing of a user's is lost.

    Args:
        out: the place.
        bundle: the bundle's folder, or what will be.

    Raises:
        OutputError: it is a folder or a device, there is no folder around it, it is in the
            bundle, or a file is there that is no page.
    """
    try:
        folder = out.absolute().parent.resolve()
        if not folder.is_dir() or (out.exists() and not out.is_file()):
            raise OutputError(
                f"the report {out} cannot be written there",
                expected="a file in a folder that exists",
            )
        if bundle.resolve() in (folder / out.name, folder, *folder.parents):
            raise OutputError(
                f"the report {out} would be in the bundle, whose every file is listed",
                fix="name a file beside it",
            )
        if out.is_file() and not _may_be_page(out):
            raise OutputError(
                f"the report {out} would replace a file that is no page", fix="name another file"
            )
    except (OSError, RuntimeError) as error:  # the latter: a link that leads to itself
        raise OutputError(f"the report {out} cannot be written: {error}") from error


def _may_be_page(path: Path) -> bool:
    """Whether a file begins as a page does, or is empty."""
    with path.open("rb") as file:
        return file.read(64).lstrip()[:9].lower() in (b"", b"<!doctype")
