"""What is traced: a module, its inputs and outputs with their names and symbolic sizes."""

from __future__ import annotations

import dataclasses

import torch

__all__ = ["GraphSpec", "Port", "example"]

# Example sizes: distinct, and never 0 or 1, which torch.export would take as fixed.
_SIZES = {
    "batch": 2,
    "sequence": 3,
    "past_sequence": 5,
    "encoder_sequence": 7,
    "mask_sequence": 4,
    "total_sequence": 8,
}


@dataclasses.dataclass(frozen=True)
class Port:
    """A graph input or output; a size given by name is symbolic."""

    name: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype = torch.float32


@dataclasses.dataclass(frozen=True)
class GraphSpec:
    """A module whose positional arguments and results are the ports, in order."""

    module: torch.nn.Module
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


def ids(name: str, sequence: str = "sequence") -> Port:
    """Return an integer input [batch, sequence]."""
    return Port(name, ("batch", sequence), torch.int64)


def example(port: Port) -> torch.Tensor:
    """Return a tensor of the port's type whose symbolic sizes are the example ones."""
    shape = [size if isinstance(size, int) else _SIZES[size] for size in port.shape]
    return torch.ones(shape, dtype=port.dtype)
