"""The safetensors files of a model folder, checked before anything is allocated. Needs no torch.

A header is believed only after its length, JSON, types, shapes and offsets are proven to fit the file: ranges lie
inside it, do not overlap, leave no hole, and hold exactly shape x dtype bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any

from spotserve.errors import ModelError

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 8
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

ELEMENT_BYTES: Mapping[str, int] = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """Where one tensor lies: bytes [start, stop) of `file`, absolute."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class CheckpointLayout:
    """All tensors of a folder, and a digest of its config, headers and sizes (not of every byte)."""

    folder: Path
    tensors: Mapping[str, TensorHeader]
    digest: str

    def tensor(self, name: str) -> TensorHeader:
        """The header of `name`. Raises ModelError when the folder has no such tensor."""
        if name not in self.tensors:
            raise ModelError(f"{self.folder} has no tensor {name}")
        return self.tensors[name]


def validate_checkpoint(folder: Path) -> CheckpointLayout:
    """Read and check every header of `folder`. Raises ModelError naming the file and what is wrong with it."""
    digest = sha256(_read_config(folder))
    tensors: dict[str, TensorHeader] = {}
    weight_map = _weight_map(folder)
    for name in sorted(set(weight_map.values())) if weight_map is not None else [SINGLE_NAME]:
        path = folder / name
        if not path.is_file():
            raise ModelError(f"{path} is missing, though {INDEX_NAME} names it")
        raw, headers = read_header(path)
        digest.update(name.encode() + b"\0" + raw + struct.pack("<Q", path.stat().st_size))
        for tensor in headers.values():
            if tensor.name in tensors:
                raise ModelError(f"{path} holds {tensor.name}, which {tensors[tensor.name].file.name} holds too")
            tensors[tensor.name] = tensor
    if weight_map is not None:
        _check_index(folder, weight_map, tensors)
    return CheckpointLayout(folder=folder, tensors=tensors, digest=f"sha256:{digest.hexdigest()}")


def read_header(path: Path) -> tuple[bytes, dict[str, TensorHeader]]:
    """The raw header of one safetensors file and its tensors, checked."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise ModelError(f"{path} is truncated: {size} bytes are no safetensors file")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise ModelError(
                f"{path}: header length {length} exceeds {min(MAX_HEADER_BYTES, size - 8)} bytes",
                hint="the file is truncated or corrupt; download it again",
            )
        raw = file.read(length)
    try:
        content = json.loads(raw.decode(), object_pairs_hook=_unique_object)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: header is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: header is {type(content).__name__}, not an object")
    tensors = {
        name: _tensor_header(path, name, entry, 8 + length) for name, entry in content.items() if name != "__metadata__"
    }
    _check_cover(path, tensors, data_start=8 + length, size=size)
    return raw, tensors


def _tensor_header(path: Path, name: str, entry: Any, data_start: int) -> TensorHeader:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ModelError(f"{path}: header of {name} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ELEMENT_BYTES:
        raise ModelError(f"{path}: {name} has unknown dtype {dtype!r}, known: {', '.join(ELEMENT_BYTES)}")
    if not _is_counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise ModelError(f"{path}: {name} has an invalid shape {shape!r:.80}")
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ModelError(f"{path}: {name} has invalid data_offsets {offsets!r:.80}")
    expected = prod(shape) * ELEMENT_BYTES[dtype]
    if offsets[1] - offsets[0] != expected:
        raise ModelError(f"{path}: {name} spans {offsets[1] - offsets[0]} bytes, its shape needs {expected}")
    return TensorHeader(
        name=name,
        file=path,
        dtype=dtype,
        shape=tuple(shape),
        start=data_start + offsets[0],
        stop=data_start + offsets[1],
    )


def _is_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_cover(path: Path, tensors: Mapping[str, TensorHeader], *, data_start: int, size: int) -> None:
    position = data_start
    for tensor in sorted(tensors.values(), key=lambda each: (each.start, each.stop)):
        if tensor.start != position:
            raise ModelError(f"{path}: {tensor.name} starts at byte {tensor.start}, expected {position}")
        position = tensor.stop
    if position != size:
        raise ModelError(
            f"{path} has {size} bytes, its header describes {position}",
            hint="the file is truncated or corrupt; download it again",
        )


def _unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("duplicate key")
    return result


def _read_config(folder: Path) -> bytes:
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder} has no config.json", hint="give the folder of a transformers model")
    return path.read_bytes()


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Tensor name to file name from the index; None for a folder with one file."""
    index = folder / INDEX_NAME
    if not index.is_file():
        if (folder / SINGLE_NAME).is_file():
            return None
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        if pickled:
            raise ModelError(
                f"{folder} has only pickled weights ({pickled[0]})", hint="convert them to safetensors first"
            )
        raise ModelError(f"{folder} has no {SINGLE_NAME} and no {INDEX_NAME}")
    try:
        content = json.loads(index.read_text(), object_pairs_hook=_unique_object)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ModelError(f"{index} is not valid JSON: {error}") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} has no weight_map")
    for name, file in weight_map.items():
        # A name with a separator could point outside the folder.
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ModelError(f"{index} maps {name} to {file!r:.80}, which is no safetensors file of this folder")
    return weight_map


def _check_index(folder: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorHeader]) -> None:
    for name, file in sorted(weight_map.items()):
        if name not in tensors or tensors[name].file.name != file:
            raise ModelError(f"{folder / INDEX_NAME} says {file} holds {name}, but it does not")
    for name in sorted(set(tensors) - set(weight_map)):
        raise ModelError(f"{tensors[name].file} holds {name}, which {INDEX_NAME} does not name")
