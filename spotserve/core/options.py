"""What a person may decide about a daemon: the flags of `spotserve run`, validated and with their defaults.

The command line, the environment and the configuration file all end here (`cli/config.py`); `app/` reads
nothing else. Paths are strings, as core knows no file system.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from spotserve.core.frozen import Frozen
from spotserve.core.spec import DType, LinearKind, Profile

Device = Literal["cpu", "cuda"]
LogFormat = Literal["console", "json"]

WHILE_SERVING, STOPPED = "while-serving", "stopped"
"""How a plan moves what it can: beside the replicas that decode, or after these have stopped."""

POLICY_NAMES = ("live", "paper", "reroute", "reparallelize")
SOLVER_NAMES: dict[str, tuple[str, ...]] = {
    "configure": ("cpsat", "enumerate", "cpsat-fickle", "paper", "paper-as-published"),
    "place": ("makespan", "reuse", "paper", "paper-artifact", "rank-order"),
    "migrate": (
        "layered",
        "maxflow",
        "prefix_lp",
        "first_holder",
        "paper",
        "paper-artifact",
        "paper-unplanned",
        "paper-first-holder",
    ),
    "arrange": ("scan", "paper", "paper-as-published", "discard"),
    "ladder": ("priced", "longest_first"),
    "move": (WHILE_SERVING, STOPPED),
}
"""By kind. The registry in solvers/ brings ortools, which the coordinator never loads; a test keeps the two equal."""
NOT_IN_PLANS = {"fleet": "decides what to buy, and no cloud of this daemon sells"}
"""Kinds of solvers that a plan has no use for, and why."""

LOOPBACK_HOSTS = ("127.0.0.1", "::1", "localhost")


class GpuMemory(Frozen):
    """The memory budget of one GPU: so many bytes, or a share of what is free, dealt equally to all GPUs."""

    total_bytes: int | None = Field(default=None, gt=0)
    free_share: float | None = Field(default=None, gt=0, le=1)

    @model_validator(mode="after")
    def _one_of_two(self) -> GpuMemory:
        if (self.total_bytes is None) == (self.free_share is None):
            raise ValueError("a GPU memory budget is either bytes or a share")
        return self


class RunOptions(Frozen):
    """Everything `spotserve run` can be told. `None` means: the default that depends on the model or the machine."""

    model: str | None = None
    """A checkpoint folder or a hub id; None is the built-in model."""
    verify_weights: bool = False
    """Hash every file of the model again, here and in each worker that reads one."""
    instances: int = Field(default=4, ge=0, le=1024)
    gpus_per_instance: int = Field(default=1, ge=1, le=64)
    gpu_memory: GpuMemory | None = None
    data: int | None = Field(default=None, ge=1)
    pipeline: int | None = Field(default=None, ge=1)
    tensor: int | None = Field(default=None, ge=1)
    gpu_profiles: tuple[Profile, ...] = ()
    """Measured times of GPU types beside the one that is measured here; each one's `device` names its type."""
    gpu_types: tuple[str, ...] = ()
    """Types that the local cloud's instances take in turn; empty: all are the profile's own."""
    dtype: DType | None = None
    device: Device = "cpu"
    policy: str = "live"
    solvers: dict[str, str] = {}
    """Solver kind -> name, for the kinds that the policy's default shall not decide."""
    trace: str | None = None
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    max_model_len: int | None = Field(default=None, ge=1)
    max_num_seqs: int = Field(default=8, ge=1)
    spare_instances: int | None = Field(default=None, ge=0, le=1024)
    """Idle instances that are kept for the next preemption, more are given back; None: all are kept."""
    max_queue: int = Field(default=1024, ge=1)
    served_model_name: str | None = None
    api_key: str | None = Field(default=None, min_length=1, repr=False)
    state_dir: str
    seed: int = Field(default=0, ge=0, lt=2**63)
    deterministic: bool = True
    linear: LinearKind = "plain"
    drain_s: float = Field(default=30.0, ge=0)
    orphan_timeout_s: float = Field(default=60.0, gt=0)
    log_format: LogFormat = "console"
    fresh: bool = False
    """Begin a new journal whatever the state dir holds."""
