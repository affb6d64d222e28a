"""Reads ranges of tensors from a model folder: only the bytes asked for, converted to the serving dtype."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from spotserve.core.slices import Slice, intersect, parameter_of
from spotserve.core.spec import ModelSpec, Parameter
from spotserve.core.wire import ModelFile
from spotserve.runtime.checkpoint_header import (
    ELEMENT_BYTES,
    CheckpointLayout,
    TensorHeader,
    open_regular,
    validate_checkpoint,
)
from spotserve.runtime.model_manifest import verify_open_file

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

    def __init__(
        self,
        folder: Path,
        model: ModelSpec,
        *,
        layout: CheckpointLayout | None = None,
        files: Sequence[ModelFile] = (),
    ) -> None:
        self._layout = layout if layout is not None else validate_checkpoint(folder)
        self._files = {file.name: file for file in files}
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
        parameter = parameter_of(self._model, piece.parameter)
        layer = next((int(part) for part in piece.parameter.split(".") if part.isdigit()), 0)
        if isinstance(parameter.source, tuple):
            return self._read_stacked(parameter, layer, piece)
        [(name, _)] = parameter.stored(layer)
        if parameter.transposed:
            return self.read_slice(name, 1 - piece.dim, piece.start, piece.stop).t().contiguous()
        return self.read_slice(name, piece.dim, piece.start, piece.stop)

    def read_slice(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """[start, stop) of dimension `dim` of the stored tensor `name`, contiguous, in the serving dtype."""
        header = self._layout.tensor(name)
        assert 0 <= start < stop <= header.shape[dim], f"{name}: [{start}, {stop}) of {header.shape} along {dim}"
        stored = self._mapped(header).narrow(dim, start, stop - start)
        return self._converted(stored, torch.empty(stored.shape, dtype=self._dtype))

    def _read_stacked(self, parameter: Parameter, layer: int, piece: Slice) -> Tensor:
        """The range `piece` of a parameter that is several matrices on disk."""
        bounds = [(0, extent) for extent in parameter.shape]
        bounds[piece.dim] = (piece.start, piece.stop)
        experts, rows, columns = bounds
        result = torch.empty([stop - start for start, stop in bounds], dtype=self._dtype)
        matrices = parameter.stored(layer)
        count = len(matrices) // parameter.shape[0]
        for expert in range(*experts):
            for index, (name, (height, _)) in enumerate(matrices[expert * count : (expert + 1) * count]):
                for low, high in intersect([rows], [(index * height, (index + 1) * height)]):
                    matrix = self._mapped(self._layout.tensor(name))
                    stored = matrix[low - index * height : high - index * height, slice(*columns)]
                    self._converted(stored, result[expert - experts[0], low - rows[0] : high - rows[0]])
        return result

    def _converted(self, stored: Tensor, place: Tensor) -> Tensor:
        """Copy what is asked for out of the file's pages, into a tensor of the serving dtype."""
        with self._lock:
            self._bytes_read += stored.numel() * stored.element_size()
        return place.copy_(stored)

    def _mapped(self, header: TensorHeader) -> Tensor:
        """The stored tensor, over the file's pages: nothing is read until it is copied."""
        with self._lock:
            if header.file not in self._maps:
                with open_regular(header.file) as file:
                    if (known := self._files.get(header.file.name)) is not None:
                        verify_open_file(file, header.file, known)
                    # A private mapping is writable, which torch wants, and never writes back.
                    self._maps[header.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            pages = self._maps[header.file]
        size = header.stop - header.start
        raw = torch.frombuffer(pages, dtype=torch.uint8, offset=header.start, count=size)
        if header.start % ELEMENT_BYTES[header.dtype]:
            raw = raw.clone()
        return raw.view(_STORED_DTYPES[header.dtype]).view(header.shape)
