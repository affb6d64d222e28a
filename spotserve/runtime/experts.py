"""The experts of a mixture-of-experts layer, cut by columns like any MLP: every rank has a part of every expert.

It takes the place of transformers' own experts module, behind the same router: hidden states, the chosen experts and
their weights in, the weighted sum over the chosen experts out. In deterministic mode a row's bits depend on the row
alone, though the rows that share its experts change with every batch (contracts section 7). Beside what every linear
does (linear.py) that takes:

- the rows of each expert filled up to a multiple of 8, as if each expert were a batch of its own;
- per reduction chunk, the weighted products of a row's experts added in float32 in the order of the experts' numbers;
- these sums gathered from all ranks and added in the global order of the chunks.

Padding rows of the batch are routed like any other row, but no expert multiplies them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from spotserve.runtime.linear import ChunkProducts, ColumnLinear, Gather, sum_in_order


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """A rank's columns of all experts: gate and up [experts, own columns, in], down [experts, out, own columns]."""

    gate: Tensor
    up: Tensor
    down: Tensor


class Experts(nn.Module):
    """The weighted sum over each row's experts, over all ranks of the stage."""

    def __init__(
        self,
        weights: ExpertWeights,
        activation: nn.Module,
        gather: Gather,
        widths: Sequence[Sequence[int]],
        *,
        row_multiple: int,
        min_columns: int,
        prepacked: bool = False,
    ) -> None:
        """Build over views of `weights`.

        Args:
            widths: for each rank, the widths of the chunks of its columns that are products of their own.
            row_multiple: what an expert's rows are filled up to a multiple of.
            min_columns: narrower gates are computed that wide and cut.
        """
        super().__init__()
        self._gather = gather
        self._row_multiple = row_multiple
        self._out = weights.down.shape[1]
        self._num_chunks = [len(each) for each in widths]
        self._experts = [
            _Expert(
                gate=ColumnLinear(gate, None, min_columns=min_columns, prepacked=prepacked),
                up=ColumnLinear(up, None, min_columns=min_columns, prepacked=prepacked),
                activation=activation,
                down=ChunkProducts(down, widths[gather.rank], prepacked=prepacked),
            )
            for gate, up, down in zip(weights.gate, weights.up, weights.down, strict=True)
        ]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[padded rows, in], the experts of each row and their weights [padded rows, k] -> [padded rows, out].

        Padding rows come back as zero.
        """
        real = self._gather.rows
        own = hidden_states.new_zeros(self._num_chunks[self._gather.rank], real, self._out, dtype=torch.float32)
        scales = top_k_weights.float()
        for group in _groups(top_k_index[:real], len(self._experts)):
            rows = hidden_states.index_select(0, group.rows)
            missing = -rows.shape[0] % self._row_multiple
            products = self._experts[group.expert].products(F.pad(rows, (0, 0, 0, missing)), rows.shape[0])
            own.index_add_(1, group.rows, products.float() * scales[group.rows, group.places][None, :, None])
        gathered = self._gather.of(own, [(count, real, self._out) for count in self._num_chunks])
        total = sum_in_order([chunk for part in gathered for chunk in part.unbind()]).to(hidden_states.dtype)
        return F.pad(total, (0, 0, 0, hidden_states.shape[0] - real))


@dataclass(frozen=True, slots=True)
class _Expert:
    """A rank's part of one expert."""

    gate: nn.Module
    up: nn.Module
    activation: nn.Module
    down: ChunkProducts

    def products(self, rows: Tensor, real: int) -> Tensor:
        """rows [padded rows, in] -> [chunks, real rows, out]."""
        return self.down.of(self.activation(self.gate(rows)) * self.up(rows), real)


@dataclass(frozen=True, slots=True)
class _Group:
    """The rows that chose an expert, ascending, and the place among a row's choices where it stands."""

    expert: int
    rows: Tensor
    places: Tensor


def _groups(chosen: Tensor, num_experts: int) -> Iterator[_Group]:
    """The groups of `chosen` [rows, k], experts ascending; an expert that nobody chose has none."""
    order = chosen.flatten().argsort(stable=True)
    start = 0
    for expert, count in enumerate(torch.bincount(chosen.flatten(), minlength=num_experts).tolist()):
        if count:
            each = order[start : start + count]
            yield _Group(expert, rows=each // chosen.shape[1], places=each % chosen.shape[1])
        start += count
