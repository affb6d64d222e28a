"""Limits that follow from a model and the memory of one GPU: how long a sequence may be, how much headroom is kept."""

from __future__ import annotations

from spotserve.core.slices import (
    kv_block_bytes,
    layer_split,
    max_tensor_degree,
    shard_bytes,
    stage_shard,
)
from spotserve.core.spec import KV_BLOCK_TOKENS, Limits, ModelSpec
from spotserve.errors import ModelError

HEADROOM_SHARE = 0.04
"""Share of a GPU's memory that configurations prefer to leave free for migrations."""


def size_limits(
    model: ModelSpec,
    *,
    gpu_memory_bytes: int,
    num_gpus: int,
    max_model_len: int,
    max_running: int,
    degrees: tuple[int | None, int | None, int | None],
    weight_copies: int = 1,
) -> Limits:
    """The limits of a service whose weights take memory `weight_copies` times.

    Raises:
        ModelError: the model and one sequence of `max_model_len` exceed all GPUs together.
    """
    data, pipeline, tensor = degrees
    if tensor is not None and tensor > max_tensor_degree(model):
        raise ModelError(
            f"tensor degree {tensor} exceeds {max_tensor_degree(model)} reduction chunks of {model.name}",
            hint=f"choose -tp up to {max_tensor_degree(model)}",
        )
    if pipeline is not None and pipeline > model.num_layers:
        raise ModelError(
            f"stage count {pipeline} exceeds {model.num_layers} layers", hint=f"choose -pp up to {model.num_layers}"
        )
    if num_gpus and not _fits_anywhere(model, gpu_memory_bytes, num_gpus, max_model_len, weight_copies):
        raise ModelError(
            f"model {model.name} and one sequence of {max_model_len} tokens exceed "
            f"{num_gpus} GPUs of {gpu_memory_bytes} bytes",
            hint="more --instances, a larger --gpu-memory, or a smaller --max-model-len",
        )
    return Limits(
        data=data,
        pipeline=pipeline,
        tensor=tensor,
        max_running=max_running,
        max_model_len=max_model_len,
        migration_headroom_bytes=int(HEADROOM_SHARE * gpu_memory_bytes),
    )


def _fits_anywhere(
    model: ModelSpec, gpu_memory_bytes: int, num_gpus: int, max_model_len: int, weight_copies: int
) -> bool:
    """Whether any (P, M) over all GPUs holds the weights and one sequence."""
    return any(
        _fits(
            model,
            gpu_memory_bytes,
            pipeline=pipeline,
            tensor=tensor,
            max_model_len=max_model_len,
            weight_copies=weight_copies,
        )
        for tensor in range(1, min(max_tensor_degree(model), num_gpus) + 1)
        for pipeline in range(1, min(model.num_layers, num_gpus // tensor) + 1)
    )


def _fits(
    model: ModelSpec, gpu_memory_bytes: int, *, pipeline: int, tensor: int, max_model_len: int, weight_copies: int
) -> bool:
    num_blocks = -(-max_model_len // KV_BLOCK_TOKENS)
    for layers in layer_split(model.num_layers, pipeline):
        for rank in range(tensor):
            shard = stage_shard(model, layers=layers, tensor=tensor, rank=rank)
            kv_bytes = num_blocks * kv_block_bytes(model, shard, block_tokens=KV_BLOCK_TOKENS)
            if weight_copies * shard_bytes(model, shard) + kv_bytes > gpu_memory_bytes:
                return False
    return True
