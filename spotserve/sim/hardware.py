"""The machines of a simulation: what their profile does not say."""

from __future__ import annotations

from pydantic import Field

from spotserve.core.frozen import Frozen


class Machine(Frozen):
    """One kind of instance: its GPUs, and what an hour of it costs in US dollars."""

    gpus_per_instance: int = Field(default=1, ge=1, le=64)
    gpu_memory_bytes: int = Field(gt=0)
    """The budget of a GPU for weights and KV."""
    spot_usd_per_hour: float = Field(gt=0)
    ondemand_usd_per_hour: float = Field(gt=0)


class OtherMachine(Machine):
    """An instance of another GPU type than the profile's own."""

    profile: str | None = None
    """Whose times it has: a GPU of the catalogue or a profile file; the catalogue's of the type's name if not given."""


class Hardware(Machine):
    """Instances and how long their affairs take. Rates of the network and of storage are the profile's."""

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
    iteration_s: float = Field(default=0.0, ge=0, le=10)
    """What an iteration takes beside the profile's layers: scheduling it, sampling, saying its tokens."""
    least_iteration_s: float = Field(default=0.0, ge=0, le=10)
    """A replica begins at most one micro-batch in so long, as emulated GPUs keep time by `SPOTSERVE_ITERATION_S`."""
    transfer_s: float = Field(default=0.0, ge=0, le=10)
    """What a transfer takes beside its bytes: the grant at its source, the command at its destination, the answer."""
    follow_s: float = Field(default=0.0, ge=0, le=10)
    """Until a copy of KV beside decoding knows that it has caught up: it looks again for blocks filled meanwhile."""
    accept_s: float = Field(default=0.0, ge=0, le=10)
    """From a client's call to the journal: HTTP, and the prompt made durable."""
    deliver_s: float = Field(default=0.0, ge=0, le=10)
    """From the leader's commit of a token to its client: made durable, then sent."""
    solve_s: float = Field(default=0.05, ge=0, le=60)
    solve_s_per_gpu: float = Field(default=0.0006, ge=0, le=1)
    """Planning takes `solve_s` and so much for every GPU: 95 ms were measured at 64 GPUs, 573 ms at 1024."""
    types: dict[str, OtherMachine] = Field(default={}, max_length=16, exclude_if=lambda types: not types)
    """Instances of other GPU types, by the name of the type."""

    def of(self, gpu_type: str) -> Machine:
        """The instances of a GPU type; an empty name, and one without a table, are the profile's own."""
        return self.types.get(gpu_type, self)
