"""The entry of an instance: reads its arguments, becomes K processes, one per GPU, and runs an agent in each.

The local cloud (through the forkserver) and `spotserve worker` call the same `instance_main` with the same arguments.
All processes of an instance are one process group. No gRPC is imported before the last fork.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

import psutil
from pydantic import Field

from spotserve.core.frozen import Frozen
from spotserve.core.ids import GpuId, InstanceId
from spotserve.errors import SpecError, SpotServeError

_UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


class WorkerSettings(Frozen):
    """What one GPU process is told on its command line."""

    coordinator: str
    secret_file: str
    instance: InstanceId
    gpu_index: int = Field(default=0, ge=0)
    num_gpus: int = Field(default=1, ge=1)
    gpu_memory_bytes: int = Field(gt=0)
    device: str = "cpu"
    gpu_type: str = ""
    """What its GPU is called; empty: as CUDA calls it, or on a CPU the daemon's own type."""
    host: str = "127.0.0.1"
    """Where the mesh and transfer ports listen; peers reach the worker there."""
    orphan_timeout_s: float = Field(default=60.0, gt=0)

    @property
    def worker(self) -> GpuId:
        """The id of this GPU."""
        return GpuId(f"{self.instance}/{self.gpu_index}")

    def read_secret(self) -> str:
        """The worker secret. Raises SpecError when it cannot be read."""
        try:
            secret = Path(self.secret_file).read_text().strip()
        except OSError as error:
            raise SpecError(f"secret file {self.secret_file} cannot be read ({error.strerror})") from error
        if not secret:
            raise SpecError(f"secret file {self.secret_file} is empty")
        return secret


class _Parser(argparse.ArgumentParser):
    """Says what is wrong by an exception; the process belongs to the caller."""

    def error(self, message: str) -> NoReturn:
        raise SpecError(f"worker arguments: {message}")


def instance_main(args: list[str]) -> int:
    """Run one instance until it is told to end; returns the exit code of this process."""
    try:
        settings = parse_worker_arguments(args)
        settings.read_secret()
    except SpotServeError as error:
        sys.stderr.write(error.message + "\n")
        return error.exit_code
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if settings.num_gpus > 1:
        # Siblings that die are nobody's zombies.
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for gpu_index in range(1, settings.num_gpus):
        if os.fork() == 0:
            settings = settings.model_copy(update={"gpu_index": gpu_index})
            break
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # A lost connection is the link's to log, in its own words.
    agent = importlib.import_module("spotserve.runtime.agent")
    return int(agent.agent_main(settings))


def parse_worker_arguments(args: list[str]) -> WorkerSettings:
    """The settings that the arguments of `spotserve worker` mean.

    Raises:
        SpecError: one is missing, unknown or out of bounds.
    """
    parser = _Parser(prog="spotserve worker", add_help=False)
    parser.add_argument("--coordinator", required=True)
    parser.add_argument("--secret-file", required=True)
    parser.add_argument("--instance", required=True)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--gpu-memory", default=None)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--gpu-type", default="")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--orphan-timeout", type=float, default=60.0)
    options = parser.parse_args(args)
    memory = default_memory_bytes(options.gpus) if options.gpu_memory is None else parse_bytes(options.gpu_memory)
    try:
        return WorkerSettings(
            coordinator=options.coordinator,
            secret_file=options.secret_file,
            instance=InstanceId(options.instance),
            num_gpus=options.gpus,
            gpu_memory_bytes=memory,
            device=options.device,
            gpu_type=options.gpu_type,
            host=options.host,
            orphan_timeout_s=options.orphan_timeout,
        )
    except ValueError as error:
        raise SpecError(f"worker arguments: {error}") from error


def parse_bytes(text: str) -> int:
    """Bytes of `6MiB`, `80GB`, `1048576`. Raises SpecError."""
    number = text.strip().rstrip("BbKkMmGgIi")
    unit = text.strip()[len(number) :].upper()
    try:
        value = float(number) * _UNITS[unit]
    except (ValueError, KeyError) as error:
        raise SpecError(f"memory size {text!r} is not a number of bytes", hint="write 6MiB or 80GiB") from error
    if not 1 <= value < 2**60:
        raise SpecError(f"memory size {text!r} is not positive and sane")
    return int(value)


def default_memory_bytes(num_gpus: int, *, share: float = 0.8) -> int:
    """What each GPU gets of a share of the memory that is free now."""
    return max(1, int(psutil.virtual_memory().available * share) // max(1, num_gpus))
