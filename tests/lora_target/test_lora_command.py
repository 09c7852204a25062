"""`--target lora` on the command line, and what is said of serving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from eptc.interop.lora import serving_notes
from tests.lora_target.conftest import (
    PEFT_WARNINGS,
)

pytestmark = PEFT_WARNINGS


def test_the_command_line(native: Any, cli: Any, tmp_path: Path) -> None:
    ckpt, base = native("bert")
    given = ("export", ckpt, "--base", base, "--target", "lora", "--task", "all")
    said = cli(*given, "-o", tmp_path / "out")
    assert said.code == 0, said.stderr
    for words in ("tone", "topic", "score", "rank", "flips", "largest error"):
        assert words in said.stdout
    assert "modules_to_save" in said.stderr
    found = cli(*given, "-o", tmp_path / "json", "--max-rank", "2", "--json").json
    assert (found["target"], found["tasks"]) == ("lora", ["tone", "topic", "score"])
    assert found["details"]["tone"]["rank"] == 2
    assert found["parity"]["tone"]["passed"]
    assert [record["name"] for record in found["passes"]][-1] == "truncate-rank"
    refused = cli(*given, "-o", tmp_path / "bad", "--precision", "int8", "--json")
    assert (refused.code, refused.json["exit_code"]) == (2, 2)
    assert cli(*given, "--dry-run").code == 2
    assert "not verified" in cli(*given, "-o", tmp_path / "no", "--no-verify").stdout


@pytest.mark.parametrize(
    ("rank", "heads", "words"),
    [
        (1, False, None),
        (16, False, None),
        (17, False, "--max-lora-rank 32"),
        (24, False, "--max-lora-rank 32"),
        (32, False, "--max-lora-rank 32"),
        (300, False, "--max-lora-rank 320"),
        (512, False, "--max-lora-rank 512"),
        (513, False, "cut it with --max-rank"),
        (4, True, "modules_to_save"),
    ],
)
def test_what_is_said_of_serving(rank: int, heads: bool, words: str | None) -> None:
    notes = serving_notes(rank, heads=heads)
    assert notes == () if words is None else words in notes[0]
