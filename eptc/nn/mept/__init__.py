"""MEPT and SMoP in PyTorch: prompts that a router mixes, for the text or before each block."""

from eptc.nn.mept.model import MeptModel
from eptc.nn.mept.site import PromptSite

__all__ = ["MeptModel", "PromptSite"]
