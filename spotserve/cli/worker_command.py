"""`spotserve worker`: this machine as one instance of a daemon elsewhere.

The local cloud starts its instances through the same entry function with the same arguments. Here the process
becomes the instance itself: a fresh Python, so that torch is never loaded beside what the command line needed.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Annotated, get_args

import typer

from spotserve.cli.config import MAX_SECONDS, Origin, choice, integer, parse_size_bytes, parse_text, seconds
from spotserve.core.options import Device
from spotserve.errors import SpecError

ENTRY = "import sys; from spotserve.runtime.instance import instance_main; sys.exit(instance_main(sys.argv[1:]))"
INSTANCE_ID = re.compile(r"i\d{1,9}")


def register(app: typer.Typer) -> None:
    """Add `worker` to the command line."""
    app.command()(worker)


def worker(
    coordinator: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where the daemon's worker port listens.")],
    secret_file: Annotated[Path, typer.Option(metavar="FILE", help="The worker secret of its state dir.")],
    instance: Annotated[str | None, typer.Option(metavar="ID", help="The id of this instance, such as i4.")] = None,
    gpus: Annotated[str, typer.Option(metavar="K", help="GPUs: one process each.")] = "1",
    gpu_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory of one GPU [default: an equal share of 80% of the free].")
    ] = None,
    device: Annotated[str, typer.Option(metavar="cpu|cuda", help="What a GPU is.")] = "cpu",
    gpu_type: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Its GPU type, one of the daemon's [default: as CUDA says, else its own]."),
    ] = None,
    host: Annotated[str, typer.Option(metavar="HOST", help="Where peers reach this instance.")] = "127.0.0.1",
    orphan_timeout: Annotated[str, typer.Option(metavar="S", help="Seconds to outlive the daemon.")] = "60",
) -> None:
    """Be one instance of a daemon.

    K GPU processes serve it until it lets them go; SIGTERM is a 30 s notice.
    """
    arguments = worker_arguments(
        coordinator=coordinator,
        secret_file=secret_file,
        instance=instance,
        gpus=gpus,
        gpu_memory=gpu_memory,
        device=device,
        gpu_type=gpu_type,
        host=host,
        orphan_timeout=orphan_timeout,
    )
    # An instance is a process group of its own: the daemon kills groups, and this one may be a shell script's.
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.execve(sys.executable, [sys.executable, "-c", ENTRY, *arguments], environment)  # noqa: S606


def worker_arguments(
    *,
    coordinator: str,
    secret_file: Path,
    instance: str | None,
    gpus: str,
    gpu_memory: str | None,
    device: str,
    gpu_type: str | None,
    host: str,
    orphan_timeout: str,
) -> list[str]:
    """What the instance's entry function is given, every value checked."""
    address, _, port = coordinator.rpartition(":")
    if not address:
        raise SpecError(f"--coordinator {coordinator} is not HOST:PORT", hint="write 127.0.0.1:7000")
    integer(1, 65535)(port, Origin("--coordinator"))
    if instance is None:
        raise SpecError("--instance is missing, and a daemon does not hand out ids to workers yet")
    if not INSTANCE_ID.fullmatch(instance):
        raise SpecError(f"--instance {instance} is not an instance id", hint="write i4")
    if not secret_file.is_file():
        raise SpecError(f"--secret-file {secret_file} is not a file")
    arguments = ["--coordinator", coordinator, "--secret-file", str(secret_file), "--instance", instance]
    arguments += ["--gpus", str(integer(1, 64)(gpus, Origin("--gpus")))]
    if gpu_memory is not None:
        arguments += ["--gpu-memory", str(parse_size_bytes(gpu_memory, Origin("--gpu-memory")))]
    arguments += ["--device", str(choice(get_args(Device))(device, Origin("--device"))), "--host", host]
    if gpu_type is not None:
        arguments += [f"--gpu-type={parse_text(gpu_type, Origin('--gpu-type'))}"]
    return [*arguments, "--orphan-timeout", str(seconds(0.1, MAX_SECONDS)(orphan_timeout, Origin("--orphan-timeout")))]
