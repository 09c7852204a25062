"""Checkpoints that float32 cannot hold once they are folded: bad input, said of the linear."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import eptc
from eptc.errors import CheckpointError


def large_alpha(ckpt: Path) -> None:
    """Finite in the file, and beyond float32."""
    path = ckpt / "ept_config.json"
    config = json.loads(path.read_text())
    config["scale"]["alpha"] = 1e300
    path.write_text(json.dumps(config))


def large_values(ckpt: Path) -> None:
    """Each within float32, their products not."""
    path = ckpt / "ept_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    for name in tensors:
        if name.endswith((".ept.A", ".ept.B")) or ".ept.kernels." in name:
            tensors[name] = tensors[name] * np.float32(1e30)
    safetensors.numpy.save_file(tensors, path)


@pytest.mark.parametrize("verify", [True, False], ids=["verified", "not verified"])
@pytest.mark.parametrize("fault", [large_alpha, large_values])
@pytest.mark.parametrize(
    "options",
    [{}, {"target": "lora"}, {"layout": "pack"}, {"task": "tone,score"}],
    ids=["folded", "lora", "pack", "several tasks"],
)
def test_an_overflow_is_bad_input(
    copy_native: Any, fault: Callable[[Path], None], options: dict[str, Any], verify: bool
) -> None:
    """Nobody is told of a bug in eptc: neither by the gate nor by what writes the weights."""
    fault(copy_native.ckpt)
    given = {"task": "tone", **options}
    with pytest.raises(CheckpointError, match=r"experts of bert\.encoder.*overflows") as refused:
        eptc.export(
            copy_native.ckpt, base=copy_native.base, out=copy_native.out, verify=verify, **given
        )
    assert refused.value.exit_code == 2
    assert "kernels or alpha" in str(refused.value)
    assert [path.name for path in copy_native.root.iterdir()] == ["in"]


@pytest.mark.parametrize("verify", [True, False], ids=["verified", "not verified"])
def test_beside_a_routed_linear(small_routed: Any, tmp_path: Path, verify: bool) -> None:
    ckpt = Path(shutil.copytree(small_routed.ckpt, tmp_path / "ckpt"))
    large_alpha(ckpt)
    with pytest.raises(CheckpointError, match=r"experts of bert\.encoder.*overflows float32"):
        eptc.export(ckpt, base=small_routed.base, task="tone", out=tmp_path / "out", verify=verify)
    assert not (tmp_path / "out").exists()
