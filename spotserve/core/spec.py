"""What is served and with what: the model's parameter table, the profile, the limits.

The parameter table is written once by a short process that may import transformers; planner, workers and
simulator then read shapes and cuts from here alone (design section 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Literal

from pydantic import Field, model_validator

from spotserve.core.frozen import Frozen

ParameterKind = Literal["col", "row", "packed_col", "replicated", "reduce_output"]
DType = Literal["float32", "bfloat16", "float16"]
LinearKind = Literal["plain", "prepacked"]
Batching = Literal["continuous", "static"]

DTYPE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
POLICY_VERSION = 3
"""Counts changes to what the controller decides: raise it with any change that makes a recorded decision another.

Journals say under which version they were decided; a replay compares decisions only if it is this one.
"""
MAX_USD_PER_HOUR = 1e6
"""The dearest GPU that a profile may name: sums of prices stay numbers."""
KV_BLOCK_TOKENS = 16
"""Tokens per KV cache block; equal to the query tile of deterministic mode."""


class Axis(Frozen):
    """One axis that tensor parallelism deals out: its size and the chunks that no rank may cut.

    `chunks` are half-open, contiguous, and cover [0, size). For an axis that feeds a row-parallel sum they are
    the reduction chunks of contracts section 7. `cover_of` names the axis of which this one is the cover (kv
    heads cover q heads, `group` q heads to each); its own chunks are then unused and empty.
    """

    name: str
    size: int = Field(ge=1)
    chunks: tuple[tuple[int, int], ...] = ()
    cover_of: str | None = None
    group: int = Field(default=1, ge=1)


class Segment(Frozen):
    """A run of a parameter's split dimension that follows an axis: [offset, offset + unit * axis.size)."""

    offset: int = Field(ge=0)
    axis: str
    unit: int = Field(ge=1)


class Parameter(Frozen):
    """One row of the parameter table.

    `name` holds `{layer}` for a parameter of a decoder layer. `stage` says which pipeline stage owns it.
    `source` is the tensor's name on disk where it differs (tied embeddings), with `{layer}` as well. Several names are
    the matrices that a parameter of three dimensions is put together from: for each index of dimension 0, which
    `{expert}` stands for in them, these one after another along dimension 1. A `transposed` matrix is [in, out] on
    disk, [out, in] here and everywhere else.
    """

    name: str
    shape: tuple[int, ...]
    kind: ParameterKind
    dim: int = 0
    segments: tuple[Segment, ...] = ()
    stage: Literal["first", "layer", "last"]
    source: str | tuple[str, ...] | None = None
    transposed: bool = False

    def stored(self, layer: int = 0) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """(name, shape) of each tensor on disk that one layer's parameter is made of."""
        if not isinstance(self.source, tuple):
            shape = self.shape[::-1] if self.transposed else self.shape
            return (((self.source or self.name).replace("{layer}", str(layer)), shape),)
        shape = (self.shape[1] // len(self.source), self.shape[2])
        return tuple(
            (name.replace("{layer}", str(layer)).replace("{expert}", str(expert)), shape)
            for expert in range(self.shape[0])
            for name in self.source
        )


class ModelSpec(Frozen):
    """A model, as far as planning and sharding need to know it."""

    name: str
    digest: str
    architecture: str
    dtype: DType
    num_layers: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    num_q_heads: int = Field(ge=1)
    num_kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    max_model_len: int = Field(ge=1)
    axes: tuple[Axis, ...]
    parameters: tuple[Parameter, ...]

    def axis(self, name: str) -> Axis:
        """The axis called `name`."""
        return self._axis_of[name]

    @cached_property
    def _axis_of(self) -> Mapping[str, Axis]:
        return {axis.name: axis for axis in reversed(self.axes)}

    @property
    def element_bytes(self) -> int:
        """Bytes of one weight or KV element."""
        return DTYPE_BYTES[self.dtype]


class LatencyPoint(Frozen):
    """Measured milliseconds of one decoder layer for one forward of `tokens` rows at tensor degree `tensor`."""

    tokens: int = Field(ge=1)
    tensor: int = Field(ge=1)
    layer_ms: float = Field(gt=0)


class DeviceProfile(Frozen):
    """Measured times of a GPU type beside the profile's own, and what such a GPU costs (US dollars), if known."""

    type: str = Field(min_length=1)
    latencies: tuple[LatencyPoint, ...] = Field(min_length=1)
    price_per_hour: float | None = Field(
        default=None, gt=0, le=MAX_USD_PER_HOUR, exclude_if=lambda price: price is None
    )


class Profile(Frozen):
    """Measured times and rates the cost model works with; `devices` are the GPU types beside `device`.

    `source` says where times and prices are from; `price_per_hour` is that of one GPU in US dollars, if known.
    """

    name: str
    source: str
    device: str
    latencies: tuple[LatencyPoint, ...] = Field(min_length=1)
    stage_overhead_ms: float = Field(default=0.5, ge=0)
    link_bytes_per_s: float = Field(gt=0)
    storage_bytes_per_s: float = Field(gt=0)
    round_trip_s: float = Field(default=0.002, ge=0)
    start_s: float = Field(default=5.0, ge=0)
    price_per_hour: float | None = Field(
        default=None, gt=0, le=MAX_USD_PER_HOUR, exclude_if=lambda price: price is None
    )
    devices: tuple[DeviceProfile, ...] = Field(default=(), exclude_if=lambda devices: not devices)

    @model_validator(mode="after")
    def _types_once(self) -> Profile:
        types = [self.device, *(device.type for device in self.devices)]
        if len(set(types)) < len(types):
            raise ValueError(f"GPU types {types} are not each named once")
        return self

    def device_of(self, gpu_type: str) -> DeviceProfile | None:
        """The times of another GPU type; None for the profile's own. Raises KeyError for a type without times."""
        if gpu_type in ("", self.device):
            return None
        for device in self.devices:
            if device.type == gpu_type:
                return device
        raise KeyError(gpu_type)

    @cached_property
    def points(self) -> Mapping[str, Mapping[int, tuple[LatencyPoint, ...]]]:
        """Measured points by GPU type (empty: the profile's own) and tensor degree, fewest tokens first."""
        by_type = {"": self.latencies, **{device.type: device.latencies for device in self.devices}}
        return {
            name: {
                degree: tuple(sorted((p for p in latencies if p.tensor == degree), key=lambda p: p.tokens))
                for degree in sorted({point.tensor for point in latencies})
            }
            for name, latencies in by_type.items()
        }

    @cached_property
    def layer_ms_of(self) -> dict[tuple[str, int, int], float]:
        """What the cost model has found of (GPU type, tensor degree, rows) so far: milliseconds of a layer."""
        return {}

    def price_of(self, gpu_type: str) -> float | None:
        """US dollars per hour of a GPU of a type; None if nobody said."""
        device = self.device_of(gpu_type)
        return self.price_per_hour if device is None else device.price_per_hour

    def compared_price_of(self, gpu_type: str) -> float:
        """The same where fleets are compared: a GPU of unknown price counts as 1, so that fewer are cheaper."""
        price = self.price_of(gpu_type)
        return 1.0 if price is None else price


class Limits(Frozen):
    """Bounds and choices a person made: pinned degrees, batch, headroom."""

    data: int | None = Field(default=None, ge=1)
    pipeline: int | None = Field(default=None, ge=1)
    tensor: int | None = Field(default=None, ge=1)
    max_running: int = Field(default=8, ge=1)
    max_model_len: int = Field(ge=1)
    kv_block_tokens: int = Field(default=KV_BLOCK_TOKENS, ge=1)
    migration_headroom_bytes: int = Field(default=0, ge=0)
    batching: Batching = Field(default="continuous", exclude_if=lambda batching: batching == "continuous")
    """`static` batches are those of the SpotServe paper's artifact; only the simulator knows them."""
    static_batches: int = Field(default=2, ge=0, le=2, exclude_if=lambda batches: batches == 2)
    """Static batches' worth of requests that a replica may hold, its running one included; 0: an idle one gets one."""
    expected_tokens: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = Field(
        default=None, exclude_if=lambda tokens: tokens is None
    )
    """(prompt, output) of an average request, to plan for before any has come; else half a context and a quarter."""
    spare_instances: int | None = Field(default=None, ge=0, le=1024, exclude_if=lambda spare: spare is None)
    """Under `live`: idle instances that wait for the next preemption, more are given back; None: all are kept."""
    min_kv_tokens: int = Field(default=0, ge=0)
    """KV tokens one replica must at least hold; 0 means one sequence of `max_model_len`."""


def weight_copies(linear: LinearKind) -> int:
    """How often the weights of a position take memory: the plain ones stay, as migrations read them."""
    return 2 if linear == "prepacked" else 1


class ServingSpec(Frozen):
    """All that a plan is made for beside the world itself; `spec_digest` covers it."""

    model: ModelSpec
    profile: Profile
    limits: Limits
    policy: str = "live"
    policy_version: int = POLICY_VERSION
    solvers: dict[str, str] = {}
    deterministic: bool = True
    linear: LinearKind = "plain"
    """What weights are multiplied with: as they are, or copies laid out for the processor; one kind everywhere."""

    @model_validator(mode="after")
    def _within_model(self) -> ServingSpec:
        if self.limits.max_model_len > self.model.max_model_len:
            raise ValueError(
                f"max_model_len {self.limits.max_model_len} exceeds the model's {self.model.max_model_len}"
            )
        return self
