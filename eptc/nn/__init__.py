"""EPT in PyTorch: the reference that engines are compared with, and modules to train.

It shares no code with the compiler's readers, IR and passes: it reads checkpoints and computes
routes by itself, so that a mistake in either shows as a difference.
"""

from eptc.nn.base import base_sha256, load_base
from eptc.nn.config import EptConfig
from eptc.nn.linear import EptLinear
from eptc.nn.model import EptModel
from eptc.nn.reference import load_reference
from eptc.nn.routing import Gates, Route, Router, TaskRouter, TokenRouter
from eptc.nn.rules import BaseInfo, GateConfig, ModuleConfig, ScaleConfig

__all__ = [
    "BaseInfo",
    "EptConfig",
    "EptLinear",
    "EptModel",
    "GateConfig",
    "Gates",
    "ModuleConfig",
    "Route",
    "Router",
    "ScaleConfig",
    "TaskRouter",
    "TokenRouter",
    "base_sha256",
    "load_base",
    "load_reference",
]
