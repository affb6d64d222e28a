"""The local cloud: instances are process groups on this machine, taken by SIGKILL.

A pid is signalled only if its start time is the registered one, so a recycled pid is never hit.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil

from spotserve.core.ids import InstanceId
from spotserve.errors import SpecError
from spotserve.log import get_logger

MAX_WORKERS_PER_CORE = 16
WORKER_BYTES = 64 * 2**20
"""What a worker process takes beside its emulated GPU's memory (measured: 40 MiB of its own for a small model)."""
START_TIME_TOLERANCE_S = 0.05
REAP_TIMEOUT_S = 5.0
_POLL_S = 0.01

log = get_logger("cloud")


class Forked(Protocol):
    """What a launch returns: the first process of the group."""

    @property
    def pid(self) -> int:
        """Its pid, which is the process group's id too."""

    @property
    def started_at(self) -> float:
        """Its start time as the OS tells it."""


class Launcher(Protocol):
    """Forks an instance from a preloaded process."""

    def fork(self, args: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None) -> Forked:
        """Run `spotserve worker ARGS` in a new process group."""


@dataclass(frozen=True, slots=True)
class LocalInstance:
    """The process group of one instance."""

    process_group: int
    started_at: float


class LocalCloud:
    """Launches and kills local instances."""

    def __init__(
        self,
        launcher: Launcher,
        *,
        log_folder: Path,
        worker_args: Sequence[str],
        gpu_types: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Instances take the types of `gpu_types` in turn, by their number; an empty one is said to nobody."""
        self._launcher = launcher
        self._log_folder = log_folder
        self._worker_args = tuple(worker_args)
        self._gpu_types = tuple(gpu_types)
        self._env = dict(env or {})
        self._instances: dict[InstanceId, LocalInstance] = {}

    def log_path(self, instance: InstanceId) -> Path:
        """Where an instance's output goes."""
        return self._log_folder / f"{instance}.log"

    async def launch(self, instance: InstanceId) -> None:
        """Fork the instance; it dials in when it is up."""
        args = [*self._worker_args, *self._type_args(instance), "--instance", instance]
        forked = await asyncio.to_thread(self._launcher.fork, args, log=self.log_path(instance), env=self._env)
        self._instances.setdefault(instance, LocalInstance(forked.pid, forked.started_at))
        log.info("instance_launched", instance=instance, process_group=forked.pid)

    def _type_args(self, instance: InstanceId) -> tuple[str, ...]:
        if not self._gpu_types:
            return ()
        name = self._gpu_types[int(instance.removeprefix("i")) % len(self._gpu_types)]
        return (f"--gpu-type={name}",) if name else ()

    def adopt(self, instance: InstanceId, *, process_group: int, started_at: float) -> None:
        """The process group that registered is the instance; another one of its name (launched twice) is ended."""
        registered = LocalInstance(process_group, started_at)
        known = self._instances.get(instance)
        self._instances[instance] = registered
        if known is not None and known.process_group != process_group:
            signal_group(known, signal.SIGKILL)

    def alive(self, instance: InstanceId) -> bool:
        """Whether any process of the instance still runs."""
        known = self._instances.get(instance)
        return known is not None and bool(_members(known))

    async def kill(self, instance: InstanceId) -> None:
        """SIGKILL the whole group; returns when it is empty."""
        known = self._instances.get(instance)
        if known is None:
            return
        deadline_s = time.monotonic() + REAP_TIMEOUT_S
        while _members(known) and time.monotonic() < deadline_s:
            if not signal_group(known, signal.SIGKILL):
                break
            await asyncio.sleep(_POLL_S)
        log.info("instance_killed", instance=instance, process_group=known.process_group)

    async def wait_gone(self, instances: Sequence[InstanceId], *, timeout_s: float) -> None:
        """Wait for instances that were told to exit; kill what is left at the time-out."""
        deadline_s = time.monotonic() + timeout_s
        while any(self.alive(name) for name in instances) and time.monotonic() < deadline_s:
            await asyncio.sleep(_POLL_S)
        for name in instances:
            if self.alive(name):
                await self.kill(name)

    def last_lines(self, instance: InstanceId, count: int = 20) -> list[str]:
        """The end of an instance's log."""
        try:
            text = self.log_path(instance).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return []
        return text.splitlines()[-count:]


def check_capacity(num_workers: int, *, num_cores: int, free_bytes: int) -> None:
    """Refuse a fleet that this machine cannot run. Raises SpecError."""
    bound = min(MAX_WORKERS_PER_CORE * num_cores, free_bytes // WORKER_BYTES)
    if num_workers > bound:
        raise SpecError(
            f"{num_workers} workers exceed {bound}, which is what {num_cores} cores and "
            f"{free_bytes / 2**30:.1f} GiB of free memory can run",
            hint=f"choose --instances times --gpus-per-instance up to {bound}",
        )


def signal_group(instance: LocalInstance, number: int) -> bool:
    """Signal a process group if it is still the registered one. False when it is not there any more."""
    if not _members(instance):
        return False
    try:
        os.killpg(instance.process_group, number)
    except ProcessLookupError:
        return False
    return True


def _members(instance: LocalInstance) -> list[int]:
    """Pids of the group's running processes; none if its leader's pid now belongs to another process."""
    try:
        # Nearly always the answer, and it costs no look at every process of the machine.
        os.killpg(instance.process_group, 0)
    except ProcessLookupError:
        return []
    with contextlib.suppress(psutil.NoSuchProcess):
        # A leader that is gone and reaped leaves its siblings: the group's id is theirs while one of them lives.
        leader = psutil.Process(instance.process_group)
        if abs(leader.create_time() - instance.started_at) > START_TIME_TOLERANCE_S:
            return []
    return [pid for pid in psutil.pids() if _runs_in(pid, instance.process_group)]


def _runs_in(pid: int, process_group: int) -> bool:
    """Whether a process is of the group and more than a zombie."""
    try:
        return os.getpgid(pid) == process_group and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, PermissionError, psutil.NoSuchProcess):
        return False
