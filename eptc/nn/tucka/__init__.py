"""TuckA in PyTorch: the reference for checkpoints of the authors' code, read on its own."""

from eptc.nn.tucka.linear import Routing, TuckaLinear
from eptc.nn.tucka.model import TuckaModel
from eptc.nn.tucka.stored import CONFIG, StoredTucka, read

__all__ = ["CONFIG", "Routing", "StoredTucka", "TuckaLinear", "TuckaModel", "read"]
