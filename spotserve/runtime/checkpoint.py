"""Reads ranges of tensors from a model folder: only the bytes asked for, converted to the serving dtype."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from spotserve.core.slices import Slice, parameter_of
from spotserve.core.spec import ModelSpec
from spotserve.runtime.checkpoint_header import ELEMENT_BYTES, CheckpointLayout, TensorHeader, validate_checkpoint

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

_STORED_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Checkpoint:
    """The tensors of one model folder, mapped and validated. Thread-safe."""

    def __init__(self, folder: Path, model: ModelSpec, *, layout: CheckpointLayout | None = None) -> None:
        self._layout = layout if layout is not None else validate_checkpoint(folder)
        self._model = model
        self._dtype = TORCH_DTYPES[model.dtype]
        self._maps: dict[Path, mmap.mmap] = {}
        self._lock = threading.Lock()
        self._bytes_read = 0

    @property
    def digest(self) -> str:
        """The digest of config, headers and sizes; equal to the ModelSpec's if this is the folder it describes."""
        return self._layout.digest

    @property
    def bytes_read(self) -> int:
        """Bytes of storage that `read_slice` has touched."""
        return self._bytes_read

    def read(self, piece: Slice) -> Tensor:
        """The range `piece` of a concrete parameter of the table, from the tensor it has on disk."""
        return self.read_slice(self._source(piece.parameter), piece.dim, piece.start, piece.stop)

    def read_slice(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """[start, stop) of dimension `dim` of the stored tensor `name`, contiguous, in the serving dtype."""
        header = self._layout.tensor(name)
        assert 0 <= start < stop <= header.shape[dim], f"{name}: [{start}, {stop}) of {header.shape} along {dim}"
        stored = self._mapped(header).narrow(dim, start, stop - start)
        with self._lock:
            self._bytes_read += stored.numel() * stored.element_size()
        result = torch.empty(stored.shape, dtype=self._dtype)
        return result.copy_(stored)

    def _source(self, name: str) -> str:
        parameter = parameter_of(self._model, name)
        if parameter.source is None:
            return name
        layer = next((part for part in name.split(".") if part.isdigit()), "")
        return parameter.source.replace("{layer}", layer)

    def _mapped(self, header: TensorHeader) -> Tensor:
        """The stored tensor, over the file's pages: nothing is read until it is copied."""
        with self._lock:
            if header.file not in self._maps:
                with header.file.open("rb") as file:
                    # A private mapping is writable, which torch wants, and never writes back.
                    self._maps[header.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            pages = self._maps[header.file]
        size = header.stop - header.start
        raw = torch.frombuffer(pages, dtype=torch.uint8, offset=header.start, count=size)
        if header.start % ELEMENT_BYTES[header.dtype]:
            raw = raw.clone()
        return raw.view(_STORED_DTYPES[header.dtype]).view(header.shape)
