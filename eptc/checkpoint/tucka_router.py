"""TuckA's router: which linear has it, and whether its centroids can have been trained."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from eptc.checkpoint.base import BaseModel
from eptc.checkpoint.contents import ReadOptions, Source
from eptc.checkpoint.tucka_factors import TuckaSettings, norm_fits
from eptc.errors import CheckpointError
from eptc.ir import CentroidRouter, Unit
from eptc.tensors import LazyTensor

__all__ = ["read_router"]


def read_router(
    source: Source,
    tensors: Mapping[str, LazyTensor],
    modules: Mapping[str, Mapping[str, str]],
    settings: TuckaSettings,
    base: BaseModel,
    options: ReadOptions,
) -> CentroidRouter:
    """Take the centroids; return the router that has them.

    Args:
        source: the adapter's tensors, to be taken from.
        tensors: the same, with whatever numbers they hold.
        modules: the names of each adapted linear's tensors, by part.
        settings: what the configuration says.
        base: the base model.
        options: what is to share a route.

    Raises:
        CheckpointError: there is no router, or several, or it holds no trained centroids.
    """
    sites = sorted(name for name, parts in modules.items() if "ec" in parts)
    if len(sites) != 1:
        raise CheckpointError(
            f"{source.path} has {len(sites)} routers (tucka_ec)"
            + (f": {', '.join(sites[:3])}" if sites else ""),
            expected="one, which routes for every adapted linear",
            fix="train with a router_name that names a linear that is adapted"
            if not sites
            else "use the file the training run saved",
        )
    name = modules[sites[0]]["ec"]
    stored = np.asarray(tensors[name].numpy()).astype(np.float64)
    _check(source, name, np.split(stored, settings.k))
    each: Unit = "row" if options.routing == "per-sample" else "batch"
    columns = base.linears[sites[0]][1]
    centroids = source.take(name, settings.shapes(columns)["ec"])
    return CentroidRouter(centroids, settings.k, each, sites[0])


def _check(
    source: Source, name: str, groups: list[np.ndarray[tuple[int, ...], np.dtype[np.float64]]]
) -> None:
    """Refuse centroids that no training can have left.

    A file that was saved before the first forward pass holds uninitialised memory: zeros, NaN,
    or numbers so small or so large that what they are divided by is no number in float32.

    Raises:
        CheckpointError: such centroids, or one and the same for every expert.
    """
    every = np.concatenate(groups)
    if not np.isfinite(every).all() or not all(norm_fits(group) for group in groups):
        sizes = np.abs(every)
        raise CheckpointError(
            f"{name} in {source.path} holds no centroids, but numbers of the size "
            f"{sizes.min():.3g} to {sizes.max():.3g}: was the file saved before the first "
            "forward pass, which draws them?",
            expected="finite numbers, the squares of each group's with a sum that is not 0 and "
            "not infinite in float32",
            fix="use a checkpoint that was saved while or after training",
        )
    if len(every) > 1 and (every == every[0]).all():
        raise CheckpointError(
            f"{name} in {source.path} holds the same centroid for all {len(every)} experts: was "
            "the file saved before the first forward pass, which draws them?",
            expected="a centroid for each expert: with equal ones no input chooses between them",
            fix="use a checkpoint that was saved while or after training",
        )
