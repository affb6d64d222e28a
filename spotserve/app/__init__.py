"""The composition root: the one package that wires the controller to real ports and runs a daemon."""

from spotserve.app.daemon import serve
from spotserve.app.deployment import BUILTIN_MODEL

__all__ = ["BUILTIN_MODEL", "serve"]
