"""The paper's models: their sizes, what they need of memory, and how few GPUs hold them.

"GPT-20B" and "LLaMA-30B" are OPT-like GPTs with random weights in the artifact. Everything is fp32. Layers are padded
with no-op layers so that more pipeline depths divide them; these take memory and are moved like the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

ELEMENT_BYTES = 4
MAX_TENSOR = 16
"""The largest tensor degree that the artifact's profiles measure; degrees are powers of two."""


@dataclass(frozen=True, slots=True)
class PaperModel:
    """Sizes of a model of the evaluation (section 6.1 and Table 1); `max_sequence` is S_in + S_out."""

    name: str
    hidden: int
    heads: int
    layers: int
    padded_layers: int
    vocab: int
    max_sequence: int = 640


@dataclass(frozen=True, slots=True)
class Shape:
    """Parallel degrees (D, P, M)."""

    data: int
    pipeline: int
    tensor: int

    @property
    def gpus(self) -> int:
        """How many GPUs it takes."""
        return self.data * self.pipeline * self.tensor

    def positions(self) -> Iterator[Position]:
        """Every position, replica by replica, stage by stage, rank by rank."""
        for replica in range(self.data):
            for stage in range(self.pipeline):
                for rank in range(self.tensor):
                    yield Position(replica, stage, rank)


@dataclass(frozen=True, slots=True)
class Position:
    """(d, p, m): one GPU's place in a shape."""

    replica: int
    stage: int
    rank: int


OPT_6_7B = PaperModel("OPT-6.7B", hidden=4096, heads=32, layers=32, padded_layers=36, vocab=51200)
GPT_20B = PaperModel("GPT-20B", hidden=6144, heads=48, layers=44, padded_layers=48, vocab=51200)
LLAMA_30B = PaperModel("LLaMA-30B", hidden=7168, heads=56, layers=48, padded_layers=48, vocab=50304)
PAPER_MODELS = {model.name: model for model in (OPT_6_7B, GPT_20B, LLAMA_30B)}


def sharded_floats(model: PaperModel) -> int:
    """Floats of one layer that tensor parallelism deals out."""
    return 12 * model.hidden**2 + 7 * model.hidden


def replicated_floats(model: PaperModel) -> int:
    """Floats of one layer that every rank holds: layer norms and the biases of row-parallel matrices."""
    return 6 * model.hidden


def embedding_floats(model: PaperModel) -> int:
    """Token and position embedding, which the artifact puts on every GPU."""
    return (model.max_sequence + model.vocab) * model.hidden


def head_floats(model: PaperModel) -> int:
    """Final layer norm and output embedding, on every rank of the last stage."""
    return (model.vocab + 2) * model.hidden


def noop_layers(model: PaperModel) -> tuple[int, ...]:
    """The padded layers that compute nothing: the last of each run of equal length."""
    padding = model.padded_layers - model.layers
    if padding == 0:
        return ()
    run = model.padded_layers // padding
    return tuple(layer for layer in range(model.padded_layers) if layer % run == run - 1)


def weight_bytes(model: PaperModel, *, pipeline: int, tensor: int, is_last: bool) -> int:
    """Bytes of weights on one GPU of the last stage or of another one."""
    layers = model.padded_layers // pipeline
    floats = layers * (sharded_floats(model) // tensor + replicated_floats(model)) + embedding_floats(model)
    return ELEMENT_BYTES * (floats + is_last * head_floats(model))


def kv_bytes(model: PaperModel, *, pipeline: int, tensor: int, batch: int, tokens: int) -> int:
    """Bytes of K and V on one GPU for `batch` sequences of `tokens`."""
    layers = model.padded_layers // pipeline
    return ELEMENT_BYTES * 2 * layers * batch * tokens * model.hidden // tensor


def min_gpus(model: PaperModel, *, weight_budget_bytes: int, gpus_per_instance: int = 4) -> int | None:
    """The fewest GPUs, in whole instances, on which one pipeline's largest share of weights stays within a budget.

    None if no shape of at most one GPU per padded layer and `MAX_TENSOR` ranks does.
    """
    most = model.padded_layers * MAX_TENSOR
    for gpus in range(gpus_per_instance, most + 1, gpus_per_instance):
        tensor = 1
        while tensor <= min(MAX_TENSOR, gpus):
            pipeline, rest = divmod(gpus, tensor)
            fits = rest == 0 and pipeline <= model.padded_layers and model.padded_layers % pipeline == 0
            needs = weight_bytes(model, pipeline=pipeline, tensor=tensor, is_last=True) if fits else None
            if needs is not None and needs <= weight_budget_bytes:
                return gpus
            tensor *= 2
    return None
