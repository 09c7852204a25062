"""Parity as one HTML page that needs no network, no script and no installed fonts."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from eptc.checks_of import checks_of
from eptc.errors import MissingExtraError, OutputError
from eptc.page.content import Content, collect
from eptc.page.render import render

__all__ = ["Content", "report"]


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
        out: the HTML file; replaced where it exists.
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
        OutputError: the page cannot be written.
    """
    if importlib.util.find_spec("jinja2") is None:
        raise MissingExtraError(
            "the package 'jinja2' is not installed, with which a report is written",
            expected="the packages of reports",
            fix="pip install 'ept-compiler[report]'",
        )
    out = Path(out)
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise OutputError(
            f"the report {out} cannot be written there", expected="a file in a folder that exists"
        )
    with checks_of(bundle, reference=reference, base=base, **options) as checks:
        content = collect(
            checks,
            called=called or Path(bundle).resolve().name,
            seconds=seconds or {},
            progress=progress,
        )
    draft = out.with_name(f".{out.name}.draft")
    try:
        draft.write_text(render(content), "utf-8")
        draft.replace(out)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise OutputError(f"the report {out} cannot be written: {error.strerror}") from error
    return content
