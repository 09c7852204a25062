"""How parameters start when an adapter is trained from scratch."""

from __future__ import annotations

import math

import torch
from torch import nn

from eptc.nn.experts import Factors
from eptc.nn.linear import EptLinear

__all__ = ["initialise", "initialise_factors"]


def initialise_factors(factors: Factors, variant: str, generator: torch.Generator) -> None:
    """Draw A and B.

    Released: Kaiming-uniform with a = sqrt(5), B too (specs, init). Paper: Gaussian, with the
    variances 1 / columns and 1 / rank, so that for an x of unit variance B A x has it too.
    """
    if variant == "released":
        nn.init.kaiming_uniform_(factors.A, a=math.sqrt(5), generator=generator)
        nn.init.kaiming_uniform_(factors.B, a=math.sqrt(5), generator=generator)
    else:
        rank, columns = factors.A.shape
        nn.init.normal_(factors.A, std=columns**-0.5, generator=generator)
        nn.init.normal_(factors.B, std=rank**-0.5, generator=generator)


def initialise(layer: EptLinear, generator: torch.Generator) -> None:
    """Draw a linear's kernels, router and task embeddings.

    Released: kernels Kaiming-uniform, so the branch is not 0 at the start; embeddings
    N(0, 0.01^2). Paper: kernels zero, so training starts at the base model; embeddings
    N(0, temperature^2 / 2). With the router's Kaiming weights (variance 2 / in) the logits over
    the temperature then have unit variance: tasks differ from the start, and no gate is so
    close to 0 or 1 that its gradient vanishes. A router that reads x, whose variance is near 1
    already, gets weights N(0, temperature^2 / in) to the same end, and embeddings of x's size.
    """
    released = layer.config.variant == "released"
    for kernel in layer.experts.kernels:
        if released:
            shape = (1, *kernel.shape, 1)  # as the released code stores it: fan-in is cells * size
            nn.init.kaiming_uniform_(kernel.data.view(shape), a=math.sqrt(5), generator=generator)
        else:
            nn.init.zeros_(kernel)
    temperature = layer.config.gates.temperature
    reads_x = layer.config.gates.router_input != "task"
    if reads_x:
        std = temperature * layer.in_features**-0.5
        nn.init.normal_(layer.router.weight, std=std, generator=generator)
    else:
        nn.init.kaiming_normal_(layer.router.weight, nonlinearity="relu", generator=generator)
    if layer.router.bias is not None:
        bound = layer.in_features**-0.5
        nn.init.uniform_(layer.router.bias, -bound, bound, generator=generator)
    std = 0.01 if released else 1.0 if reads_x else temperature / math.sqrt(2)
    nn.init.normal_(layer.task_embedding, std=std, generator=generator)
