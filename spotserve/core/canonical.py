"""Canonical JSON and digests: the same value gives the same bytes, whatever the hash seed or the machine."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import BaseModel


def canonical_json(value: BaseModel | Any) -> str:
    """JSON with sorted keys, no insignificant space between tokens, and a newline at the end.

    `value` is a pydantic model or plain JSON data (hence `Any`).
    """
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False) + "\n"


def digest(value: BaseModel | Any) -> str:
    """`sha256:<hex>` of the canonical JSON of `value`."""
    return "sha256:" + hashlib.sha256(canonical_json(value).encode()).hexdigest()
