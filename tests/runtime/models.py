"""Tiny random models, and whole replicas of them in one process: ranks are threads, the exchange is memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from spotserve.core.batching import SequenceKey
from spotserve.core.slices import Shard, kv_head_range, layer_split, shard_slices, stage_shard
from spotserve.core.spec import ModelSpec
from spotserve.runtime.checkpoint import TORCH_DTYPES, Checkpoint
from spotserve.runtime.kv_store import KvStore
from spotserve.runtime.model_table import describe_model
from spotserve.runtime.stage_model import BatchSequence, StageBatch, StageModel
from spotserve.runtime.weights import WeightStore

TINY = {
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 512,
}


def write_llama(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A random Llama in `folder`; the wide initialisation keeps greedy decoding from falling into a period."""
    config = LlamaConfig(**{**TINY, "initializer_range": 0.25, **changes})
    torch.manual_seed(seed)
    module = LlamaForCausalLM(config).to(dtype)
    for name, tensor in module.named_parameters():
        if name.endswith("bias"):  # transformers makes them zero, which would test nothing
            torch.nn.init.normal_(tensor, std=0.5)
    module.save_pretrained(folder)
    return folder


def key_of(index: int, kv_generation: int = 0) -> SequenceKey:
    """A sequence's name in a test."""
    return SequenceKey(f"request-{index}", 0, kv_generation)


class MemoryExchange:
    """One rank's end of an exchange between threads."""

    def __init__(self, hub: ExchangeHub, rank: int) -> None:
        self._hub = hub
        self._rank = rank

    def all_gather(self, tensor: Tensor, out: Sequence[Tensor]) -> None:
        """Copy every rank's tensor into its place."""
        hub = self._hub
        hub.parts[self._rank] = tensor
        hub.barrier.wait(timeout=30)
        for rank, place in enumerate(out):
            if rank != self._rank:
                assert hub.parts[rank].shape == place.shape
                place.copy_(hub.parts[rank])
        hub.barrier.wait(timeout=30)


class ExchangeHub:
    """What the ranks of one stage share."""

    def __init__(self, degree: int) -> None:
        self.barrier = threading.Barrier(degree)
        self.parts: list[Tensor] = [torch.empty(0)] * degree


def loaded_weights(model: ModelSpec, checkpoint: Checkpoint, shard: Shard) -> WeightStore:
    """A store that holds all of a shard."""
    weights = WeightStore(model)
    slices = shard_slices(model, shard)
    weights.reserve(slices)
    for piece in weights.missing(slices):
        weights.write_range(piece.parameter, piece.dim, piece.start, piece.stop, checkpoint.read(piece))
    return weights


def empty_kv(model: ModelSpec, shard: Shard, *, num_blocks: int) -> KvStore:
    """The KV store of a position."""
    return KvStore(
        num_blocks=num_blocks,
        layers=shard.layers,
        kv_heads=kv_head_range(model, tensor=shard.tensor, rank=shard.rank),
        head_dim=model.head_dim,
        dtype=TORCH_DTYPES[model.dtype],
    )


class LocalReplica:
    """P stages x M tensor ranks of one model in this process."""

    def __init__(
        self,
        folder: Path,
        model: ModelSpec | None = None,
        *,
        pipeline: int = 1,
        tensor: int = 1,
        dtype: str | None = None,
        num_blocks: int = 128,
        **options: Any,
    ) -> None:
        """`options` go to every StageModel."""
        self.model = describe_model(folder, dtype) if model is None else model
        self.pool = ThreadPoolExecutor(tensor)
        checkpoint = Checkpoint(folder, self.model)
        self.stages: list[list[StageModel]] = []
        for layers in layer_split(self.model.num_layers, pipeline):
            hub = ExchangeHub(tensor)
            shards = [stage_shard(self.model, layers=layers, tensor=tensor, rank=rank) for rank in range(tensor)]
            self.stages.append(
                [
                    StageModel(
                        folder,
                        self.model,
                        shard,
                        loaded_weights(self.model, checkpoint, shard),
                        empty_kv(self.model, shard, num_blocks=num_blocks),
                        exchange=MemoryExchange(hub, shard.rank) if tensor > 1 else None,
                        **options,
                    )
                    for shard in shards
                ]
            )

    def each_rank(self, ranks: list[StageModel], run: Callable[[StageModel], Tensor]) -> list[Tensor]:
        """Run something on every rank of a stage at the same time."""
        if len(ranks) == 1:
            return [run(ranks[0])]
        return list(self.pool.map(run, ranks))

    def forward(self, batch: StageBatch) -> Tensor:
        """Full float32 logits of the wanted rows, the same on every rank of the last stage."""
        hidden: Tensor | None = None
        for ranks in self.stages:
            given = hidden
            results = self.each_rank(ranks, lambda rank, given=given: rank.forward(batch, given))  # type: ignore[misc]
            hidden = results[0]
        last = self.stages[-1]
        by_rank = dict(zip(map(id, last), results, strict=True))
        full = self.each_rank(last, lambda rank: rank.full_logits(by_rank[id(rank)]))
        assert all(torch.equal(full[0], other) for other in full[1:])
        return full[0]

    def prefill(self, key: SequenceKey, token_ids: Sequence[int], *, chunk: int) -> Tensor:
        """Logits [vocabulary] after the last token, prefilled `chunk` tokens at a time."""
        logits = torch.empty(0)
        for start in range(0, len(token_ids), chunk):
            ids = tuple(token_ids[start : start + chunk])
            done = start + len(ids) == len(token_ids)
            logits = self.forward(StageBatch((BatchSequence(key, start, len(ids), done, ids),)))
        return logits[0]

    def decode(self, tokens: dict[SequenceKey, int]) -> Tensor:
        """One decode step of several sequences: logits [sequences, vocabulary]."""
        kv = self.stages[0][0].kv
        return self.forward(
            StageBatch(tuple(BatchSequence(key, kv.kv_tokens(key), 1, True, (token,)) for key, token in tokens.items()))
        )

    def generate(self, key: SequenceKey, prompt: Sequence[int], num_tokens: int, *, chunk: int = 64) -> list[int]:
        """Greedy tokens."""
        tokens = [int(self.prefill(key, prompt, chunk=chunk).argmax())]
        while len(tokens) < num_tokens:
            tokens.append(int(self.decode({key: tokens[-1]})[0].argmax()))
        return tokens
