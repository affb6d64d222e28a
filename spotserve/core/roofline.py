"""A roofline: profiles of dense models on GPUs of the catalogue, from data sheets and not from measurements.

A layer takes as long as the slower of its bytes (weights once, KV of every decoding sequence) and its FLOPs, then the
ranks of a tensor group exchange their sums twice. What hardware reaches of its data sheet is in the efficiencies below;
those of memory, FLOPs, PCIe and TCP were set on the T4 figures of the SpotServe artifact (paper section 5), which the
roofline meets within 9 % on average and a factor of 1.5 at worst. It knows nothing of kernels, quantised weights or
experts.

A profile has one curve over the rows of a forward. Up to `decode_rows` of them are decoding sequences, each with
`context_tokens` behind it; the others belong to prompts of at most so many tokens. Reading the output head is spread
over the layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spotserve.core.gpu_catalogue import GpuType
from spotserve.core.slices import Shard, kv_block_bytes, max_tensor_degree, shard_bytes
from spotserve.core.snapshot import Market
from spotserve.core.spec import DeviceProfile, LatencyPoint, ModelSpec, Profile
from spotserve.errors import SpecError

ROW_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
TENSOR_DEGREES = (1, 2, 4, 8, 16)
CONTEXT_TOKENS = 1024

MEMORY_EFFICIENCY = 0.8
FLOPS_EFFICIENCY = 0.5
LINK_EFFICIENCY = 0.6
"""Of a ring over PCIe or NVLink."""
NIC_EFFICIENCY = 0.9
LAYER_OVERHEAD_MS = 0.02
"""Launching the kernels of a layer."""
STAGE_OVERHEAD_MS = 0.3
EXCHANGES_PER_LAYER = 2
EXCHANGE_S = {"pcie": 1e-4, "nvlink": 1.5e-5, "tcp": 4.4e-4, "efa": 5e-5}
"""What an exchange takes beside its bytes; pcie and tcp set on the T4 figures, nvlink and efa assumed."""

STORAGE_BYTES_PER_S = 1e9
"""Parallel reads of an instance from object storage; assumed. The paper's artifact had 1e8 per instance."""
START_S = 120.0
"""From the request of an instance to its first answer (paper section 3.2)."""


@dataclass(frozen=True, slots=True)
class Efficiencies:
    """What hardware reaches of its data sheet, each of 0 to 1."""

    memory: float = MEMORY_EFFICIENCY
    flops: float = FLOPS_EFFICIENCY
    link: float = LINK_EFFICIENCY
    nic: float = NIC_EFFICIENCY

    def __post_init__(self) -> None:
        for name, value in (("memory", self.memory), ("flops", self.flops), ("link", self.link), ("nic", self.nic)):
            if not 0 < value <= 1:
                raise SpecError(f"{name} efficiency {value:g} is not above 0 and at most 1")


@dataclass(frozen=True, slots=True)
class _RankShare:
    """What one rank of a tensor group holds and computes of one layer."""

    weight_bytes: int
    kv_token_bytes: int
    flops_per_row: float
    """Of the matrices: two for each weight."""
    attention_flops: float
    """For one row and one token of its context: scores and values."""
    row_bytes: int
    """Of one row's activation, which the ranks exchange."""


def roofline_profile(
    model: ModelSpec,
    gpu: GpuType,
    *,
    market: Market = "spot",
    gpus_per_instance: int | None = None,
    others: Sequence[GpuType] = (),
    context_tokens: int | None = None,
    decode_rows: int = 32,
    storage_bytes_per_s: float = STORAGE_BYTES_PER_S,
    start_s: float = START_S,
    efficiencies: Efficiencies | None = None,
) -> Profile:
    """The profile of a model on a GPU type, estimated.

    Args:
        model: a dense model.
        gpu: the profile's own device; its name in the catalogue is the device's.
        market: whose prices the profile has.
        gpus_per_instance: where a tensor group has to cross the network; the catalogue's instance if not given.
        others: GPU types beside it, as `devices` of the profile; its network is then the slowest of all.
        context_tokens: what a decoding sequence has behind it, and the longest prompt; 1024 or the model's most if not
            given.
        decode_rows: how many rows of a forward decode before the others prefill.
        storage_bytes_per_s: of an instance.
        start_s: from the request of an instance to its first answer.
        efficiencies: what is reached of the data sheets.

    Raises:
        SpecError: experts, a dtype that the GPU does not compute in, or a value out of its bounds.
    """
    reached = Efficiencies() if efficiencies is None else efficiencies
    context = min(CONTEXT_TOKENS, model.max_model_len) if context_tokens is None else context_tokens
    if not 1 <= context <= model.max_model_len or decode_rows < 1:
        raise SpecError(
            f"context_tokens {context} is not between 1 and {model.max_model_len}, "
            f"or decode_rows {decode_rows} is not 1 or more"
        )
    if any(len(parameter.shape) > 2 for parameter in model.parameters):
        raise SpecError(f"model {model.name} has experts", hint="a roofline is for dense models: measure a profile")

    def latencies(one: GpuType) -> tuple[LatencyPoint, ...]:
        group = one.gpus_per_instance if gpus_per_instance is None else gpus_per_instance
        rows = _Rows(context_tokens=context, decoding=decode_rows)
        return _latencies(model, one, reached, rows, gpus_per_instance=group)

    return Profile(
        name=f"{model.name}-{model.dtype}-{gpu.name}-roofline",
        source=(
            f"roofline of data sheet figures: {reached.memory:g} of the memory bandwidth, {reached.flops:g} of "
            f"the dense FLOP/s, {reached.link:g} of the links, {reached.nic:g} of the network; up to "
            f"{decode_rows} rows decode with {context} tokens of context; not measured"
        ),
        device=gpu.name,
        latencies=latencies(gpu),
        stage_overhead_ms=STAGE_OVERHEAD_MS,
        link_bytes_per_s=reached.nic * min(one.nic_bytes_per_s for one in (gpu, *others)),
        storage_bytes_per_s=storage_bytes_per_s,
        start_s=start_s,
        price_per_hour=price_usd(gpu, market),
        devices=tuple(
            DeviceProfile(type=one.name, latencies=latencies(one), price_per_hour=price_usd(one, market))
            for one in others
        ),
    )


def price_usd(gpu: GpuType, market: Market) -> float:
    """USD per GPU-hour."""
    return gpu.spot_usd if market == "spot" else gpu.on_demand_usd


@dataclass(frozen=True, slots=True)
class _Rows:
    """What the rows of a forward are: so many decode, with so much behind each; the others are of prompts."""

    context_tokens: int
    decoding: int


def _latencies(
    model: ModelSpec, gpu: GpuType, reached: Efficiencies, mix: _Rows, *, gpus_per_instance: int
) -> tuple[LatencyPoint, ...]:
    flops = _flops(model, gpu)
    points = []
    for tensor in TENSOR_DEGREES:
        if tensor > max_tensor_degree(model):
            break
        share = _rank_share(model, tensor=tensor)
        for rows in ROW_COUNTS:
            moved, computed = _work(share, mix, rows=rows)
            compute_s = max(moved / (reached.memory * gpu.memory_bytes_per_s), computed / (reached.flops * flops))
            is_within = tensor <= gpus_per_instance
            exchange_s = _exchanges_s(share, gpu, reached, rows=rows, tensor=tensor, is_within=is_within)
            layer_ms = 1000 * (compute_s + exchange_s) + LAYER_OVERHEAD_MS
            points.append(LatencyPoint(tokens=rows, tensor=tensor, layer_ms=layer_ms))
    return tuple(points)


def _flops(model: ModelSpec, gpu: GpuType) -> float:
    if model.dtype == "bfloat16" and not gpu.has_bf16:
        raise SpecError(f"{gpu.name} does not compute in bfloat16", hint="serve in float16 or float32 on it")
    return gpu.fp32_flops if model.dtype == "float32" else gpu.fp16_flops


def _rank_share(model: ModelSpec, *, tensor: int) -> _RankShare:
    """The share of rank 0, which none exceeds."""
    inside = Shard(layers=(0, 1), tensor=tensor, rank=0, first=False, last=False)
    layer_bytes = shard_bytes(model, inside)
    head_bytes = shard_bytes(model, inside.model_copy(update={"last": True})) - layer_bytes
    kv_token_bytes = kv_block_bytes(model, inside, block_tokens=1)
    q_heads = -(-model.num_q_heads // tensor)
    return _RankShare(
        weight_bytes=layer_bytes + head_bytes // model.num_layers,
        kv_token_bytes=kv_token_bytes,
        flops_per_row=2 * layer_bytes / model.element_bytes,
        attention_flops=4.0 * q_heads * model.head_dim,
        row_bytes=model.hidden_size * model.element_bytes,
    )


def _work(share: _RankShare, mix: _Rows, *, rows: int) -> tuple[float, float]:
    """(bytes moved, FLOPs) of a layer for a forward of so many rows."""
    decoding = min(rows, mix.decoding)
    prompt = rows - decoding
    moved = share.weight_bytes + (decoding * mix.context_tokens + prompt) * share.kv_token_bytes
    # A row of a prompt looks back over half of it on average.
    looked_at = decoding * mix.context_tokens + prompt * min(prompt, mix.context_tokens) / 2
    return moved, rows * share.flops_per_row + looked_at * share.attention_flops


def _exchanges_s(
    share: _RankShare, gpu: GpuType, reached: Efficiencies, *, rows: int, tensor: int, is_within: bool
) -> float:
    """Two ring all-reduces of the rows' activations; across instances the network bounds the ring."""
    if tensor == 1:
        return 0.0
    bytes_per_s = reached.link * gpu.link_bytes_per_s
    if not is_within:
        bytes_per_s = min(bytes_per_s, reached.nic * gpu.nic_bytes_per_s)
    wait_s = EXCHANGE_S[gpu.link] if is_within else EXCHANGE_S[gpu.network]
    moved = 2 * (tensor - 1) / tensor * rows * share.row_bytes
    return EXCHANGES_PER_LAYER * (wait_s + moved / bytes_per_s)
