"""The safetensors files of a model folder, checked before anything is allocated. Needs no torch.

A header is believed only after its length, JSON, names, types, shapes and offsets are proven to fit the file: ranges
lie inside it, do not overlap, leave no hole, and hold exactly shape x dtype bytes. Only regular files are opened (links
to them count: the hub's cache is made of links), so that no pipe can hang a start.
"""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from spotserve.errors import ModelError

MAX_HEADER_BYTES = 100_000_000
MAX_INDEX_BYTES = 100_000_000
MAX_CONFIG_BYTES = 4_000_000
MAX_NAME_CHARS = 512
MAX_DIMENSIONS = 8
CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
TEXT_FILES = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
"""Files beside config and weights that are read where they are there."""

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
    config = read_config(folder)
    digest = sha256(config)
    tensors: dict[str, TensorHeader] = {}
    weight_map = _weight_map(folder)
    for name in sorted(set(weight_map.values())) if weight_map is not None else [SINGLE_NAME]:
        raw, headers, size = read_header(folder / name)
        digest.update(name.encode() + b"\0" + raw + struct.pack("<Q", size))
        for tensor in headers.values():
            if tensor.name in tensors:
                raise ModelError(f"{tensor.file} holds {tensor.name}, which {tensors[tensor.name].file.name} holds too")
            tensors[tensor.name] = tensor
    if weight_map is not None:
        _check_index(folder, weight_map, tensors)
    check_counts(folder / CONFIG_NAME, config, num_tensors=len(tensors))
    return CheckpointLayout(folder=folder, tensors=tensors, digest=f"sha256:{digest.hexdigest()}")


def open_regular(path: Path) -> BinaryIO:
    """A file to read from, and nothing else: what is no regular file is refused and never waited for.

    Raises:
        ModelError: it is not there, not readable, or no file.
    """
    try:
        # Without the flag, opening a pipe that nobody writes to would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise ModelError(f"{path} is missing", hint="the download is not complete, or a link leads nowhere") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ModelError(f"{path} is not a regular file")
    return os.fdopen(descriptor, "rb")


def entries_of(folder: Path) -> list[Path]:
    """What a folder holds. Raises ModelError when it cannot be listed."""
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise ModelError(f"{folder} cannot be listed: {error.strerror}", hint="check its permissions") from error


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """The bytes of a regular file of at most `max_bytes`."""
    with open_regular(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ModelError(f"{path} has more than {max_bytes} bytes, the most that is read")
    return content


def read_header(path: Path) -> tuple[bytes, dict[str, TensorHeader], int]:
    """The raw header of one safetensors file, its tensors, checked, and the size of the file."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
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
    content = _json_object(path, raw, what="header")
    _check_metadata(path, content.pop("__metadata__", {}))
    tensors = {name: _tensor_header(path, name, entry, 8 + length) for name, entry in content.items()}
    _check_cover(path, tensors, data_start=8 + length, size=size)
    return raw, tensors, size


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name to file name, as an index has it."""
    weight_map = _json_object(index, read_bounded(index, MAX_INDEX_BYTES), what="index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} has no weight_map")
    for name, file in weight_map.items():
        _check_name(index, name)
        # A name with a separator could point outside the folder.
        is_plain = isinstance(file, str) and Path(file).name == file and _is_clean(file)
        if not is_plain or not file.endswith(".safetensors"):
            raise ModelError(f"{index} maps {name} to {file!r:.80}, which is no safetensors file of this folder")
    return weight_map


def _json_object(path: Path, raw: bytes, *, what: str) -> dict[str, Any]:
    try:
        content = json.loads(raw.decode(), object_pairs_hook=_unique_object)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: {what} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: {what} is {type(content).__name__}, not an object")
    return content


def _is_clean(name: str) -> bool:
    """Whether a name can stand in a message and a log: a few printable characters (which a lone surrogate is not)."""
    return 0 < len(name) <= MAX_NAME_CHARS and name.isprintable()


def _check_name(path: Path, name: str) -> None:
    if not _is_clean(name) or "/" in name or "\\" in name:
        raise ModelError(f"{path}: {name!r:.80} is no name of a tensor")


def _check_metadata(path: Path, metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ModelError(f"{path}: __metadata__ is not an object of texts")


def _tensor_header(path: Path, name: str, entry: Any, data_start: int) -> TensorHeader:
    _check_name(path, name)
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


def read_config(folder: Path) -> bytes:
    """The bytes of `config.json`."""
    path = folder / CONFIG_NAME
    if not os.path.lexists(path):
        raise ModelError(f"{folder} has no {CONFIG_NAME}", hint="give the folder of a transformers model")
    return read_bounded(path, MAX_CONFIG_BYTES)


MAX_COUNTS: Mapping[str, int] = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 100_000),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "num_key_value_heads"), 2**16),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "head_dim", "word_embed_proj_dim"), 2**20),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "moe_intermediate_size"), 2**24),
    **dict.fromkeys(("num_local_experts", "num_experts", "num_experts_per_tok"), 2**16),
    **dict.fromkeys(("vocab_size", "max_position_embeddings", "n_positions"), 2**28),
}
"""Keys of `config.json` that say how large a model is, by whatever family, and what nothing exceeds."""
_MAY_BE_ZERO = ("num_local_experts", "num_experts", "num_experts_per_tok", "moe_intermediate_size")
"""Of a model without experts whose family has them."""
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def check_counts(path: Path, raw: bytes, *, num_tensors: int) -> None:
    """Refuse sizes that would only waste memory and minutes before they are found not to fit the files.

    A value may be absent or null, which means the family's default; a layer without a tensor there is not.
    """
    try:
        content = json.loads(raw)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} is {type(content).__name__}, not an object")
    inner = content.get("text_config")
    for values in (content, inner if isinstance(inner, dict) else {}):
        for key, most in MAX_COUNTS.items():
            value = values.get(key)
            if value is None:
                continue
            least = 0 if key in _MAY_BE_ZERO else 1
            if type(value) is not int or not least <= value <= most:
                raise ModelError(f"{path}: {key} {value!r:.40} is not a whole number from {least} to {most}")
            if key in _LAYER_COUNTS and value > num_tensors:
                raise ModelError(f"{path}: {key} {value} exceeds the {num_tensors} tensors that the files hold")


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Tensor name to file name from the index; None for a folder with one file."""
    if os.path.lexists(folder / INDEX_NAME):
        return read_weight_map(folder / INDEX_NAME)
    if os.path.lexists(folder / SINGLE_NAME):
        return None
    pickled = sorted(path.name for path in entries_of(folder) if path.name.endswith(PICKLED_SUFFIXES))
    if pickled:
        raise ModelError(f"{folder} has only pickled weights ({pickled[0]})", hint="convert them to safetensors first")
    raise ModelError(f"{folder} has no {SINGLE_NAME} and no {INDEX_NAME}")


def _check_index(folder: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorHeader]) -> None:
    for name, file in sorted(weight_map.items()):
        if name not in tensors or tensors[name].file.name != file:
            raise ModelError(
                f"{folder / INDEX_NAME} says {file} holds {name}, but it does not",
                hint="index and files are of different downloads; download all of them again",
            )
    for name in sorted(set(tensors) - set(weight_map)):
        raise ModelError(f"{tensors[name].file} holds {name}, which {INDEX_NAME} does not name")
