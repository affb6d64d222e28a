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

from spotserve.errors import ModelError

COLUMN_MULTIPLE = 16
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
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        raise ModelError("prepacked weights need a torch with oneDNN", hint="serve with plain linears")
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACK_ROWS)
    except RuntimeError as error:
        raise ModelError(
            f"prepacked {weight.dtype} weights are not supported by this processor", hint="serve with plain linears"
        ) from error
    multiply = torch.ops.mkldnn._linear_pointwise
    return lambda rows: cast("Tensor", multiply(rows, packed, bias, "none", [], ""))


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
        total = _sum_in_order(self._gather.of(own, [tuple(own.shape)] * self._gather.degree)).to(rows.dtype)
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
        # Neighbouring chunks of one width can share a batched product, whose bits are those of each chunk alone. On a
        # CPU only float32 has one that reads a strided view; other types would copy the weight each time.
        batched = not prepacked and (weight.dtype == torch.float32 or weight.device.type != "cpu")
        self._runs: list[_ChunkProduct | _ChunkRun] = []
        start = 0
        for width, same in groupby(widths[gather.rank]):
            stop = start + len(list(same)) * width
            if batched:
                self._runs.append(_ChunkRun(weight, start, stop, width))
            else:
                chunks = range(start, stop, width)
                self._runs += [_ChunkProduct(weight, each, each + width, prepacked=prepacked) for each in chunks]
            start = stop

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


class _ChunkProduct:
    """The product of one chunk, inputs [start, stop)."""

    def __init__(self, weight: Tensor, start: int, stop: int, *, prepacked: bool) -> None:
        self._start, self._stop = start, stop
        self._product = product_of(weight[:, start:stop], None, prepacked=prepacked)

    def product(self, rows: Tensor) -> Tensor:
        """rows [rows, own inputs] -> [1, rows, out]."""
        return self._product(rows[:, self._start : self._stop].contiguous())[None]


class _ChunkRun:
    """The products of neighbouring chunks of equal `width`, inputs [start, stop), over a view of the weight."""

    def __init__(self, weight: Tensor, start: int, stop: int, width: int) -> None:
        self._start, self._stop, self._width = start, stop, width
        out = weight.shape[0]
        # [out, inputs] seen as [chunks, width, out].
        self._weight = weight[:, start:stop].view(out, -1, width).permute(1, 2, 0)

    def product(self, rows: Tensor) -> Tensor:
        """rows [rows, own inputs] -> [chunks, rows, out]."""
        inputs = rows[:, self._start : self._stop].reshape(rows.shape[0], -1, self._width)
        return torch.bmm(inputs.transpose(0, 1).contiguous(), self._weight)


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
