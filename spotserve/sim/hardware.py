"""The machines of a simulation: what their profile does not say."""

from __future__ import annotations

from pydantic import Field

from spotserve.core.frozen import Frozen


class Hardware(Frozen):
    """Instances and how long their affairs take. Rates of the network and of storage are the profile's."""

    gpus_per_instance: int = Field(default=1, ge=1, le=64)
    gpu_memory_bytes: int = Field(gt=0)
    """The budget of a GPU for weights and KV."""
    start_s: float = Field(default=120.0, ge=0, le=86_400)
    """From the request of an instance to its workers' registration."""
    local_bytes_per_s: float = Field(default=10e9, gt=0)
    """Between two GPUs of an instance, each way."""
    rpc_s: float = Field(default=0.005, ge=0, le=10)
    """A command to a worker and its answer."""
    commit_s: float = Field(default=0.005, ge=0, le=10)
    """One group commit of the ledger."""
    join_s: float = Field(default=0.5, ge=0, le=600)
    """A replica's ranks find one another, beside the old one's decoding."""
    activate_s: float = Field(default=0.02, ge=0, le=60)
    detect_s: float = Field(default=0.1, ge=0, le=60)
    """From an instance's end to the failure detector's word."""
    solve_s: float = Field(default=0.05, ge=0, le=60)
    solve_s_per_gpu: float = Field(default=0.0006, ge=0, le=1)
    """Planning takes `solve_s` and so much for every GPU: 95 ms were measured at 64 GPUs, 573 ms at 1024."""
    spot_usd_per_hour: float = Field(gt=0)
    ondemand_usd_per_hour: float = Field(gt=0)
