"""What an adapter's configuration says, by PEFT's own rules, against what its file holds."""

from __future__ import annotations

import json
import re
from pathlib import Path

from torch import nn

from eptc.errors import ParityError
from eptc.nn.lora import LoraModel

__all__ = ["check_files"]


def check_files(folder: Path, adapter: LoraModel) -> None:
    """Check that PEFT would adapt the linears the file has factors of, with the same factor.

    Args:
        folder: the adapter's.
        adapter: it, loaded.

    Raises:
        ParityError: it would adapt others, or scale them otherwise, or leave a parameter.
    """
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    replaced = config["modules_to_save"] or []
    linears = {
        name.removesuffix(".base")
        for name, module in adapter.hf.named_modules()
        if isinstance(module, nn.Linear)
    }
    taken = {
        name
        for name in linears
        if any(name == t or name.endswith(f".{t}") for t in config["target_modules"])
        and not any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in replaced)
    }
    if odd := sorted(taken ^ set(adapter.layers)):
        raise _wrong(f"target_modules and the tensors do not agree about {odd[0]}")
    for path, layer in adapter.layers.items():
        if len(layer.A) != config["r"] or layer.scaling != 1.0:
            raise _wrong(f"{path} has rank {len(layer.A)} and the factor {layer.scaling:g}")


def _wrong(found: str) -> ParityError:
    return ParityError(
        f"the adapter's configuration is off: {found}", fix="this is a bug in eptc: report it"
    )
