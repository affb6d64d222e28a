"""The linear modules of a shard: column slices, row-parallel sums by reduction chunks, and the gather they need.

A column slice's output is exact by itself. A row-parallel product is a sum over inputs, and the order of a float sum
shows in its bits: deterministic mode therefore sums over a grid of chunks that belongs to the model, each its own
product, in float32 and in one global order on every rank (contracts section 7 (a)).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Protocol, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from spotserve.core.spec import LinearKind
from spotserve.errors import ModelError

COLUMN_MULTIPLE = 16
MIN_INPUTS = 16
PACK_ROWS = 8
"""The row count that prepacked weights are laid out for; one value everywhere, as it may show in the bits."""

Product = Callable[[Tensor], Tensor]
"""rows [..., in] -> [..., out]."""


class Exchange(Protocol):
    """The tensor ranks of a stage, as the mesh connects them."""

    def all_gather(self, tensor: Tensor, out: Sequence[Tensor]) -> None:
        """Give `tensor` to the other ranks and fill `out[r]` with rank r's (own one included); sizes may differ."""


class Gather:
    """All-gathers among a stage's ranks. Each forward says how many rows are real: padding is not sent."""

    def __init__(self, exchange: Exchange | None, *, degree: int, rank: int) -> None:
        self._exchange = exchange
        self.degree = degree
        self.rank = rank
        self.rows = 0

    def of(self, tensor: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Every rank's tensor in rank order; `shapes` are their shapes, the own one included."""
        if self._exchange is None:
            return [tensor]
        out = [tensor if rank == self.rank else tensor.new_empty(shape) for rank, shape in enumerate(shapes)]
        self._exchange.all_gather(tensor, out)
        return out


def product_of(weight: Tensor, bias: Tensor | None, *, prepacked: bool) -> Product:
    """Multiplication by `weight` [out, in]: plain, or by a copy of it that oneDNN laid out for this processor.

    The two differ in bits, so every worker of a deployment has to use the same one (contracts section 7 (d)).
    """
    if not prepacked:
        return lambda rows: F.linear(rows, weight, bias)
    packed = _packed(weight)
    multiply = torch.ops.mkldnn._linear_pointwise
    return lambda rows: cast("Tensor", multiply(rows, packed, bias, "none", [], ""))


def check_linear(linear: LinearKind, dtype: torch.dtype, device: str) -> None:
    """Raises ModelError if this machine cannot multiply that way."""
    if linear == "prepacked":
        _packed(torch.zeros(COLUMN_MULTIPLE, COLUMN_MULTIPLE, dtype=dtype, device=device))


def _packed(weight: Tensor) -> Tensor:
    hint = "serve with --linear plain"
    if weight.device.type != "cpu":
        raise ModelError(f"prepacked weights are not supported on {weight.device.type}", hint=hint)
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        raise ModelError(f"prepacked weights need a torch with oneDNN, torch {torch.__version__} has none", hint=hint)
    try:
        return cast("Tensor", torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACK_ROWS))
    except RuntimeError as error:
        message = f"prepacked {weight.dtype} weights are not supported by this processor"
        raise ModelError(message, hint=hint) from error


class ColumnLinear(nn.Module):
    """Output columns of a product; a narrow slice is computed `min_columns` wide and cut."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, min_columns: int, prepacked: bool = False) -> None:
        super().__init__()
        self._columns = weight.shape[0]
        missing = max(0, min_columns - self._columns)
        if missing:
            weight = F.pad(weight, (0, 0, 0, missing))
            bias = F.pad(bias, (0, missing)) if bias is not None else None
        self._product = product_of(weight, bias, prepacked=prepacked)

    def forward(self, rows: Tensor) -> Tensor:
        """rows [1, rows, in] -> [1, rows, own columns]."""
        columns = self._product(rows)
        return columns if columns.shape[-1] == self._columns else columns[..., : self._columns].contiguous()


class PackedLinear(nn.Module):
    """Several column slices of one weight beside each other, each a view: a copy would double them."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self._parts = nn.ModuleList(parts)

    def forward(self, rows: Tensor) -> Tensor:
        """rows [..., rows, in] -> [..., rows, own columns of all parts]."""
        return torch.cat([part(rows) for part in self._parts], dim=-1)


class RowLinear(nn.Module):
    """Fast mode: one product over the rank's own inputs, summed over ranks in float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None, gather: Gather, *, prepacked: bool = False) -> None:
        super().__init__()
        self._product = product_of(weight, None, prepacked=prepacked)
        self._bias = bias
        self._gather = gather

    def forward(self, rows: Tensor) -> Tensor:
        """rows [1, rows, own inputs] -> [1, rows, out]."""
        own = self._product(rows)
        total = sum_in_order(self._gather.of(own, [tuple(own.shape)] * self._gather.degree)).to(rows.dtype)
        return total if self._bias is None else total + self._bias


class ChunkedRowLinear(nn.Module):
    """Deterministic mode: a product per reduction chunk, gathered from all ranks and added in the global order.

    `widths[r]` are the widths of the chunks that rank r multiplies.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        gather: Gather,
        widths: Sequence[Sequence[int]],
        *,
        prepacked: bool = False,
    ) -> None:
        super().__init__()
        self._bias = bias
        self._gather = gather
        self._num_chunks = [len(each) for each in widths]
        self._out = weight.shape[0]
        self._products = ChunkProducts(weight, widths[gather.rank], prepacked=prepacked)

    def forward(self, rows: Tensor) -> Tensor:
        """rows [..., padded rows, own inputs] -> [..., padded rows, out]; padding rows come back as zero."""
        real = self._gather.rows
        flat = rows.view(-1, rows.shape[-1])
        if self._gather.degree == 1:  # Nothing to send, so no need to put them together first.
            chunks = self._products.each(flat, real)
        else:
            own = self._products.of(flat, real)
            gathered = self._gather.of(own, [(count, real, self._out) for count in self._num_chunks])
            chunks = [chunk for part in gathered for chunk in part.unbind()]
        total = sum_in_order(chunks).to(rows.dtype)
        if self._bias is not None:
            total = total + self._bias
        missing = flat.shape[0] - real
        padded = F.pad(total, (0, 0, 0, missing)) if missing else total
        return padded.view(*rows.shape[:-1], self._out)


class ChunkProducts:
    """The products of neighbouring reduction chunks, each with its own bits; `widths` add up to the weight's inputs."""

    def __init__(self, weight: Tensor, widths: Sequence[int], *, prepacked: bool) -> None:
        # Neighbouring chunks of one width can share a batched product, whose bits are those of each chunk alone. On a
        # CPU only float32 has one that reads a strided view; other types would copy the weight each time.
        batched = not prepacked and (weight.dtype == torch.float32 or weight.device.type != "cpu")
        self._runs: list[_ChunkList | _ChunkRun] = []
        start = 0
        for width, same in groupby(widths):
            stop = start + len(list(same)) * width
            if batched:
                self._runs.append(_ChunkRun(weight, start, stop, width))
            else:
                self._runs.append(_ChunkList(weight, start, stop, width, prepacked=prepacked))
            start = stop

    def of(self, rows: Tensor, real: int) -> Tensor:
        """rows [padded rows, own inputs] -> [chunks, real rows, out]."""
        return torch.stack(self.each(rows, real))

    def each(self, rows: Tensor, real: int) -> list[Tensor]:
        """The same as a list of [real rows, out]."""
        products = [product for run in self._runs for product in run.products(rows)]
        return products if real == rows.shape[0] else [product[:real] for product in products]


class _ChunkList:
    """The products of neighbouring chunks of equal `width`, inputs [start, stop), one by one.

    Fewer than 16 inputs are filled up with zeros: the plain bfloat16 product of 8 has bits that depend on the number of
    rows, about once in ten million (torch 2.13, AVX-512).
    """

    def __init__(self, weight: Tensor, start: int, stop: int, width: int, *, prepacked: bool) -> None:
        self._start, self._stop, self._width = start, stop, width
        self._missing = max(0, MIN_INPUTS - width)
        self._products = [
            product_of(self._filled(weight[:, each : each + width]), None, prepacked=prepacked)
            for each in range(start, stop, width)
        ]

    def _filled(self, inputs: Tensor) -> Tensor:
        return F.pad(inputs, (0, self._missing)) if self._missing else inputs

    def products(self, rows: Tensor) -> list[Tensor]:
        """rows [rows, own inputs] -> for each chunk [rows, out]."""
        inputs = self._filled(_by_chunk(rows[:, self._start : self._stop], self._width))
        return [product(chunk) for product, chunk in zip(self._products, inputs.unbind(), strict=True)]


class _ChunkRun:
    """The same in one batched product over a view of the weight."""

    def __init__(self, weight: Tensor, start: int, stop: int, width: int) -> None:
        self._start, self._stop, self._width = start, stop, width
        out = weight.shape[0]
        # [out, inputs] seen as [chunks, width, out].
        self._weight = weight[:, start:stop].view(out, -1, width).permute(1, 2, 0)

    def products(self, rows: Tensor) -> tuple[Tensor, ...]:
        """rows [rows, own inputs] -> for each chunk [rows, out]."""
        return torch.bmm(_by_chunk(rows[:, self._start : self._stop], self._width), self._weight).unbind()


def _by_chunk(rows: Tensor, width: int) -> Tensor:
    """[rows, inputs] -> [chunks, rows, width], contiguous."""
    return rows.reshape(rows.shape[0], -1, width).transpose(0, 1).contiguous()


class GatheredNorm(nn.Module):
    """A norm over the columns of all ranks: they are gathered and normed by every rank, which keeps its own.

    `ranges[r]` are the columns of rank r; neighbours may share some.
    """

    def __init__(self, norm: nn.Module, gather: Gather, ranges: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self._norm = norm
        self._gather = gather
        self._ranges = ranges

    def forward(self, columns: Tensor) -> Tensor:
        """[1, rows, own columns] -> the same; padding rows are normed zeros."""
        real = self._gather.rows
        parts = self._gather.of(columns[0, :real].contiguous(), [(real, stop - start) for start, stop in self._ranges])
        whole = columns.new_zeros(1, columns.shape[1], self._ranges[-1][1])
        for part, (start, stop) in zip(parts, self._ranges, strict=True):
            whole[0, :real, start:stop] = part
        start, stop = self._ranges[self._gather.rank]
        return cast("Tensor", self._norm(whole)[..., start:stop].contiguous())


class WideActivation(nn.Module):
    """An activation function on a width that is a multiple of 16, so that no element takes the scalar path."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self._activation = activation

    def forward(self, columns: Tensor) -> Tensor:
        """The function of each element."""
        width = columns.shape[-1]
        if width % COLUMN_MULTIPLE == 0:
            # Part of a wider tensor, such as one half of gate and up, is otherwise read row by row.
            return cast("Tensor", self._activation(columns.contiguous()))
        return cast("Tensor", self._activation(F.pad(columns, (0, -width % COLUMN_MULTIPLE)))[..., :width])


class WideGate(nn.Module):
    """A gate of one column, as wide as what it gates.

    The function of so narrow a tensor takes scalar code for few rows and vector code for many.
    """

    def __init__(self, gate: nn.Module, width: int) -> None:
        super().__init__()
        self._gate = gate
        self._width = width

    def forward(self, rows: Tensor) -> Tensor:
        """rows [..., rows, in] -> [..., rows, width], all columns of a row alike."""
        column = cast("Tensor", self._gate(rows))
        return column.expand(*column.shape[:-1], self._width).contiguous()


def sum_in_order(parts: Sequence[Tensor]) -> Tensor:
    """The float32 sum, one after another: a tree or a library's own order would depend on the cut."""
    if len(parts) == 1:
        return parts[0].float()
    total = parts[0].float() + parts[1]
    for part in parts[2:]:
        total += part
    return total
