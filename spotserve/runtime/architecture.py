"""Which models are served, judged by `config.json` alone: no torch, so that a start refuses the others at once."""

from __future__ import annotations

import json
from pathlib import Path

from spotserve.errors import ModelError
from spotserve.runtime.family import FAMILIES

ARCHITECTURES = tuple(FAMILIES)
"""Architectures whose tokens are tested equal to transformers' own, for every cut."""


def read_architecture(folder: Path) -> str:
    """The architecture that `config.json` names.

    Raises:
        ModelError: It is not one of ours, or is quantised.
    """
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} is {type(content).__name__}, not an object")
    if content.get("quantization_config") is not None:
        raise ModelError(f"{path} has a quantization_config", hint="give a float32, bfloat16 or float16 checkpoint")
    names = content.get("architectures")
    known = ", ".join(ARCHITECTURES)
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise ModelError(f"{path} names no single architecture", hint=f"known architectures: {known}")
    if names[0] not in ARCHITECTURES:
        raise ModelError(f"architecture {names[0]} is not supported", hint=f"known architectures: {known}")
    return names[0]
