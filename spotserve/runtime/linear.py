"""The linear modules of a shard: column slices, row-parallel sums by reduction chunks, and the gather they need.

A column slice's output is exact by itself. A row-parallel product is a sum over inputs, and the order of a float sum
shows in its bits: deterministic mode therefore sums over a grid of chunks that belongs to the model, each its own
product, in float32 and in one global order on every rank (contracts section 7 (a)).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Protocol, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

COLUMN_MULTIPLE = 16


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


class ColumnLinear(nn.Module):
    """Output columns of a product; a narrow slice is computed `min_columns` wide and cut."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, min_columns: int) -> None:
        super().__init__()
        self._columns = weight.shape[0]
        missing = max(0, min_columns - self._columns)
        self._weight = F.pad(weight, (0, 0, 0, missing)) if missing else weight
        self._bias = F.pad(bias, (0, missing)) if missing and bias is not None else bias

    def forward(self, rows: Tensor) -> Tensor:
        """rows [1, rows, in] -> [1, rows, own columns]."""
        columns = F.linear(rows, self._weight, self._bias)
        return columns if columns.shape[-1] == self._columns else columns[..., : self._columns].contiguous()


class RowLinear(nn.Module):
    """Fast mode: one product over the rank's own inputs, summed over ranks in float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None, gather: Gather) -> None:
        super().__init__()
        self._weight = weight
        self._bias = bias
        self._gather = gather

    def forward(self, rows: Tensor) -> Tensor:
        """rows [1, rows, own inputs] -> [1, rows, out]."""
        own = F.linear(rows, self._weight)
        total = _sum_in_order(self._gather.of(own, [tuple(own.shape)] * self._gather.degree)).to(rows.dtype)
        return total if self._bias is None else total + self._bias


class ChunkedRowLinear(nn.Module):
    """Deterministic mode: a product per reduction chunk, gathered from all ranks and added in the global order.

    `widths[r]` are the widths of the chunks that rank r multiplies. Neighbouring chunks of one width share a batched
    product where that needs no copy of the weight; its bits are those of each chunk alone.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, gather: Gather, widths: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self._bias = bias
        self._gather = gather
        self._num_chunks = [len(each) for each in widths]
        self._out = weight.shape[0]
        self._runs: list[_Run] = []
        # On a CPU only float32 has a batched product that reads a strided view; the others would copy it each time.
        batched = weight.dtype == torch.float32 or weight.device.type != "cpu"
        start = 0
        for width, same in groupby(widths[gather.rank]):
            count = len(list(same))
            for first, size in [(0, count)] if batched else [(chunk, 1) for chunk in range(count)]:
                self._runs.append(_Run(weight, start + first * width, size, width))
            start += count * width

    def forward(self, rows: Tensor) -> Tensor:
        """rows [1, padded rows, own inputs] -> [1, padded rows, out]; padding rows come back as zero."""
        real = self._gather.rows
        products = [run.product(rows[0])[:, :real] for run in self._runs]
        own = (products[0] if len(products) == 1 else torch.cat(products)).contiguous()
        gathered = self._gather.of(own, [(count, real, self._out) for count in self._num_chunks])
        total = _sum_in_order([chunk for part in gathered for chunk in part.unbind()]).to(rows.dtype)
        if self._bias is not None:
            total = total + self._bias
        return F.pad(total, (0, 0, 0, rows.shape[1] - real))[None]


class _Run:
    """`count` neighbouring chunks of equal `width`, as a view of the weight."""

    def __init__(self, weight: Tensor, start: int, count: int, width: int) -> None:
        self._start, self._stop = start, start + count * width
        self._shape = (count, width)
        columns = weight[:, self._start : self._stop]
        self._weight = columns if count == 1 else columns.unflatten(1, self._shape).permute(1, 2, 0)

    def product(self, rows: Tensor) -> Tensor:
        """rows [rows, own inputs] -> [count, rows, out]."""
        inputs = rows[:, self._start : self._stop]
        if self._shape[0] == 1:
            return F.linear(inputs.contiguous(), self._weight)[None]
        return torch.bmm(inputs.unflatten(1, self._shape).transpose(0, 1).contiguous(), self._weight)


class WideActivation(nn.Module):
    """An activation function on a width that is a multiple of 16, so that no element takes the scalar path."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self._activation = activation

    def forward(self, columns: Tensor) -> Tensor:
        """The function of each element."""
        width = columns.shape[-1]
        if width % COLUMN_MULTIPLE == 0:
            return cast("Tensor", self._activation(columns))
        return cast("Tensor", self._activation(F.pad(columns, (0, -width % COLUMN_MULTIPLE)))[..., :width])


def _sum_in_order(parts: Sequence[Tensor]) -> Tensor:
    """The float32 sum, one after another: a tree or a library's own order would depend on the cut."""
    if len(parts) == 1:
        return parts[0].float()
    total = parts[0].float() + parts[1]
    for part in parts[2:]:
        total += part
    return total
