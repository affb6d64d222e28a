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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.activations import ACT2CLS
from transformers.pytorch_utils import Conv1D

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
from spotserve.runtime.attention import (
    ALIGNED_TILES,
    ATTENTION_NAME,
    FREE_TILES,
    GatherBuffer,
    LayerAttention,
    PagedSlot,
    Span,
    head_map,
    paged_attention,
    plan_tiles,
)
from spotserve.runtime.checkpoint import TORCH_DTYPES
from spotserve.runtime.experts import Experts, ExpertWeights
from spotserve.runtime.family import ATTENTION_EXTRAS, ModelParts, layer_windows, model_parts, rope_layer_types
from spotserve.runtime.kv_store import KvStore
from spotserve.runtime.linear import (
    ChunkedRowLinear,
    ColumnLinear,
    Exchange,
    Gather,
    GatheredNorm,
    PackedLinear,
    RowLinear,
    WideActivation,
    WideGate,
)
from spotserve.runtime.model_table import load_config
from spotserve.runtime.weights import WeightStore

ROW_MULTIPLE = 8
MIN_COLUMNS = 16
ACTIVATIONS = tuple({each[0] if isinstance(each, tuple) else each for each in ACT2CLS.values()})
"""The classes of modules that transformers makes an activation function of a config with."""
ROTARY_BLOCK = 1024
"""Positions whose rotary angles are computed at once; a fixed shape, so a position's bits never vary."""


@dataclass(frozen=True, slots=True)
class BatchSequence:
    """`count` tokens of one sequence from position `start` on.

    `token_ids` are those tokens, needed on the first stage only. `wants_logits` asks for the logits of the last
    `num_logits` rows.
    """

    key: SequenceKey
    start: int
    count: int
    wants_logits: bool
    token_ids: tuple[int, ...] = ()
    num_logits: int = 1


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
        return sum(sequence.num_logits for sequence in self.sequences if sequence.wants_logits)

    def wanted_rows(self) -> list[int]:
        """Row numbers of the wanted logits."""
        rows = 0
        wanted: list[int] = []
        for sequence in self.sequences:
            rows += sequence.count
            if sequence.wants_logits:
                wanted.extend(range(rows - sequence.num_logits, rows))
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
        q_heads = q_head_range(model, tensor=shard.tensor, rank=shard.rank)
        kv_heads = kv_head_range(model, tensor=shard.tensor, rank=shard.rank)
        if kv.kv_heads != kv_heads or kv.layers != shard.layers:
            raise InvariantError(f"KV store of {kv.layers} x {kv.kv_heads} is not that of {shard.layers} x {kv_heads}")
        group = model.num_q_heads // model.num_kv_heads
        self._heads = head_map(q_heads=q_heads, kv_heads=kv_heads, group=group)
        self._tiling = ALIGNED_TILES if deterministic else FREE_TILES
        self._gather = Gather(exchange, degree=shard.tensor, rank=shard.rank)
        self._module = _meta_module(folder, model)
        self._parts = model_parts(model.architecture, type(self._module))
        self._layers = self._module.get_submodule(self._parts.layers)
        self._install(weights)
        self._paged = PagedSlot()
        self._buffer = GatherBuffer(self._dtype, device)
        windows = layer_windows(self._module.config)
        self._windows = frozenset(windows[shard.layers[0] : shard.layers[1]])
        for layer in range(*shard.layers):
            self._prepare_attention(layer, windows[layer], q_heads=q_heads, kv_heads=kv_heads)
        self._rotary = _rotary_tables(self._module, self._parts, self._dtype, device)

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
        paged = plan_tiles(
            spans,
            self._kv,
            self._heads,
            self._tiling,
            windows=self._windows,
            buffer=self._buffer,
            device=self._device,
        )
        self._gather.rows = paged.rows
        positions = [position for span in spans for position in range(span.start, span.stop)]
        positions += [0] * (self._padded_rows(paged.rows) - paged.rows)
        index = torch.tensor(positions, device=self._device)
        state = self._padded(self._embed(batch, index) if self.shard.first else cast("Tensor", hidden))[None]
        rotary = {kind: {"position_embeddings": table.at(positions)} for kind, table in self._rotary.items()}
        self._paged.current = paged
        for layer in range(*self.shard.layers):
            state = self._layers[layer](
                state, attention_mask=None, position_ids=index[None], **rotary.get(self._rotary_of(layer), {})
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

    def _embed(self, batch: StageBatch, positions: Tensor) -> Tensor:
        ids = [token for sequence in batch.sequences for token in sequence.token_ids]
        if len(ids) != batch.rows:
            raise InvariantError(f"{len(ids)} token ids for {batch.rows} rows")
        rows = self._module.get_submodule(self._parts.embedding)(torch.tensor(ids, device=self._device))
        factor = self._config_value(self._parts.family.embedding_factor)
        if factor is not None:
            rows = rows * factor
        if self._parts.positions is not None:
            table = self._module.get_submodule(self._parts.positions).weight
            rows = rows + F.embedding(positions[: len(ids)] + self._parts.family.position_offset, table)
        return cast("Tensor", rows)

    def _padded_rows(self, rows: int) -> int:
        """A forward's rows, filled up to a multiple of `ROW_MULTIPLE`."""
        return rows + (-rows % ROW_MULTIPLE if self._deterministic else 0)

    def _padded(self, rows: Tensor) -> Tensor:
        """Rows filled up with zeros."""
        missing = self._padded_rows(rows.shape[0]) - rows.shape[0]
        return F.pad(rows, (0, 0, 0, missing)) if missing else rows

    def _logits(self, state: Tensor, wanted: list[int]) -> Tensor:
        start, stop = self.vocab_range
        if not wanted:
            return state.new_empty(0, stop - start)
        rows = self._padded(state.index_select(0, torch.tensor(wanted, device=self._device)))
        base, name = self._parts.norm.rsplit(".", 1)
        norm = getattr(self._module.get_submodule(base), name)
        state = rows[None] if norm is None else norm(rows[None])
        return self._scaled(self._module.get_submodule(self._parts.head)(state)[0])[: len(wanted)]

    def _scaled(self, logits: Tensor) -> Tensor:
        """What the model class does to the head's output, entry by entry."""
        factor, divisor, cap = (
            self._config_value(getattr(self._parts.family, name))
            for name in ("logit_factor", "logit_divisor", "logit_cap")
        )
        if factor is not None:
            logits = logits * factor
        if divisor is not None:
            logits = logits / divisor
        if cap is not None:
            tanh = WideActivation(nn.Tanh()) if self._deterministic else nn.Tanh()
            logits = tanh(logits / cap) * cap
        return logits

    def _config_value(self, name: str | None) -> Any:
        return None if name is None else getattr(self._module.config, name)

    def _rotary_of(self, layer: int) -> str | None:
        """Which of the rotary tables a layer uses."""
        return self._module.config.layer_types[layer] if self._rotary and None not in self._rotary else None

    def _prepare_attention(
        self, layer: int, window: int | None, *, q_heads: tuple[int, int], kv_heads: tuple[int, int]
    ) -> None:
        """Tell an attention module what it attends with, and the head counts of this rank where it reads them."""
        module = self._layers[layer].get_submodule(self._parts.attention)
        module.spotserve = LayerAttention(self._paged, window, self._config_value(self._parts.family.score_cap))
        num_q, num_kv = q_heads[1] - q_heads[0], kv_heads[1] - kv_heads[0]
        local = {"num_heads": num_q, "num_key_value_heads": num_kv, "split_size": num_q * self.model.head_dim}
        for name, value in local.items():
            if hasattr(module, name):
                setattr(module, name, value)
        if self._parts.family.private_config:
            module.config = LocalConfig(module.config, num_attention_heads=num_q, num_key_value_heads=num_kv)
        for name, axis in self._parts.family.norms.items() if self.shard.tensor > 1 else ():
            owner, leaf = name.rsplit(".", 1)
            ranges = [self._head_columns(axis, rank) for rank in range(self.shard.tensor)]
            holder = self._layers[layer].get_submodule(owner)
            setattr(holder, leaf, GatheredNorm(getattr(holder, leaf), self._gather, ranges))

    def _head_columns(self, axis: str, rank: int) -> tuple[int, int]:
        """The columns of a rank's heads among those of all heads."""
        start, stop = axis_range(self.model, self.model.axis(axis), tensor=self.shard.tensor, rank=rank)
        return start * self.model.head_dim, stop * self.model.head_dim

    def _install(self, weights: WeightStore) -> None:
        """Put this rank's tensors into the modules, and our linears in the place of the split ones."""
        modules = dict(self._module.named_modules(remove_duplicate=False))
        table = dict(concrete_parameters(self.model, self.shard))
        stacked = {name: parameter for name, parameter in table.items() if len(parameter.shape) == 3}
        for name, parameter in table.items():
            owner, leaf = name.rsplit(".", 1)
            if name in stacked:
                continue
            if not isinstance(modules[owner], (nn.Linear, Conv1D)):
                tensor = self._tensor(weights, name, parameter)
                modules[owner]._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
            elif leaf == "weight":
                bias_name = f"{owner}.bias"
                bias = self._tensor(weights, bias_name, table[bias_name]) if bias_name in table else None
                path, attribute = owner.rsplit(".", 1) if "." in owner else ("", owner)
                setattr(
                    modules[path], attribute, self._module_of(self._pieces(weights, name, parameter), bias, parameter)
                )
        for owner in sorted({name.rsplit(".", 1)[0] for name in stacked}):
            path, attribute = owner.rsplit(".", 1)
            setattr(modules[path], attribute, self._experts(weights, owner, stacked, modules[owner].act_fn))
        if self._deterministic:
            for layer in range(*self.shard.layers):
                _widen_activations(self._layers[layer])

    def _tensor(self, weights: WeightStore, name: str, parameter: Parameter) -> Tensor:
        tensors = self._pieces(weights, name, parameter)
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=parameter.dim)

    def _pieces(self, weights: WeightStore, name: str, parameter: Parameter) -> list[Tensor]:
        """The store's own tensors of the ranges of a parameter."""
        ranges = parameter_slices(self.model, parameter, tensor=self.shard.tensor, rank=self.shard.rank)
        return [
            weights.tensor(Slice(parameter=name, dim=parameter.dim, start=start, stop=stop)) for start, stop in ranges
        ]

    def _experts(
        self, weights: WeightStore, owner: str, table: Mapping[str, Parameter], activation: nn.Module
    ) -> nn.Module:
        """Our module in the place of the experts `owner`, over the store's tensors: a copy would double them."""
        gate_up, down = f"{owner}.gate_up_proj", f"{owner}.down_proj"
        columns = self._pieces(weights, gate_up, table[gate_up])
        gate, up = columns if len(columns) == 2 else columns[0].chunk(2, dim=1)
        [rows] = self._pieces(weights, down, table[down])
        widths = self._chunk_widths(table[down])
        return Experts(
            ExpertWeights(gate, up, rows),
            WideActivation(activation) if self._deterministic else activation,
            self._gather,
            widths if self._deterministic else [[sum(each)] for each in widths],
            row_multiple=ROW_MULTIPLE if self._deterministic else 1,
            min_columns=MIN_COLUMNS if self._deterministic else 1,
            prepacked=self._prepacked,
        )

    def _module_of(self, pieces: list[Tensor], bias: Tensor | None, parameter: Parameter) -> nn.Module:
        """Our linear over one or several pieces of a weight."""
        if len(pieces) == 1:
            return self._linear(parameter, pieces[0], bias)
        widths = [piece.shape[0] for piece in pieces]
        biases = torch.split(bias, widths) if bias is not None else [None] * len(pieces)
        return PackedLinear([self._linear(parameter, *each) for each in zip(pieces, biases, strict=True)])

    def _linear(self, parameter: Parameter, weight: Tensor, bias: Tensor | None) -> nn.Module:
        prepacked = self._prepacked
        if parameter.kind != "row":
            min_columns = MIN_COLUMNS if self._deterministic else 1
            columns = ColumnLinear(weight, bias, min_columns=min_columns, prepacked=prepacked)
            is_gate = self._deterministic and parameter.shape[0] == 1
            return WideGate(columns, self.model.hidden_size) if is_gate else columns
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


class LocalConfig:
    """A model's config as one rank's attention module reads it: some entries are the rank's own."""

    def __init__(self, config: Any, **own: int) -> None:
        self.__dict__.update(own)
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


class RotaryTable:
    """Cosines and sines by position, computed in blocks of one fixed shape and looked up afterwards."""

    def __init__(self, rotary: nn.Module, dtype: torch.dtype, device: str, layer_type: str | None = None) -> None:
        self._rotary = rotary.to(device)
        self._extra = {} if layer_type is None else {"layer_type": layer_type}
        self._like = torch.empty(0, dtype=dtype, device=device)
        self._device = device
        self._blocks: list[tuple[Tensor, Tensor]] = []
        self._table = (self._like, self._like)

    def at(self, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(cosines, sines), each [1, positions, rotated dimensions]."""
        if max(positions) >= len(self._blocks) * ROTARY_BLOCK:
            while max(positions) >= len(self._blocks) * ROTARY_BLOCK:
                start = len(self._blocks) * ROTARY_BLOCK
                block = torch.arange(start, start + ROTARY_BLOCK, device=self._device)[None]
                self._blocks.append(self._rotary(self._like, block, **self._extra))
            cosines, sines = zip(*self._blocks, strict=True)
            self._table = (torch.cat(cosines, dim=1), torch.cat(sines, dim=1))
        index = torch.tensor(positions, device=self._device)
        return self._table[0].index_select(1, index), self._table[1].index_select(1, index)


def _rotary_tables(module: Any, parts: ModelParts, dtype: torch.dtype, device: str) -> dict[str | None, RotaryTable]:
    """The model's rotary tables: none, one for all layers (None), or one for each type of layer."""
    path, name = parts.rotary.rsplit(".", 1)
    rotary = getattr(module.get_submodule(path), name, None)
    if rotary is None:
        return {}
    kinds = rope_layer_types(module.config) or (None,)
    return {kind: RotaryTable(rotary, dtype, device, kind) for kind in kinds}


def _widen_activations(layer: nn.Module) -> None:
    """Put `WideActivation` in the place of a layer's activation functions."""
    for module in list(layer.modules()):
        for name, child in module.named_children():
            if isinstance(child, ACTIVATIONS):
                setattr(module, name, WideActivation(child))


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **given: Any
) -> tuple[Tensor, None]:
    """What transformers' layers call: `paged_attention` with what the stage told the module."""
    scaling = given.pop("scaling")
    unknown = sorted(name for name, content in given.items() if name not in ATTENTION_EXTRAS and content is not None)
    if unknown:
        raise InvariantError(f"{type(module).__name__} attends with {unknown[0]}, which is not served")
    layer: LayerAttention = module.spotserve  # type: ignore[assignment]
    return paged_attention(
        module,
        query,
        key,
        value,
        attention_mask,
        scaling=scaling,
        paged_batch=layer.slot.current,
        window=layer.window,
        score_cap=layer.score_cap,
    )


def _meta_module(folder: Path, model: ModelSpec) -> Any:
    """The transformers model without weights: parameters are on the meta device, buffers are real."""
    AttentionInterface.register(ATTENTION_NAME, _attention)
    config = load_config(folder)
    config._attn_implementation = ATTENTION_NAME
    with init_empty_weights(include_buffers=False):
        module = getattr(transformers, model.architecture)(config)
    return module.eval().requires_grad_(False)
