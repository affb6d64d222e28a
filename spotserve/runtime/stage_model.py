"""One position of a replica: the decoder layers of a pipeline stage, cut to one tensor rank.

The layers are transformers' own; only their weights are slices, their linear modules are ours, and attention goes
through `paged_attention`. In deterministic mode the bits of a row of logits depend on the row's tokens and absolute
positions alone, whatever the cut, batch, chunking or history (contracts section 7). Each measure and what it is for:

- rows padded to a multiple of 8: a product of fewer rows takes another kernel, which adds in another order;
- column slices of at least 16 rows of weight: narrower ones too take another kernel;
- row-parallel sums by reduction chunks of the model, each its own product, added in float32 in the global order;
- activation functions on a width that is a multiple of 16: vector and scalar code round differently;
- attention in position-aligned tiles (attention.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AttentionInterface

from spotserve.core.batching import SequenceKey
from spotserve.core.slices import (
    Shard,
    Slice,
    axis_range,
    concrete_parameters,
    kv_head_range,
    owned_chunks,
    parameter_slices,
    q_head_range,
)
from spotserve.core.spec import ModelSpec, Parameter
from spotserve.errors import InvariantError
from spotserve.runtime.attention import ATTENTION_NAME, MaskCache, Span, head_map, paged_attention, plan_tiles
from spotserve.runtime.checkpoint import TORCH_DTYPES
from spotserve.runtime.kv_store import KvStore
from spotserve.runtime.linear import ChunkedRowLinear, ColumnLinear, Exchange, Gather, RowLinear, WideActivation
from spotserve.runtime.model_table import load_config
from spotserve.runtime.weights import WeightStore

ROW_MULTIPLE = 8
MIN_COLUMNS = 16
ROTARY_BLOCK = 1024
"""Positions whose rotary angles are computed at once; a fixed shape, so a position's bits never vary."""


@dataclass(frozen=True, slots=True)
class BatchSequence:
    """`count` tokens of one sequence from position `start` on.

    `token_ids` are those tokens, needed on the first stage only. `wants_logits` asks for the last row's logits.
    """

    key: SequenceKey
    start: int
    count: int
    wants_logits: bool
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StageBatch:
    """One forward: any mix of decode rows and prefill chunks, each sequence at most once."""

    sequences: tuple[BatchSequence, ...]

    @property
    def rows(self) -> int:
        """Token rows."""
        return sum(sequence.count for sequence in self.sequences)

    @property
    def num_wanted(self) -> int:
        """Rows of logits the last stage returns, in the order of `sequences`."""
        return sum(sequence.wants_logits for sequence in self.sequences)

    def wanted_rows(self) -> list[int]:
        """Row numbers of the wanted logits."""
        rows, wanted = 0, []
        for sequence in self.sequences:
            rows += sequence.count
            if sequence.wants_logits:
                wanted.append(rows - 1)
        return wanted


class StageModel:
    """Runs one shard. Not re-entrant: one thread calls `forward`."""

    def __init__(
        self,
        folder: Path,
        model: ModelSpec,
        shard: Shard,
        weights: WeightStore,
        kv: KvStore,
        *,
        exchange: Exchange | None = None,
        deterministic: bool = True,
        prepacked: bool = False,
        device: str = "cpu",
    ) -> None:
        """Build the modules over the tensors in `weights`, which must hold all of `shard_slices(model, shard)`.

        Args:
            folder: where config.json is.
            exchange: the other tensor ranks of the stage; needed when there are any.
            deterministic: whether bits must not depend on cut, batch and history.
            prepacked: multiply by copies of the weights that oneDNN laid out: faster on a CPU, the weights' memory
                once more, and other bits, so it is the same on every worker.
        """
        if shard.tensor > 1 and exchange is None:
            raise InvariantError(f"tensor degree {shard.tensor} needs an exchange")
        self.model = model
        self.shard = shard
        self._kv = kv
        self._device = device
        self._deterministic = deterministic
        self._prepacked = prepacked
        self._dtype = TORCH_DTYPES[model.dtype]
        self._masks = MaskCache(self._dtype, device)
        q_heads = q_head_range(model, tensor=shard.tensor, rank=shard.rank)
        kv_heads = kv_head_range(model, tensor=shard.tensor, rank=shard.rank)
        if kv.kv_heads != kv_heads or kv.layers != shard.layers:
            raise InvariantError(f"KV store of {kv.layers} x {kv.kv_heads} is not that of {shard.layers} x {kv_heads}")
        group = model.num_q_heads // model.num_kv_heads
        self._heads = head_map(q_heads=q_heads, kv_heads=kv_heads, group=group, device=device)
        self._gather = Gather(exchange, degree=shard.tensor, rank=shard.rank)
        self._module = _meta_module(folder, model)
        self._install(weights)
        self._rotary = RotaryTable(self._module.model.rotary_emb, self._dtype, device)

    @property
    def kv(self) -> KvStore:
        """The KV store that forwards write."""
        return self._kv

    @property
    def vocab_range(self) -> tuple[int, int]:
        """The token ids whose logits this rank computes, on the last stage."""
        axis = self.model.axis("vocab")
        return axis_range(self.model, axis, tensor=self.shard.tensor, rank=self.shard.rank)

    @torch.inference_mode()
    def forward(self, batch: StageBatch, hidden: Tensor | None = None) -> Tensor:
        """Run the stage's layers over `batch`, writing its KV.

        Args:
            batch: the rows; each sequence's `start` is at most its written KV tokens.
            hidden: [rows, hidden] from the stage before; None on the first stage.

        Returns:
            [rows, hidden] for the next stage, or on the last stage [wanted rows, own vocabulary] logits.

        Raises:
            OutOfBlocks: a table cannot grow. Tables grown before it stay grown; nothing was written.
        """
        spans = [Span(sequence.key, sequence.start, sequence.count) for sequence in batch.sequences]
        for span in spans:
            if span.start > self._kv.kv_tokens(span.key):
                raise InvariantError(f"{span.key} starts at {span.start}, KV has {self._kv.kv_tokens(span.key)} tokens")
            self._kv.extend(span.key, span.stop)
        paged = plan_tiles(spans, self._kv, self._masks, self._heads, self._device)
        self._gather.rows = paged.rows
        positions = [position for span in spans for position in range(span.start, span.stop)]
        state = self._padded(self._embed(batch) if self.shard.first else cast("Tensor", hidden))[None]
        rotary = self._rotary.at(positions + [0] * (state.shape[1] - paged.rows))
        for layer in range(*self.shard.layers):
            state = self._module.model.layers[layer](
                state, attention_mask=None, position_ids=None, position_embeddings=rotary, paged_batch=paged
            )
        for span in spans:
            self._kv.fill(span.key, span.stop)
        if not self.shard.last:
            return state[0, : paged.rows]
        return self._logits(state[0], batch.wanted_rows())

    @torch.inference_mode()
    def full_logits(self, local: Tensor) -> Tensor:
        """[wanted rows, vocabulary] in float32 from every rank's `forward` result; each rank of the stage calls it."""
        axis = self.model.axis("vocab")
        rows = local.shape[0]
        if not rows:
            return local.new_empty(0, self.model.vocab_size, dtype=torch.float32)
        widths = [
            axis_range(self.model, axis, tensor=self.shard.tensor, rank=rank) for rank in range(self.shard.tensor)
        ]
        parts = self._gather.of(local.contiguous(), [(rows, stop - start) for start, stop in widths])
        return torch.cat(parts, dim=1).float()

    def _embed(self, batch: StageBatch) -> Tensor:
        ids = [token for sequence in batch.sequences for token in sequence.token_ids]
        if len(ids) != batch.rows:
            raise InvariantError(f"{len(ids)} token ids for {batch.rows} rows")
        return F.embedding(torch.tensor(ids, device=self._device), self._module.model.embed_tokens.weight)

    def _padded(self, rows: Tensor) -> Tensor:
        """Rows filled up with zeros to a multiple of `ROW_MULTIPLE`."""
        missing = -rows.shape[0] % ROW_MULTIPLE if self._deterministic else 0
        return F.pad(rows, (0, 0, 0, missing)) if missing else rows

    def _logits(self, state: Tensor, wanted: list[int]) -> Tensor:
        start, stop = self.vocab_range
        if not wanted:
            return state.new_empty(0, stop - start)
        rows = self._padded(state.index_select(0, torch.tensor(wanted, device=self._device)))
        normed = self._module.model.norm(rows[None])
        return cast("Tensor", self._module.lm_head(normed)[0, : len(wanted)])

    def _install(self, weights: WeightStore) -> None:
        """Put this rank's tensors into the modules, and our linears in the place of the split ones."""
        modules = dict(self._module.named_modules(remove_duplicate=False))
        tensors = {
            name: self._tensor(weights, name, parameter)
            for name, parameter in concrete_parameters(self.model, self.shard)
        }
        for name, parameter in concrete_parameters(self.model, self.shard):
            owner, leaf = name.rsplit(".", 1)
            if not isinstance(modules[owner], nn.Linear):
                modules[owner]._parameters[leaf] = nn.Parameter(tensors[name], requires_grad=False)
            elif leaf == "weight":
                linear = self._linear(parameter, tensors[name], tensors.get(f"{owner}.bias"))
                path, attribute = owner.rsplit(".", 1) if "." in owner else ("", owner)
                setattr(modules[path], attribute, linear)
        if self._deterministic:
            for layer in range(*self.shard.layers):
                mlp = self._module.model.layers[layer].mlp
                mlp.act_fn = WideActivation(mlp.act_fn)

    def _tensor(self, weights: WeightStore, name: str, parameter: Parameter) -> Tensor:
        ranges = parameter_slices(self.model, parameter, tensor=self.shard.tensor, rank=self.shard.rank)
        tensors = [
            weights.tensor(Slice(parameter=name, dim=parameter.dim, start=start, stop=stop)) for start, stop in ranges
        ]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=parameter.dim)

    def _linear(self, parameter: Parameter, weight: Tensor, bias: Tensor | None) -> nn.Module:
        prepacked = self._prepacked
        if parameter.kind != "row":
            min_columns = MIN_COLUMNS if self._deterministic else 1
            return ColumnLinear(weight, bias, min_columns=min_columns, prepacked=prepacked)
        if not self._deterministic:
            return RowLinear(weight, bias, self._gather, prepacked=prepacked)
        return ChunkedRowLinear(weight, bias, self._gather, self._chunk_widths(parameter), prepacked=prepacked)

    def _chunk_widths(self, parameter: Parameter) -> list[list[int]]:
        """For each rank of the stage, the widths of the reduction chunks it multiplies, in global order."""
        (segment,) = parameter.segments
        axis = self.model.axis(segment.axis)
        return [
            [(stop - start) * segment.unit for start, stop in owned_chunks(axis, tensor=self.shard.tensor, rank=rank)]
            for rank in range(self.shard.tensor)
        ]


class RotaryTable:
    """Cosines and sines by position, computed in blocks of one fixed shape and looked up afterwards."""

    def __init__(self, rotary: nn.Module, dtype: torch.dtype, device: str) -> None:
        self._rotary = rotary.to(device)
        self._like = torch.empty(0, dtype=dtype, device=device)
        self._device = device
        self._blocks: list[tuple[Tensor, Tensor]] = []
        self._table = (self._like, self._like)

    def at(self, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(cosines, sines), each [1, positions, head_dim]."""
        if max(positions) >= len(self._blocks) * ROTARY_BLOCK:
            while max(positions) >= len(self._blocks) * ROTARY_BLOCK:
                start = len(self._blocks) * ROTARY_BLOCK
                block = torch.arange(start, start + ROTARY_BLOCK, device=self._device)[None]
                self._blocks.append(self._rotary(self._like, block))
            cosines, sines = zip(*self._blocks, strict=True)
            self._table = (torch.cat(cosines, dim=1), torch.cat(sines, dim=1))
        index = torch.tensor(positions, device=self._device)
        return self._table[0].index_select(1, index), self._table[1].index_select(1, index)


def _meta_module(folder: Path, model: ModelSpec) -> Any:
    """The transformers model without weights: parameters are on the meta device, buffers are real."""
    AttentionInterface.register(ATTENTION_NAME, paged_attention)
    config = load_config(folder)
    config._attn_implementation = ATTENTION_NAME
    with init_empty_weights(include_buffers=False):
        module = getattr(transformers, model.architecture)(config)
    return module.eval().requires_grad_(False)
